"""Read the text of a corpus file as UTF-8: unpack it, and convert it from UTF-16 or UTF-32."""

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
"""Enough to tell packing and encoding."""
_PACKED_BYTES, _UNPACKED_BYTES = 1 << 16, 1 << 17
"""Bytes that are unpacked, and held unpacked, at a time: some 100 rows, so that calls cost nothing beside them."""


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


class _Streams(io.RawIOBase):
    """The unpacked bytes of packed streams that follow one another; zeros between them are passed over.

    Not `bz2.open` and `lzma.open`: these end without an error at the first damaged stream behind a good one.
    """

    def __init__(self, path: Path, make_decompressor: Callable[[], Any]) -> None:
        self._file = open(path, "rb")  # noqa: SIM115  (closed by close)
        self._make, self._stream = make_decompressor, make_decompressor()

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        data = b""
        while not data:
            packed = b""
            if self._stream.eof:
                packed = self._stream.unused_data.lstrip(b"\0")
                while not packed:
                    if not (more := self._file.read(_PACKED_BYTES)):
                        return 0
                    packed = more.lstrip(b"\0")
                self._stream = self._make()
            elif self._stream.needs_input and not (packed := self._file.read(_PACKED_BYTES)):
                raise EOFError("the packed file ends within a stream")
            data = self._stream.decompress(packed, len(buffer))
        buffer[: len(data)] = data
        return len(data)

    def close(self) -> None:
        self._file.close()
        super().close()


def _open_bz2(path: Path) -> Any:
    return io.BufferedReader(_Streams(path, bz2.BZ2Decompressor), _UNPACKED_BYTES)


def _open_xz(path: Path) -> Any:
    return io.BufferedReader(_Streams(path, lzma.LZMADecompressor), _UNPACKED_BYTES)


_OPEN: dict[bytes, tuple[str, Callable[[Path], Any]]] = {
    b"\x1f\x8b": ("gunzip -c", gzip.open),
    b"\x28\xb5\x2f\xfd": ("zstd -dc", _open_zstd),
    b"BZh": ("bunzip2 -c", _open_bz2),
    b"\xfd7zXZ\0": ("xz -dc", _open_xz),
}
"""By the first bytes of a file: the command that unpacks it, for messages, and the function that opens it."""


class TextStream:
    """The bytes of a text file, unpacked, in UTF-8.

    A file that is cut or damaged raises `CorpusError` with the number of the first line that could not be read.
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
                    with opener(path) as unpacked:
                        head = unpacked.read(_HEAD_BYTES)
                    self._file = opener(path)
                    break
            stack.push(self._file)
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
    """A file in a wide encoding, as UTF-8. Half a surrogate pair becomes bytes that are not UTF-8."""

    def __init__(self, file: IO[bytes], encoding: str) -> None:
        self._text = io.TextIOWrapper(file, encoding, "surrogatepass", newline="\n")

    def read(self, num_chars: int) -> bytes:
        return self._text.read(num_chars).encode("utf-8", "surrogatepass")

    def readline(self) -> bytes:
        return self._text.readline().encode("utf-8", "surrogatepass")

    def close(self) -> None:
        self._text.close()


def wide_encoding(head: bytes) -> str:
    """Return the encoding of a text whose characters have two or four bytes; an empty string for any other."""
    if head.startswith((b"\xff\xfe\0\0", b"\0\0\xfe\xff")):
        return "utf-32"
    if head.startswith((b"\xff\xfe", b"\xfe\xff")):
        return "utf-16"
    zeros = [not byte for byte in head[:4]]  # without a mark: of the first two characters, which are ASCII as in {"
    little, big = zeros == [False, True, False, True], zeros == [True, False, True, False]
    return "utf-16-le" if little else "utf-16-be" if big else ""
