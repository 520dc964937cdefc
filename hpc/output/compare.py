"""Compare an output, entry by entry, with what it must be, and name each difference. Pure but for reading the store."""

import json
from collections.abc import Iterable, Iterator
from typing import Any

from hpc.corpus.store import TokenStore
from hpc.output.formats.format import Format
from hpc.output.row import OutputRow


def compare(
    found: Iterable[Any],
    expected: Iterator[OutputRow],
    tokens: TokenStore,
    output: Format,
    without_meta: bool = False,
) -> Iterator[str]:
    """Yield a sentence for each row that is missing, doubled, out of its order or not what it must be.

    `found` are the entries that stand in the output. Every entry follows from corpus, token store and journals, so
    equal ones prove a row: its place, id, text, token counts and `meta`. Memory is bounded while the ids are in step.
    `without_meta` is for `expected` rows that have none, where the corpus is gone: what stands in the file is passed
    over.
    """
    rows_of: dict[str, int] | None = None
    without = output.without_meta if without_meta else lambda entry: entry
    rights = ((row, _right(row, output, without_meta)) for row in expected)
    row, right = next(rights, _NONE)
    for number, entry in enumerate(map(without, found), 1):
        if row is not None and entry == right:
            row, right = next(rights, _NONE)
            continue
        value = output.value(entry)
        if rows_of is None:
            rows_of = _rows_of(tokens, output)
        name = output.name(value)
        at = None if value is None else rows_of.get(name)
        other = row is not None and name != output.name_of(row.id, row.error)
        if row is None or (at is not None and at < row.row and other):
            yield f"{output.unit} {number}: {_what(value, at)} stands here again, or out of its order"
            continue
        if at is not None and other:
            while row is not None and row.row < at:
                yield f"row {row.row} (id {row.id!r}): its {output.unit} is missing before {output.unit} {number}"
                row, right = next(rights, _NONE)
            if row is not None and entry == right:
                row, right = next(rights, _NONE)
                continue
        if row is not None:
            difference = _difference(value, None if right is None else output.value(right), output.unit)
            yield f"row {row.row} (id {row.id!r}), {output.unit} {number}: {difference}"
            row, right = next(rights, _NONE)
    while row is not None:
        yield f"row {row.row} (id {row.id!r}): its {output.unit} is missing at the end"
        row, right = next(rights, _NONE)


_NONE: tuple[OutputRow | None, Any] = (None, None)


def _right(row: OutputRow, output: Format, without_meta: bool) -> Any:
    """Return the entry that must stand for a row; None for one that has none."""
    if row.answer is None and not output.has_missing:
        return None
    return output.without_meta(output.entry(row)) if without_meta else output.entry(row)


def _rows_of(tokens: TokenStore, output: Format) -> dict[str, int]:
    """Return the first row of each name."""
    found: dict[str, int] = {}
    errors = tokens.errors()
    refused, error = next(errors, (-1, {}))
    for row in range(tokens.num_rows):
        own = error if row == refused else None
        found.setdefault(output.name_of(tokens.id(row), own), row)
        if row == refused:
            refused, error = next(errors, (-1, {}))
    return found


def _what(value: dict[str, Any] | None, row: int | None) -> str:
    if value is None:
        return "what is no JSON object"
    return f"id {value.get('id')!r}" + ("" if row is None else f" (row {row})")


def _difference(value: dict[str, Any] | None, right: dict[str, Any] | None, unit: str) -> str:
    if right is None:
        return "no journal has its completion"
    if value is None:
        return f"the {unit} is not JSON"
    names = [name for name in {**right, **value} if value.get(name, _NONE) != right.get(name, _NONE)]
    if not names:
        return f"the {unit} says the same in other bytes"
    return f'"{names[0]}" is {_short(value.get(names[0]))} and must be {_short(right.get(names[0]))}'


def _short(value: object) -> str:
    text = json.dumps(value, ensure_ascii=False, default=str).encode("utf-8", "replace").decode()
    return text if len(text) <= 60 else f"{text[:57]}..."
