"""The text of a corpus file as UTF-8, whatever it is packed with and however it is encoded."""

import bz2
import contextlib
import gzip
import io
import lzma
import zlib
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import IO, Any

from hpc.corpus.errors import CorpusError

BOM = b"\xef\xbb\xbf"
"""The byte-order mark that some programs write before UTF-8."""

_HEAD_BYTES = 8
"""Enough to tell what a text is packed with, and encoded in."""


def _open_zstd(path: Path) -> Any:
    """Open a zstd file with the standard library of Python 3.14, or with its backport.

    Not with the package `zstandard`, which ends a cut file without an error.
    """
    with contextlib.suppress(ImportError):
        from compression import zstd

        return zstd.open(path)
    try:
        from backports import zstd
    except ImportError:
        raise CorpusError(
            f'corpus "{path}" is packed with zstd, and the package that unpacks it is not installed: '
            'pip install "scattergen[zstd]"'
        ) from None
    return zstd.open(path)


_OPEN: dict[bytes, tuple[str, Callable[[Path], Any]]] = {
    b"\x1f\x8b": ("gunzip -c", gzip.open),
    b"\x28\xb5\x2f\xfd": ("zstd -dc", _open_zstd),
    b"BZh": ("bunzip2 -c", bz2.open),
    b"\xfd7zXZ\0": ("xz -dc", lzma.open),
}
"""By the first bytes of a file: the command that unpacks it, and how it is opened here."""


class TextStream:
    """The bytes of a text file, unpacked, in UTF-8.

    What cannot be unpacked, or ends in the middle, raises `CorpusError` with the line up to which it could be read.
    """

    def __init__(self, path: Path, name: str = "") -> None:
        """Open a file that messages call `name`."""
        self._path, self._name, self._lines, self._unpack = path, name or path.name, 0, ""
        with self._telling(), contextlib.ExitStack() as stack:
            with open(path, "rb") as file:
                head = file.read(_HEAD_BYTES)
            self._file: Any = open(path, "rb")  # noqa: SIM115  (closed at exit)
            for magic, (command, opener) in _OPEN.items():
                if head.startswith(magic):
                    self._unpack = command
                    self._file.close()
                    self._file = opener(path)
            stack.push(self._file)
            if self._unpack:
                head = self._file.read(_HEAD_BYTES)
                self._file.seek(0)
            if encoding := wide_encoding(head):
                self._file = _Recoded(self._file, encoding)
            stack.pop_all()

    def __enter__(self) -> "TextStream":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._file.close()

    def read(self, num_bytes: int) -> bytes:
        """Return so many bytes, fewer at the end; a wide encoding gives a few more."""
        return self._counted(lambda: self._file.read(num_bytes))

    def readline(self) -> bytes:
        """Return the bytes up to and with the next line break."""
        return self._counted(self._file.readline)

    def _counted(self, read: Callable[[], bytes]) -> bytes:
        with self._telling():
            data = read()
        if self._unpack:
            self._lines += data.count(b"\n")
        return data

    @contextlib.contextmanager
    def _telling(self) -> Any:
        try:
            yield
        except CorpusError:
            raise
        except (OSError, EOFError, zlib.error, lzma.LZMAError, UnicodeDecodeError) as error:
            raise self._broken(error) from error
        except Exception as error:
            if type(error).__name__ == "ZstdError":  # of either package
                raise self._broken(error) from error
            raise

    def _broken(self, error: Exception) -> CorpusError:
        if not self._unpack:
            reason = error.strerror if isinstance(error, OSError) else error
            return CorpusError(f'corpus "{self._path}" cannot be read: {reason}')
        return CorpusError(
            f"{self._name}:{self._lines + 1}: here the packed file is cut or damaged ({error}); get it again, or "
            f"take what can be read: {self._unpack} {self._path} | scattergen run --corpus - --name …"
        )


class _Recoded:
    """A file in a wide encoding as UTF-8. Half a surrogate pair becomes bytes that are not UTF-8, as in the file."""

    def __init__(self, file: IO[bytes], encoding: str) -> None:
        self._text = io.TextIOWrapper(file, encoding, "surrogatepass", newline="\n")

    def read(self, num_chars: int) -> bytes:
        return self._text.read(num_chars).encode("utf-8", "surrogatepass")

    def readline(self) -> bytes:
        return self._text.readline().encode("utf-8", "surrogatepass")

    def close(self) -> None:
        self._text.close()


def wide_encoding(head: bytes) -> str:
    """Return the encoding of a text whose characters have two or four bytes; empty for another."""
    if head.startswith((b"\xff\xfe\0\0", b"\0\0\xfe\xff")):
        return "utf-32"
    if head.startswith((b"\xff\xfe", b"\xfe\xff")):
        return "utf-16"
    zeros = [not byte for byte in head[:4]]  # without a mark: of the first two characters, which are ASCII as in {"
    little, big = zeros == [False, True, False, True], zeros == [True, False, True, False]
    return "utf-16-le" if little else "utf-16-be" if big else ""
