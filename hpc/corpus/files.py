"""Find the files of a corpus and cut them into blocks of lines. Knows nothing of rows' rules."""

import glob
import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from hpc.corpus.row import STDIN
from hpc.exit import Refusal

_BOM = b"\xef\xbb\xbf"


class CorpusError(Refusal):
    """The corpus as a whole cannot be read: it is not there, empty, or not a file."""


@dataclass(frozen=True)
class Block:
    """Whole lines of one corpus file, blank ones included."""

    file: int
    first_line: int
    """Number of the first line, from 1."""
    first_row: int
    """Index of the first row, from 0, over all files."""
    num_rows: int
    data: bytes

    def rows(self) -> Iterator[tuple[int, int, bytes]]:
        """Yield row index, line number and line of each row; a blank line is no row."""
        row = self.first_row
        for number, line in enumerate(self.data.split(b"\n"), self.first_line):
            if line.strip() and row < self.first_row + self.num_rows:
                yield row, number, line
                row += 1


def find_files(patterns: Sequence[str]) -> tuple[Path, ...]:
    """Return the corpus files that names and globs stand for; raise `CorpusError` for what is no file."""
    files: list[Path] = []
    for pattern in patterns:
        if pattern == "-":
            files.append(STDIN)
            continue
        path = Path(pattern).expanduser()
        if path.is_dir():
            raise CorpusError(f'corpus "{pattern}" is a folder; name its files, for example "{pattern}/*.jsonl"')
        found = [path] if path.exists() else [Path(name) for name in sorted(glob.glob(str(path), recursive=True))]
        found = [path for path in found if not path.is_dir()]
        if not found:
            hint = "; another process's pipe cannot be opened here: give it to --corpus -" * pattern.startswith(
                "/dev/fd/"
            )
            raise CorpusError(f'corpus "{pattern}": no such file; --corpus takes JSONL files or a quoted glob{hint}')
        files.extend(found)
    return tuple(file.absolute() for file in files)


class Blocks:
    """The blocks of a corpus in order; afterwards `num_rows` and `digests` (BLAKE2b of each file)."""

    def __init__(self, files: Sequence[Path], block_bytes: int, limit: int | None = None) -> None:
        self.num_rows = 0
        self.digests: list[str] = []
        self._files = files
        self._block_bytes = block_bytes
        self._limit = limit

    def __iter__(self) -> Iterator[Block]:
        """Read once through; with a limit, no further than the block that reaches it."""
        for index, path in enumerate(self._files):
            digest, line = hashlib.blake2b(digest_size=16), 1
            with open(path, "rb") as file:
                while self._limit is None or self.num_rows < self._limit:
                    data = file.read(self._block_bytes)
                    if not data:
                        break
                    data += file.readline()
                    digest.update(data)
                    if line == 1:
                        data = data.removeprefix(_BOM)
                    lines = data.split(b"\n")
                    num_rows = sum(1 for text in lines if text.strip())
                    if self._limit is not None:
                        num_rows = min(num_rows, self._limit - self.num_rows)
                    yield Block(index, line, self.num_rows, num_rows, data)
                    self.num_rows += num_rows
                    line += len(lines) - 1
            self.digests.append(digest.hexdigest())


BLOCK_BYTES = 1 << 18
"""Long enough that a message costs nothing beside its tokenization, short enough that rank 0 answers."""
