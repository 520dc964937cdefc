"""Write the output of a run, made of its token store, corpus and records: aside, and rename it."""

import contextlib
import itertools
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from hpc.arrays import Record
from hpc.corpus.columns import Columns
from hpc.corpus.errors import CorpusError
from hpc.corpus.files import Blocks
from hpc.corpus.formats import CorpusFile, Place, Row
from hpc.corpus.formats import rows as rows_of
from hpc.corpus.store import TokenStore
from hpc.output.facts import Facts
from hpc.output.formats import packed
from hpc.output.journal import JournalIndex, Spans
from hpc.output.merge import MergeError, merge
from hpc.output.row import OutputRow
from hpc.output.target import Target
from hpc.rundir import atomic


@dataclass
class Counts:
    """Counts of the rows of an output."""

    rows: int = 0
    errors: int = 0
    missing: int = 0
    prompt_tokens: int = 0
    completion_tokens: int = 0
    first_error: str = ""
    """Of the first row that has an error, what it says."""
    examples: list[OutputRow] = field(default_factory=list)
    """The first rows, as many as were asked for."""


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
    read = Columns.said(tokens.inputs.get("prompts", {})).identify_and_keep
    for index, row in enumerate(merge(rows, tokens.errors(), records, lengths, return_token_ids, read)):
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
    return zip(rows.tolist(), index.read(numbers[rows]), strict=True)


class Counted:
    """Output rows, and counts of those that have gone by."""

    def __init__(self, rows: Iterable[OutputRow], num_examples: int = 0) -> None:
        """Keep the first `num_examples` rows for the counts."""
        self.counts = Counts()
        self._rows, self._num_examples = rows, num_examples

    def __iter__(self) -> Iterator[OutputRow]:
        """Yield the rows; at the end the counts are whole."""
        num_rows = errors = missing = prompt_tokens = completion_tokens = 0
        first_error, examples = "", list[OutputRow]()
        for row in self._rows:
            answer = row.answer
            if answer is None:
                missing += 1
                yield row
                continue
            if type(answer) is Spans:
                completion_tokens += answer.num_tokens
            else:
                completion_tokens += row.completion_tokens
                if (error := row.error) is not None:
                    errors += 1
                    first_error = first_error or error["message"]
            if num_rows < self._num_examples:
                examples.append(row)
            num_rows += 1
            prompt_tokens += row.prompt_tokens
            yield row
        self.counts = Counts(num_rows, errors, missing, prompt_tokens, completion_tokens, first_error, examples)


def write_output(
    target: Target, rows: Iterable[OutputRow], facts: Facts, num_examples: int = 0, writer: str = ""
) -> Counts:
    """Write output rows, without missing ones where the format has nothing to say of them.

    A file is there whole or not at all: all are written aside, and renamed when the last of them is. The first
    `num_examples` rows are kept in the counts. A `writer` has a name to tell its files aside from those of another
    process, which may be writing the same output.
    """
    counted, output = Counted(rows, num_examples), target.make_format(facts)
    before, written = target.existing(), list[Path]()
    target.folder.mkdir(parents=True, exist_ok=True)
    kept: Iterator[OutputRow] = (row for row in counted if row.answer is not None or output.has_missing)
    try:
        with contextlib.ExitStack() as stack:
            if target.error_file is not None:
                aside = _aside(target.error_file, writer)
                bad = stack.enter_context(packed.create(aside, packed.of_name(target.error_file)))
                written.append(aside)
                kept = _good(kept, lambda row: bad.write(output.entry(row)))
            while (first := next(kept, None)) is not None or len(written) == (target.error_file is not None):
                some = itertools.chain([] if first is None else [first], kept)
                file = target.part(len(written)) if target.rows_per_file else target.path
                written.append(_aside(file, writer))
                output.write(written[-1], itertools.islice(some, target.rows_per_file or None))
        files = [target.error_file] if target.error_file is not None else []
        files += target.files(len(written) - len(files))
        for path, aside in zip(files, written, strict=True):
            atomic.finish(path, aside)
    except BaseException:
        for path in written:
            path.unlink(missing_ok=True)
        raise
    for path in before:
        if path not in files:  # of an output in another number of files
            path.unlink(missing_ok=True)
    return counted.counts


def _aside(path: Path, writer: str) -> Path:
    return atomic.aside(path if not writer else path.with_name(f"{path.name}.{writer}"))


def _good(rows: Iterator[OutputRow], bad: Callable[[OutputRow], object]) -> Iterator[OutputRow]:
    """Yield the rows that have a completion; hand the others to `bad`."""
    for row in rows:
        if row.answer is None or row.error is not None:
            bad(row)
        else:
            yield row
