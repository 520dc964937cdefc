"""Compare an output, line by line, with what it must be, and name each difference. Pure but for reading the file."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from hpc.corpus.store import TokenStore
from hpc.output.merge import OutputRow, encode


def compare(path: Path, expected: Iterator[OutputRow], tokens: TokenStore, without_meta: bool = False) -> Iterator[str]:
    """Yield a sentence for each row that is missing, doubled, out of its order or not what it must be.

    Every output row follows from corpus, token store and journals, so equal bytes prove a row: its
    place, id, text, token counts and `meta`. Memory is bounded while the ids are in step. `without_meta`
    is for `expected` rows that have none, where the corpus is gone: what stands in the file is passed over.
    """
    rows_of: dict[str, int] | None = None
    row = next(expected, None)
    with open(path, "rb") as file:
        for number, line in enumerate(file, 1):
            if without_meta and (row is None or line != row.line):
                line = _without_meta(line)
            if row is not None and line == row.line:
                row = next(expected, None)
                continue
            value = _object(line)
            if rows_of is None:
                rows_of = _rows_of(tokens)
            at = None if value is None else rows_of.get(_name(value))
            other = row is not None and _name(value) != _name_of(row)
            if row is None or (at is not None and at < row.row and other):
                yield f"line {number}: {_what(value, at)} stands here again, or out of its order"
                continue
            if at is not None and other:
                while row is not None and row.row < at:
                    yield f"row {row.row} (id {row.id!r}): its line is missing before line {number}"
                    row = next(expected, None)
                if row is not None and line == row.line:
                    row = next(expected, None)
                    continue
            if row is not None:
                yield f"row {row.row} (id {row.id!r}), line {number}: {_difference(value, row)}"
                row = next(expected, None)
    while row is not None:
        yield f"row {row.row} (id {row.id!r}): its line is missing at the end"
        row = next(expected, None)


def _without_meta(line: bytes) -> bytes:
    value = _object(line)
    if value is None or value.pop("meta", None) is None:
        return line
    return encode(value)


def _rows_of(tokens: TokenStore) -> dict[str, int]:
    """Return the first row of each name."""
    found: dict[str, int] = {}
    errors = tokens.errors()
    refused, error = next(errors, (-1, {}))
    for row in range(tokens.num_rows):
        value: dict[str, Any] = {"id": json.loads(tokens.request_line(row))["id"]}
        if row == refused:
            value["error"] = error
            refused, error = next(errors, (-1, {}))
        found.setdefault(_name(value), row)
    return found


def _name(value: dict[str, Any] | None) -> str:
    """Return what tells an output row from others: its id, or the error of one without, which names its line."""
    named: Any = None if value is None else value.get("id")
    if named is None and value is not None and isinstance(value.get("error"), dict):
        named = [value["error"].get("message")]
    return json.dumps(named)


def _name_of(row: OutputRow) -> str:
    return _name(_object(row.line)) if row.id is None and row.line is not None else _name({"id": row.id})


def _object(line: bytes) -> dict[str, Any] | None:
    try:
        value = json.loads(line)
    except ValueError:
        return None
    return value if isinstance(value, dict) else None


def _what(value: dict[str, Any] | None, row: int | None) -> str:
    if value is None:
        return "what is no JSON object"
    return f"id {value.get('id')!r}" + ("" if row is None else f" (row {row})")


def _difference(value: dict[str, Any] | None, row: OutputRow) -> str:
    if row.line is None:
        return "no journal has its completion"
    if value is None:
        return "the line is not JSON"
    right = json.loads(row.line)
    names = [name for name in {**right, **value} if value.get(name, _object) != right.get(name, _object)]
    if not names:
        return "the line says the same in other bytes"
    return f'"{names[0]}" is {_short(value.get(names[0]))} and must be {_short(right.get(names[0]))}'


def _short(value: object) -> str:
    text = json.dumps(value, ensure_ascii=False).encode("utf-8", "replace").decode()
    return text if len(text) <= 60 else f"{text[:57]}..."
