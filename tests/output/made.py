"""Output rows of a corpus that is read as in a run, with completions that are made up."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from hpc.corpus.columns import Columns
from hpc.corpus.files import Blocks, name_files
from hpc.corpus.find import find_format
from hpc.corpus.store import StoreWriter
from hpc.job import Job
from hpc.output.facts import Facts, facts_of
from hpc.output.journal import JournalIndex, JournalWriter
from hpc.output.row import OutputRow
from hpc.output.write import journal_records, output_rows
from hpc.request import Completion, Sample
from hpc.sampling_params import SamplingParams
from tests.stores import make_checker

Complete = Callable[[int], tuple[Sample, ...] | str | None]
"""Makes of a row's index its samples, what went wrong, or nothing where it has not been run."""
CREATED = 1_790_000_000
WORDS = {1: b"one", 2: b" t\xc3\xbc", 3: b"\xc3"}


def usual(row: int) -> tuple[Sample, ...]:
    return (Sample((1, 2, row), f"text of {row}: é\n\"'", "stop"),)


def make_rows(
    folder: Path,
    corpus: Path,
    complete: Complete = usual,
    *,
    job: dict[str, Any] | None = None,
    columns: Columns | None = None,
) -> tuple[Facts, list[OutputRow]]:
    """Return the facts of a run over a corpus file, and its output rows."""
    folder.mkdir(parents=True, exist_ok=True)
    values = {"model": "org/model", "corpus": (str(corpus),), "sampling": SamplingParams(), **(job or {})}
    made = Job(**values)
    kinds = [find_format(corpus, "auto")]
    checker, writer = make_checker(made.sampling, columns=columns), StoreWriter(folder)
    blocks = Blocks(name_files([corpus], kinds), limit=made.limit)
    for block in blocks:
        writer.append(block, checker.check_block(block))
    inputs = {"files": [[str(corpus), 0, 0]], "formats": kinds, "limit": made.limit}
    tokens = writer.finish(inputs, blocks.digests)
    (folder / "journal").unlink(missing_ok=True)
    journal = JournalWriter(folder / "journal")
    journal.append(
        _completion(tokens.key(row), row, answer)
        for row in range(tokens.num_rows)
        if tokens.good[row] and (answer := complete(row)) is not None
    )
    journal.close()
    paths = [folder / "journal"] if (folder / "journal").exists() else []
    records = [journal_records(tokens, JournalIndex(paths))]
    facts = facts_of(made, Path("hub/snapshots/1"), CREATED, tokens, WORDS.get)
    return facts, list(output_rows(tokens, tokens.files, made.limit, records, made.return_token_ids))


def _completion(key: bytes, row: int, answer: tuple[Sample, ...] | str) -> Completion:
    if isinstance(answer, str):
        return Completion(key, row, row, (), None, "error", {"kind": "engine", "message": answer})
    first, *others = answer
    return Completion(
        key, row, row, first.token_ids, first.text, first.finish_reason, None, first.logprobs, tuple(others)
    )


def values(rows: Sequence[OutputRow]) -> list[dict[str, Any]]:
    return [row.value for row in rows if row.answer is not None]
