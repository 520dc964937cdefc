"""Formats of text with a line for each row: they differ in what a line says."""

import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from hpc.output.formats import packed
from hpc.output.row import OutputRow
from hpc.request import RowId


class Lines:
    """A file with a JSON object on each line, compared byte by byte."""

    unit = "line"
    has_missing = False

    def __init__(self, packing: str = "") -> None:
        """Take what the files are packed with, as the end of a file name."""
        self._packing = packing

    def write(self, path: Path, rows: Iterable[OutputRow]) -> None:
        """Write the line of each row."""
        with packed.create(path, self._packing) as file:
            for row in rows:
                file.write(self.entry(row))

    def read(self, path: Path) -> Iterator[bytes]:
        """Yield the lines."""
        with packed.read(path, self._packing) as file:
            yield from file

    def entry(self, row: OutputRow) -> bytes:
        """Return the line of a row."""
        raise NotImplementedError

    def value(self, entry: bytes) -> dict[str, Any] | None:
        """Return the object of a line."""
        try:
            value = json.loads(entry)
        except ValueError:
            return None
        return value if isinstance(value, dict) else None

    def name_of(self, identity: RowId | None, error: dict[str, str] | None) -> str:
        """Return the id, or the message of the error of a row without."""
        return json.dumps([error["message"]] if identity is None and error is not None else identity)

    def name(self, value: dict[str, Any] | None) -> str:
        """Return the name that a line says."""
        raise NotImplementedError

    def without_meta(self, entry: bytes) -> bytes:
        """Return the line as it is."""
        return entry
