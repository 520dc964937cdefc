"""Blocks of a corpus file, the places of its rows, and the seam of a format."""

from collections.abc import Collection, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, Protocol

from hpc.corpus.errors import RowError


class Place(NamedTuple):
    """The place of a row, for messages: "x.jsonl:17", or "x.parquet row 17" in a file without lines."""

    file: str
    number: int
    """Of its line or row in the file, from 1."""
    in_lines: bool = True

    def __str__(self) -> str:
        return f"{self.file}:{self.number}" if self.in_lines else f"{self.file} row {self.number}"


Row = tuple[int, Place, dict[str, Any] | RowError]
"""Index over the whole corpus, from 0; place; the row's value, or the error of a row that cannot be read."""


Wanted = Collection[str] | None
"""The keys to read; None is all. A table reads no other columns; other formats give all keys anyway."""


@dataclass(frozen=True)
class CorpusFile:
    """A corpus file and its format."""

    path: Path
    name: str
    """Its name in messages."""
    format: str = "jsonl"
    """A name in `FORMATS`."""


class Piece(NamedTuple):
    """Consecutive rows of one file, which are sent to a rank together."""

    first: int
    """Number of its first line or row in the file, from 1."""
    num_rows: int
    data: bytes
    """Rows as the format encodes them: text, or for a table their place in the file."""


@dataclass(frozen=True)
class Block:
    """A piece of a corpus file, and its place in the corpus."""

    file: int
    """Index of the file."""
    name: str
    """The file's name in messages."""
    format: str
    first: int
    """Number of its first line or row in the file, from 1."""
    first_row: int
    """Index of its first row, from 0, over all files."""
    num_rows: int
    """Number of rows to take of `data`, which has more in the last block before a limit."""
    data: bytes
    in_lines: bool = True
    """Whether rows are counted in lines of the file."""

    def place(self, number: int) -> Place:
        """Return where the row of a number is."""
        return Place(self.name, number, self.in_lines)


class Digest(Protocol):
    """A hash of a file's bytes, updated as they are read; see `hashlib`."""

    def update(self, data: bytes, /) -> None:
        """Add bytes."""


class Format(Protocol):
    """A reader of files of one format."""

    in_lines: bool
    """Whether rows are counted in lines of the file."""

    def blocks(self, file: CorpusFile, block_bytes: int, digest: Digest) -> Iterator[Piece]:
        """Yield the file in pieces of about so many bytes; raise `CorpusError` where it is broken."""

    def rows(self, block: Block, wanted: Wanted = None) -> Iterator[Row]:
        """Yield the rows of a block of this format."""

    def columns(self, file: CorpusFile) -> list[str] | None:
        """Return the names of a file's columns; None where each row has names of its own.

        Raises `CorpusError` for a file that cannot be read at all.
        """
