"""Standard output and error: what cannot be written there is dropped, and ends nothing.

Whoever reads may leave (`| head`), the disk below a log may fill up, a stream may be closed or take ASCII alone.
"""

import errno
import io
import os
import select
import sys
from typing import Any, TextIO


class _Raw(io.RawIOBase):
    """A file descriptor that takes everything; what it does not write is gone, and `error` says why."""

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
        """Return whether somebody may be looking."""
        return os.isatty(self._fd)

    def write(self, data: Any) -> int:
        """Write bytes; return how many were taken."""
        while True:
            try:
                return os.write(self._fd, data)
            except BlockingIOError:  # a pipe that another process has made so
                select.select([], [self._fd], [])
            except OSError as error:
                self.error = self.error or error
                return memoryview(data).nbytes


def prepare() -> None:
    """Make standard output and error take every character and every write, whatever becomes of them."""
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
    """Return why something could not be written to a stream that `prepare` has made; None if all was."""
    try:
        stream.flush()
    except (OSError, ValueError):  # none of those
        return None
    error = getattr(getattr(getattr(stream, "buffer", None), "raw", None), "error", None)
    return error if isinstance(error, OSError) else None


def loss() -> OSError | None:
    """Return why output is lost that somebody may still want; a reader that has left has had enough."""
    error = failure(sys.stdout)
    return None if error is None or error.errno == errno.EPIPE else error
