"""Formats whose rows are lines: JSON lines and plain text. A blank line is no row."""

from collections.abc import Callable, Iterator
from typing import Any

from hpc.corpus.decode import decode_row, decode_text
from hpc.corpus.errors import RowError
from hpc.corpus.formats.block import Block, Columns, CorpusFile, Digest, Piece, Row
from hpc.corpus.formats.stream import BOM, TextStream

Decode = Callable[[bytes], dict[str, Any]]
"""Makes a row of a line, or raises `RowError`."""


class Lines:
    """A line is a row."""

    in_lines = True

    def __init__(self, decode: Decode = decode_row) -> None:
        self._decode = decode

    def blocks(self, file: CorpusFile, block_bytes: int, digest: Digest) -> Iterator[Piece]:
        """Yield pieces of whole lines, blank ones included."""
        number = 1
        with TextStream(file.path, file.name) as stream:
            while data := stream.read(block_bytes):
                data += stream.readline()
                digest.update(data)
                if number == 1:
                    data = data.removeprefix(BOM)
                lines = data.split(b"\n")
                yield Piece(number, sum(1 for line in lines if line.strip()), data)
                number += len(lines) - 1

    def rows(self, block: Block, columns: Columns = None) -> Iterator[Row]:  # noqa: ARG002  (it costs nothing)
        """Yield what each line says, or what is wrong with it."""
        return rows_of_lines(block, self._decode)

    def columns(self, file: CorpusFile) -> list[str] | None:
        """Return None: each line has keys of its own."""


def rows_of_lines(block: Block, decode: Decode) -> Iterator[Row]:
    """Yield a row for each line of a block that is not blank."""
    row, end = block.first_row, block.first_row + block.num_rows
    for number, line in enumerate(block.data.split(b"\n"), block.first):
        if row == end:
            return
        if line.strip():
            place = block.place(number)
            try:
                yield row, place, decode(line.removesuffix(b"\r"))
            except RowError as error:
                yield row, place, error
            row += 1


def prompt_of_line(line: bytes) -> dict[str, Any]:
    """Return the row of a line of plain text."""
    return {"prompt": decode_text(line)}


class TextFiles:
    """A file of text is a row, whose prompt is all of it but a last line break; it carries the name of its file."""

    in_lines = True

    def blocks(self, file: CorpusFile, block_bytes: int, digest: Digest) -> Iterator[Piece]:
        """Yield the file: its name, and behind a line break its text."""
        with TextStream(file.path, file.name) as stream:
            data = bytearray()
            while more := stream.read(block_bytes):
                digest.update(more)
                data += more
        text = bytes(data).removeprefix(BOM).removesuffix(b"\n").removesuffix(b"\r")
        yield Piece(1, 1, text)

    def rows(self, block: Block, columns: Columns = None) -> Iterator[Row]:  # noqa: ARG002  (it costs nothing)
        """Yield the row."""
        value: dict[str, Any] | RowError
        try:
            value = {"prompt": decode_text(block.data, "file"), "file": block.name}
        except RowError as error:
            value = error
        if block.num_rows:
            yield block.first_row, block.place(1), value

    def columns(self, file: CorpusFile) -> list[str] | None:
        """Return None: there is nothing to choose from."""
