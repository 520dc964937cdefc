"""Merge completions and errors into output rows, in the order of the corpus. Pure, and streaming.

Every stream comes in the order of rows, so a few rows are held at a time, whatever the corpus' size.
"""

import itertools
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import numpy as np

from hpc.corpus.columns import Columns
from hpc.corpus.errors import RowError
from hpc.corpus.formats import Row
from hpc.output import journal
from hpc.output.row import Answer, OutputRow
from hpc.request import RowId

Read = Callable[[dict[str, Any] | RowError, int], tuple[RowId | None, dict[str, Any]]]
"""Makes of a row's value and index its id, and what it carries to the output."""

_AT_ONCE = 256
"""Rows for which records are fetched in one go: one by one over several streams takes as long as all the rest."""


class MergeError(Exception):
    """What is to be merged does not fit together."""


def merge(
    rows: Iterable[Row],
    errors: Iterable[tuple[int, dict[str, str]]],
    records: Iterable[Iterable[tuple[int, bytes]]],
    prompt_tokens: Any,
    return_token_ids: bool = False,
    read: Read | None = None,
) -> Iterator[OutputRow]:
    """Yield an output row for each corpus row.

    `rows` are those of the corpus; `errors` and each stream of `records` come by row; `prompt_tokens[row]` is the
    length of the prompt. `read` makes of a row its id, and what it carries, by default from our own columns. Raises
    `MergeError` for an answer to a row that is not there or has one already, and for a damaged record.
    """
    read, rows = read or reader(Columns()), iter(rows)
    streams = [_Stream(errors), *map(_Stream, records)]
    while some := list(itertools.islice(rows, _AT_ONCE)):
        begin, end = some[0][0], some[-1][0] + 1
        answers: dict[int, Any] = {}
        for stream in streams:
            stream.take(end, answers)
        for (row, _, value), length in zip(some, np.asarray(prompt_tokens[begin:end]).tolist(), strict=True):
            identity, meta = read(value, row)
            answer = answers.get(row)
            if type(answer) is bytes:
                answer = _decode(row, answer)
            source = value if type(value) is dict else None
            used = 0 if type(answer) is dict else length
            yield OutputRow(row, identity, meta, answer, used, return_token_ids, source)
    if any(stream.next is not None for stream in streams):
        raise MergeError(
            "there are answers to rows behind the end of the corpus; it has become shorter since it was read"
        )


class _Stream:
    """Errors or records in the order of their rows, the next of them seen already."""

    def __init__(self, answers: Iterable[tuple[int, Any]]) -> None:
        self._answers = iter(answers)
        self.next = next(self._answers, None)

    def take(self, end: int, into: dict[int, Any]) -> None:
        """Put the answers to rows before `end` into a dict."""
        while self.next is not None and self.next[0] < end:
            row, answer = self.next
            if row in into:
                raise MergeError(f"row {row} is answered twice, or is refused and answered")
            into[row] = answer
            self.next = next(self._answers, None)
            if self.next is not None and self.next[0] <= row:
                raise MergeError(f"row {row} is answered twice, or is refused and answered")


def _decode(row: int, record: bytes) -> Answer:
    try:
        return journal.spans(record) or journal.decode(record)
    except ValueError as error:
        raise MergeError(f"row {row}: {error}; run the job again") from error


def reader(columns: Columns) -> Read:
    """Return what reads the id of a row, and what it carries, from the columns that it has."""

    def read(value: dict[str, Any] | RowError, row: int) -> tuple[RowId | None, dict[str, Any]]:
        return columns.identify(value, row), {} if isinstance(value, RowError) else columns.meta_of(value)

    return read
