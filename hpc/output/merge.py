"""Merge completions and errors into output rows, in the order of the corpus. Pure, and streaming.

Every stream comes in the order of rows, so one row is held at a time, whatever the corpus' size.
"""

import heapq
import json
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from operator import itemgetter
from typing import Any

from hpc.corpus.errors import RowError
from hpc.corpus.formats import Row
from hpc.corpus.row import row_id, row_meta
from hpc.output import journal
from hpc.request import Completion, RowId, Sample

_JSON = json.JSONEncoder(ensure_ascii=False, allow_nan=False)


@dataclass(frozen=True)
class OutputRow:
    """One row of the output; `line` is None while its completion is missing."""

    row: int
    id: RowId | None
    """None for a row whose id cannot be read."""
    line: bytes | None
    error: bool = False
    prompt_tokens: int = 0
    completion_tokens: int = 0


Read = Callable[[dict[str, Any] | RowError, int], tuple[RowId | None, dict[str, Any]]]
"""Makes id and content of a row of its value and index."""


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

    `rows` are those of the corpus, as its formats give them; `errors` and each stream of `records` come by
    row; `prompt_tokens[row]` is the length of the prompt. `read` makes id and content of value and row, as
    a corpus has them by default. Raises `MergeError` for an answer to a row that is not there or has one
    already, and for a damaged record.
    """
    read = read or read_row
    answers = heapq.merge(*records, key=itemgetter(0))
    refused = iter(errors)
    answer, error = next(answers, None), next(refused, None)
    for row, _, given in rows:
        identity, value = read(given, row)
        if error is not None and error[0] == row:
            yield OutputRow(row, identity, _line(identity, None, 0, error[1], value, False), error=True)
            error = next(refused, None)
        elif answer is not None and answer[0] == row:
            completion = _decode(answer)
            tokens = int(prompt_tokens[row])
            line = _line(identity, completion, tokens, completion.error, value, return_token_ids)
            yield OutputRow(row, identity, line, completion.error is not None, tokens, completion.num_tokens)
            answer = next(answers, None)
        else:
            yield OutputRow(row, identity, None)
        if answer is not None and answer[0] <= row:
            raise MergeError(f"row {row} is answered twice, or is refused and answered")
    if answer is not None or error is not None:
        raise MergeError(
            "there are answers to rows behind the end of the corpus; it has become shorter since it was read"
        )


def _decode(answer: tuple[int, bytes]) -> Completion:
    try:
        return journal.decode(answer[1])
    except ValueError as error:
        raise MergeError(f"row {answer[0]}: {error}; run the job again") from error


def read_row(value: dict[str, Any] | RowError, row: int) -> tuple[RowId | None, dict[str, Any]]:
    """Return id and content of a row as far as they can be read."""
    if isinstance(value, RowError):
        return None, {}
    try:
        return row_id(value, row), value
    except RowError:
        return None, value


def _line(
    identity: RowId | None,
    completion: Completion | None,
    prompt_tokens: int,
    error: dict[str, str] | None,
    value: dict[str, Any],
    return_token_ids: bool,
) -> bytes:
    output: dict[str, Any] = {
        "id": identity,
        "text": completion.text if completion and not error else None,
        "finish_reason": completion.finish_reason if completion else "error",
        "usage": {"prompt_tokens": prompt_tokens, "completion_tokens": completion.num_tokens if completion else 0},
        "error": error,
    }
    kept = row_meta(value)
    if kept:
        output["meta"] = kept
    if return_token_ids:
        output["token_ids"] = list(completion.token_ids if completion else ())
    if completion and completion.logprobs is not None:
        output["logprobs"] = _logprobs(completion.samples[0])
    if completion and completion.others:
        output["samples"] = [_sample(sample, return_token_ids) for sample in completion.samples]
    return encode(output)


def encode(output: dict[str, Any]) -> bytes:
    """Return the line of an output row."""
    try:
        return _JSON.encode(output).encode() + b"\n"
    except UnicodeEncodeError:  # half a surrogate pair in "id" or "meta": JSON can carry it, UTF-8 cannot
        return json.dumps(output, allow_nan=False).encode() + b"\n"


def _sample(sample: Sample, return_token_ids: bool) -> dict[str, Any]:
    output: dict[str, Any] = {
        "text": sample.text,
        "finish_reason": sample.finish_reason,
        "usage": {"completion_tokens": len(sample.token_ids)},
    }
    if return_token_ids:
        output["token_ids"] = list(sample.token_ids)
    if sample.logprobs is not None:
        output["logprobs"] = _logprobs(sample)
    return output


def _logprobs(sample: Sample) -> dict[str, Any]:
    """Return log probabilities as lists beside that of the tokens."""
    values = sample.logprobs or ()
    output: dict[str, Any] = {
        "token_ids": list(sample.token_ids),
        "token_logprobs": [chosen for chosen, _ in values],
    }
    if any(top for _, top in values):
        output["top_logprobs"] = [top for _, top in values]
    return output
