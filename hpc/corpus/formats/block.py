"""Blocks of a corpus file, the places of its rows, and the seam of a format."""

from collections.abc import Collection, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, Protocol

from hpc.corpus.errors import RowError


class Place(NamedTuple):
    """Where a row stands, for messages: "x.jsonl:17", or "x.parquet row 17" in a file without lines."""

    file: str
    number: int
    """Of its line or row in the file, from 1."""
    in_lines: bool = True

    def __str__(self) -> str:
        return f"{self.file}:{self.number}" if self.in_lines else f"{self.file} row {self.number}"


Row = tuple[int, Place, dict[str, Any] | RowError]
"""Index over the whole corpus, from 0; place; what the row says, or why it cannot be read."""


Columns = Collection[str] | None
"""The only keys that are asked for; None is all. A table reads no other columns; what costs nothing may come too."""


@dataclass(frozen=True)
class CorpusFile:
    """A corpus file and how it is read."""

    path: Path
    name: str
    """What it is called in messages."""
    format: str = "jsonl"
    """A name in `FORMATS`."""


class Piece(NamedTuple):
    """Rows of one file that are sent to a rank together."""

    first: int
    """Number of its first line or row in the file, from 1."""
    num_rows: int
    data: bytes
    """What the format makes the rows of."""


@dataclass(frozen=True)
class Block:
    """A piece of a corpus file, and its place in the corpus."""

    file: int
    """Index of the file."""
    name: str
    """What the file is called in messages."""
    format: str
    first: int
    """Number of its first line or row in the file, from 1."""
    first_row: int
    """Index of its first row, from 0, over all files."""
    num_rows: int
    """Rows to take of `data`: the last block before a limit has more."""
    data: bytes
    in_lines: bool = True
    """Whether its rows are found by line numbers."""

    def place(self, number: int) -> Place:
        """Return where the row of a number is."""
        return Place(self.name, number, self.in_lines)


class Digest(Protocol):
    """What the bytes of a file are added to as they are read."""

    def update(self, data: bytes, /) -> None:
        """Add bytes."""


class Format(Protocol):
    """How a file of one format is read."""

    in_lines: bool
    """Whether its rows are found by line numbers."""

    def blocks(self, file: CorpusFile, block_bytes: int, digest: Digest) -> Iterator[Piece]:
        """Yield the file in pieces of about so many bytes; raise `CorpusError` where it is broken."""

    def rows(self, block: Block, columns: Columns = None) -> Iterator[Row]:
        """Yield the rows of a block of this format."""

    def columns(self, file: CorpusFile) -> list[str] | None:
        """Return the names of a file's columns; None where each row has names of its own.

        Raises `CorpusError` for a file that cannot be read at all.
        """
