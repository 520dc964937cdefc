"""JSON lines: one object on each line; a blank line is no row."""

from collections.abc import Iterator
from pathlib import Path

from hpc.corpus.decode import decode_row
from hpc.corpus.errors import RowError
from hpc.corpus.formats.block import Block, Digest, Piece, Row

_BOM = b"\xef\xbb\xbf"


class JsonLines:
    """A line is a row."""

    in_lines = True

    def blocks(self, path: Path, block_bytes: int, digest: Digest) -> Iterator[Piece]:
        """Yield pieces of whole lines, blank ones included."""
        number = 1
        with open(path, "rb") as file:
            while data := file.read(block_bytes):
                data += file.readline()
                digest.update(data)
                if number == 1:
                    data = data.removeprefix(_BOM)
                lines = data.split(b"\n")
                yield Piece(number, sum(1 for line in lines if line.strip()), data)
                number += len(lines) - 1

    def rows(self, block: Block) -> Iterator[Row]:
        """Yield the object of each line, or what is wrong with it."""
        row, end = block.first_row, block.first_row + block.num_rows
        for number, line in enumerate(block.data.split(b"\n"), block.first):
            if row == end:
                return
            if line.strip():
                place = block.place(number)
                try:
                    yield row, place, decode_row(line.removesuffix(b"\r"))
                except RowError as error:
                    yield row, place, error
                row += 1
