"""The seam of an output format: how rows become a file, and what a file of it says."""

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, Protocol

from hpc.output.row import OutputRow
from hpc.request import RowId


class Format(Protocol):
    """A format of the output.

    An entry is what stands in a file for one row: the bytes of a line where the output is compared byte by byte, else
    a value.
    """

    unit: str
    """What messages count: "line", or "row" in a file without lines."""
    has_missing: bool
    """Whether a file has something to say of rows that have no answer yet."""

    def write(self, path: Path, rows: Iterable[OutputRow]) -> None:
        """Write rows to a new file."""

    def read(self, path: Path) -> Iterator[Any]:
        """Yield the entries of a file."""

    def entry(self, row: OutputRow) -> Any:
        """Return the entry that must stand for a row."""

    def value(self, entry: Any) -> dict[str, Any] | None:
        """Return what an entry says, None where that cannot be read."""

    def name_of(self, identity: RowId | None, error: dict[str, str] | None) -> str:
        """Return what tells an entry from others: the id, or of a row without the error, which names a place."""

    def name(self, value: dict[str, Any] | None) -> str:
        """Return the same of what an entry says."""

    def without_meta(self, entry: Any) -> Any:
        """Return an entry without what it carries of the corpus."""
