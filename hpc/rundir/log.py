"""Log to the terminal and to a file of each rank, in lines `12:00:01 [rank/size] message`."""

import contextlib
import logging
import sys
from collections.abc import Iterator
from pathlib import Path

from hpc.rundir import terminal

LOGGER = logging.getLogger("hpc")
"""Parent of the loggers of all modules."""


class _Terminal(logging.Handler):
    """Write to `sys.stderr` as it is at that time; ignore that nobody reads it."""

    def emit(self, record: logging.LogRecord) -> None:
        with contextlib.suppress(OSError, ValueError):
            sys.stderr.write(self.format(record) + "\n")
            sys.stderr.flush()
        note_lost()


class _File(logging.FileHandler):
    """Write to a file; on the first failure tell the terminal. Losing log lines is no fault."""

    told = False
    noted = False
    """Whether the line about the lost terminal is written."""

    def handleError(self, record: logging.LogRecord) -> None:  # noqa: ARG002, N802  (the signature of logging)
        error = sys.exc_info()[1]
        if not self.told:
            self.told = True
            with contextlib.suppress(OSError, ValueError):
                sys.stderr.write(f"scattergen: cannot write {self.baseFilename}: {error}; its lines are lost\n")


def configure(rank: int, size: int, path: Path | None = None) -> None:
    """Log this rank to the file `path`, and to the terminal from INFO on rank 0, from WARNING on other ranks.

    A later call replaces the handlers of an earlier one.
    """
    for handler in list(LOGGER.handlers):
        LOGGER.removeHandler(handler)
        with contextlib.suppress(OSError):  # a full disk
            handler.close()
    line = logging.Formatter(f"%(asctime)s [{rank}/{size}] %(message)s", datefmt="%H:%M:%S")
    handlers: list[logging.Handler] = [_Terminal(logging.INFO if rank == 0 else logging.WARNING)]
    if path is not None:
        handlers.append(_File(path, encoding="utf-8", errors="backslashreplace"))
    for handler in handlers:
        handler.setFormatter(line)
        LOGGER.addHandler(handler)
    LOGGER.setLevel(logging.DEBUG)
    LOGGER.propagate = False
    note_lost()


@contextlib.contextmanager
def restoring() -> Iterator[None]:
    """Let `configure` be called within, and restore handlers, level and propagation at the end."""
    handlers, level, propagates = LOGGER.handlers, LOGGER.level, LOGGER.propagate
    LOGGER.handlers = []  # not closed: they are somebody else's
    try:
        yield
    finally:
        for handler in LOGGER.handlers:
            with contextlib.suppress(OSError):
                handler.close()
        LOGGER.handlers, LOGGER.propagate = handlers, propagates
        LOGGER.setLevel(level)


def note_lost() -> None:
    """Log once, in the file, that the terminal cannot be written any more."""
    files = [handler for handler in LOGGER.handlers if isinstance(handler, _File) and not handler.noted]
    error = terminal.failure(sys.stderr) or terminal.failure(sys.stdout) if files else None
    if error is None:
        return
    for handler in files:
        handler.noted = True
    LOGGER.warning("the terminal, or what reads it, takes no more (%s); the run goes on, and so does this log", error)
