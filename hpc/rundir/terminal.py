"""Make standard output and error tolerant: a failed write drops the text and does not end the process.

The reader may leave (`| head`), the disk below a log may fill up, a stream may be closed or take ASCII alone.
"""

import errno
import io
import os
import select
import sys
from typing import Any, TextIO


class _Raw(io.RawIOBase):
    """A file descriptor that accepts every write; text that cannot be written is lost, and `error` has the reason."""

    def __init__(self, fd: int, name: str) -> None:
        self.name = name
        self.error: OSError | None = None
        self._fd = fd

    def writable(self) -> bool:
        """Return True."""
        return True

    def fileno(self) -> int:
        """Return the number of the file descriptor."""
        return self._fd

    def isatty(self) -> bool:
        """Return whether it is a terminal."""
        return os.isatty(self._fd)

    def write(self, data: Any) -> int:
        """Write bytes; return their number, also if they are lost."""
        while True:
            try:
                return os.write(self._fd, data)
            except BlockingIOError:  # another process made the pipe non-blocking
                select.select([], [self._fd], [])
            except OSError as error:
                self.error = self.error or error
                return memoryview(data).nbytes


def prepare() -> None:
    """Replace standard output and error by streams that accept every character and every write."""
    for fd in (0, 1, 2):
        try:
            os.fstat(fd)
        except OSError:  # closed: the next file that is opened, a journal perhaps, would get all that is printed
            os.set_inheritable(os.open(os.devnull, os.O_RDWR), True)
    sys.stdout = _tolerant(sys.stdout, "<stdout>")
    sys.stderr = _tolerant(sys.stderr, "<stderr>")


def _tolerant(stream: TextIO | None, name: str) -> TextIO:
    encoding, by_lines = "utf-8", False
    if stream is None:
        fd = os.open(os.devnull, os.O_WRONLY)
    else:
        try:
            fd, encoding = stream.fileno(), stream.encoding or encoding
            by_lines = stream.isatty()
        except (OSError, ValueError, AttributeError):  # no file behind it, as in a notebook
            return stream
        try:
            stream.flush()
        except OSError:
            os.dup2(os.open(os.devnull, os.O_WRONLY), fd)  # or the interpreter would try again when it ends
    buffer = io.BufferedWriter(_Raw(fd, name))
    return io.TextIOWrapper(buffer, encoding, "replace", line_buffering=by_lines or name == "<stderr>")


def failure(stream: TextIO) -> OSError | None:
    """Return the error of a failed write to a stream of `prepare`; None if there was none."""
    try:
        stream.flush()
    except (OSError, ValueError):  # not a stream of `prepare`
        return None
    error = getattr(getattr(getattr(stream, "buffer", None), "raw", None), "error", None)
    return error if isinstance(error, OSError) else None


def loss() -> OSError | None:
    """Return the error by which output was lost; None if its reader has left, who wants no more."""
    error = failure(sys.stdout)
    return None if error is None or error.errno == errno.EPIPE else error
