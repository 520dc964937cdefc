"""Find the files of a corpus, and cut the corpus into blocks."""

import glob
import hashlib
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

from hpc.corpus.errors import CorpusError
from hpc.corpus.folder import files_in, saved_files
from hpc.corpus.formats import FORMATS, Block, CorpusFile

STDIN = Path("/dev/stdin")
"""The corpus file that "-" stands for."""


def find_files(patterns: Sequence[str]) -> tuple[Path, ...]:
    """Return the corpus files that names, folders and globs stand for; raise `CorpusError` for what is none."""
    files: list[Path] = []
    for pattern in patterns:
        if pattern == "-":
            files.append(STDIN)
            continue
        path = Path(pattern).expanduser()
        if path.is_dir():
            files.extend(files_in(path))
            continue
        matched = [path] if path.exists() else [Path(name) for name in sorted(glob.glob(str(path), recursive=True))]
        found = [file for path in matched for file in (saved_files(path) or [] if path.is_dir() else [path])]
        if not found:
            hint = "; another process's pipe cannot be opened here: give it to --corpus -" * pattern.startswith(
                "/dev/fd/"
            )
            raise CorpusError(
                f'corpus "{pattern}": no such file; --corpus takes files, a folder of them or a quoted glob{hint}'
            )
        files.extend(found)
    return tuple(file.absolute() for file in files)


def name_files(paths: Sequence[Path], formats: Sequence[str] = ()) -> tuple[CorpusFile, ...]:
    """Return corpus files as messages call them: by their names, or by their paths where names repeat."""
    names = [path.name for path in paths]
    if len(set(names)) < len(names):
        names = [str(path) for path in paths]
    formats = formats or ["jsonl"] * len(paths)
    return tuple(CorpusFile(*values) for values in zip(paths, names, formats, strict=True))


BLOCK_BYTES = 1 << 18
"""Long enough that a message costs nothing beside its tokenization, short enough that rank 0 answers."""


class Blocks:
    """The blocks of a corpus in order; afterwards `num_rows` and `digests` (BLAKE2b of each file)."""

    def __init__(self, files: Sequence[CorpusFile], block_bytes: int = BLOCK_BYTES, limit: int | None = None) -> None:
        self.num_rows = 0
        self.digests: list[str] = []
        self._files = files
        self._block_bytes = block_bytes
        self._limit = limit

    def __iter__(self) -> Iterator[Block]:
        """Read once through; with a limit, no further than the block that reaches it."""
        for index, file in enumerate(self._files):
            digest = hashlib.blake2b(digest_size=16)
            reader = FORMATS[file.format]
            pieces = reader.blocks(file, self._block_bytes, digest)
            while (left := self._left()) and (piece := next(pieces, None)) is not None:
                num_rows = min(piece.num_rows, left)
                yield Block(
                    index, file.name, file.format, piece.first, self.num_rows, num_rows, piece.data, reader.in_lines
                )
                self.num_rows += num_rows
            self.digests.append(digest.hexdigest())

    def _left(self) -> int:
        return sys.maxsize if self._limit is None else self._limit - self.num_rows
