"""Write: the output of a run from its token store, corpus and records; aside, then renamed."""

import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from hpc.arrays import Record
from hpc.corpus.errors import CorpusError
from hpc.corpus.files import Blocks
from hpc.corpus.formats import CorpusFile, Place, Row
from hpc.corpus.formats import rows as rows_of
from hpc.corpus.store import TokenStore
from hpc.output.journal import JournalIndex
from hpc.output.merge import MergeError, OutputRow, merge
from hpc.rundir import atomic


@dataclass
class Counts:
    """What an output has in it."""

    rows: int = 0
    errors: int = 0
    missing: int = 0
    prompt_tokens: int = 0
    completion_tokens: int = 0


def output_rows(
    tokens: TokenStore,
    files: Sequence[CorpusFile],
    limit: int | None,
    records: Iterable[Iterable[Record]],
    return_token_ids: bool,
) -> Iterator[OutputRow]:
    """Yield an output row for each row of the corpus, which is read once more for ids and `meta`.

    Raises `MergeError` if the corpus is not what it was when it was read.
    """
    blocks = Blocks(files, limit=limit)
    rows = _corpus_rows(blocks)
    lengths = tokens.prompt_tokens
    for index, row in enumerate(merge(rows, tokens.errors(), records, lengths, return_token_ids)):
        if index >= tokens.num_rows:
            break
        yield row
    if blocks.num_rows != tokens.num_rows or blocks.digests != tokens.digests:
        raise MergeError("the corpus has changed since it was read; run the job again")


def _corpus_rows(blocks: Blocks) -> Iterator[Row]:
    try:
        for block in blocks:
            yield from rows_of(block)
    except CorpusError as error:  # it was whole when it was read
        raise MergeError(f"the corpus has changed since it was read ({error}); run the job again") from error


def rows_without_corpus(
    tokens: TokenStore, records: Iterable[Iterable[Record]], return_token_ids: bool
) -> Iterator[OutputRow]:
    """Yield the output row of each row as far as the token store knows it: all of it but `meta`."""
    rows = ((row, Place("", 0), dict[str, Any]()) for row in range(tokens.num_rows))
    return merge(
        rows, tokens.errors(), records, tokens.prompt_tokens, return_token_ids, lambda _, row: (tokens.id(row), {})
    )


def what_is_gone(tokens: TokenStore) -> str:
    """Say which file of the corpus is not there any more, or not what was read; empty if all is as it was."""
    changed = False
    for name, size, time_ns in tokens.inputs["files"]:
        try:
            stat = os.stat(name)
            with open(name, "rb"):
                pass
        except OSError as error:
            return f"{name} cannot be read ({error.strerror})"
        changed = changed or (stat.st_size, stat.st_mtime_ns) != (size, time_ns)
    if changed:  # or it was only touched, or copied
        names = [name for name, _, _ in tokens.inputs["files"]]
        blocks = Blocks(tokens.files, limit=tokens.inputs["limit"])
        try:
            for _ in blocks:
                pass
        except CorpusError as error:  # it was whole when it was read
            return f"{names[len(blocks.digests)]} has changed since it was read ({error})"
        for name, digest, before in zip(names, blocks.digests, tokens.digests, strict=False):
            if digest != before:
                return f"{name} has changed since it was read"
    return ""


def journal_records(tokens: TokenStore, index: JournalIndex) -> Iterator[Record]:
    """Yield the records of all rows that the journals answer, in the order of rows."""
    numbers = index.find(tokens.keys)
    rows = np.flatnonzero((numbers >= 0) & tokens.good)
    return zip(rows.tolist(), index.read(numbers[rows].tolist()), strict=True)


def write_output(path: Path, rows: Iterable[OutputRow]) -> Counts:
    """Write output rows to `path`, leaving out missing ones; the file is there whole or not at all."""
    counts = Counts()
    try:
        with open(atomic.aside(path), "wb", buffering=1 << 20) as file:
            for row in rows:
                if row.line is None:
                    counts.missing += 1
                    continue
                file.write(row.line)
                counts.rows += 1
                counts.errors += row.error
                counts.prompt_tokens += row.prompt_tokens
                counts.completion_tokens += row.completion_tokens
        atomic.finish(path)
    except BaseException:
        atomic.aside(path).unlink(missing_ok=True)
        raise
    return counts
