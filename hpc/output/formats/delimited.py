"""CSV: a record a row, with its nested values as JSON."""

import csv
import io
import json
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from hpc.output.facts import Facts
from hpc.output.formats import packed
from hpc.output.formats.columns import META, input_columns, renamed
from hpc.output.row import OutputRow
from hpc.request import RowId

_CUT_AT = 1 << 20


class Csv:
    """Comma-separated values as RFC 4180 has them, in UTF-8."""

    unit = "record"
    has_missing = False

    def __init__(self, facts: Facts, packing: str = "") -> None:
        self._packing = packing
        columns = input_columns(facts)
        self._carried = None if columns is None else renamed(columns)
        self._names = ["id", "text", "finish_reason", "prompt_tokens", "completion_tokens", "error"]
        self._names += ["token_ids"] * facts.return_token_ids + ["logprobs"] * facts.logprobs
        self._names += ["samples"] * facts.several
        self._own = tuple(self._names)
        self._names += [META] if self._carried is None else list(self._carried.values())

    def write(self, path: Path, rows: Iterable[OutputRow]) -> None:
        """Write a record of names, and one for each row."""
        text = io.StringIO(newline="")
        # Line ends of two characters, so that either of them is quoted within a field.
        writer = csv.writer(text, lineterminator="\r\n")
        with packed.create(path, self._packing) as file:
            writer.writerow(self._names)
            for row in rows:
                entry = self.entry(row)
                writer.writerow([entry[name] for name in self._names])
                if text.tell() >= _CUT_AT:
                    file.write(text.getvalue().encode())
                    text.seek(0)
                    text.truncate()
            file.write(text.getvalue().encode())

    def read(self, path: Path) -> Iterator[dict[str, Any]]:
        """Yield the records."""
        csv.field_size_limit(sys.maxsize)
        with packed.read(path, self._packing) as file:
            lines = (line.decode("utf-8", "replace") for line in file)
            yield from csv.DictReader(lines)

    def entry(self, row: OutputRow) -> dict[str, Any]:
        """Return the fields of a row, which are texts."""
        value = row.value
        usage = value.pop("usage")
        kept = value.pop("meta", None)
        value.update(usage)
        if self._carried is None:
            value[META] = kept
        else:
            source = row.source or {}
            value.update({new: source.get(name) for name, new in self._carried.items()})
        return {name: _field(value.get(name), name == META) for name in self._names}

    def value(self, entry: dict[str, Any]) -> dict[str, Any]:
        """Return the fields."""
        return entry

    def name_of(self, identity: RowId | None, error: dict[str, str] | None) -> str:
        """Return the id as a text, or the error of a row without."""
        return _field(identity, False) if identity is not None else json.dumps([_field(error, False)])

    def name(self, value: dict[str, Any] | None) -> str:
        """Return the name that a record says."""
        identity, error = (value or {}).get("id"), (value or {}).get("error")
        return identity if identity else json.dumps([error])

    def without_meta(self, entry: dict[str, Any]) -> dict[str, Any]:
        """Return a record without what it carries."""
        return {name: entry.get(name) for name in self._own}


def _field(value: Any, as_json: bool) -> str:
    """Return a value as a text: nothing for none, a text as it is, everything else as JSON."""
    if value is None:
        return ""
    if isinstance(value, str) and not as_json:
        return value.encode("utf-8", "replace").decode()
    return json.dumps(value, ensure_ascii=False).encode("utf-8", "backslashreplace").decode()
