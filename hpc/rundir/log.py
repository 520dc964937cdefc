"""One line format for everything a run says: `12:00:01 [rank/size] message`."""

import contextlib
import logging
import sys
from collections.abc import Iterator
from pathlib import Path

from hpc.rundir import terminal

LOGGER = logging.getLogger("hpc")
"""Above those of all modules, which are named after them."""


class _Terminal(logging.Handler):
    """Write to the current `sys.stderr`, whatever it is when the line comes; nobody may be there to read it."""

    def emit(self, record: logging.LogRecord) -> None:
        with contextlib.suppress(OSError, ValueError):
            sys.stderr.write(self.format(record) + "\n")
            sys.stderr.flush()
        note_lost()


class _File(logging.FileHandler):
    """Write to a file; where that cannot be, the terminal is told once. What must be on the disk says so itself."""

    told = False
    noted = False
    """Whether it has the line that the terminal is lost."""

    def handleError(self, record: logging.LogRecord) -> None:  # noqa: ARG002, N802  (the signature of logging)
        error = sys.exc_info()[1]
        if not self.told:
            self.told = True
            with contextlib.suppress(OSError, ValueError):
                sys.stderr.write(f"scattergen: cannot write {self.baseFilename}: {error}; its lines are lost\n")


def configure(rank: int, size: int, path: Path | None = None) -> None:
    """Send all log lines of this rank to the file `path`, and rank 0's from the level INFO to the terminal as well.

    Lines of other ranks reach the terminal from the level WARNING. Called again, it replaces what
    an earlier call set up.
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
    """Write into the log file, once, that the terminal takes no more; the log goes on."""
    files = [handler for handler in LOGGER.handlers if isinstance(handler, _File) and not handler.noted]
    error = terminal.failure(sys.stderr) or terminal.failure(sys.stdout) if files else None
    if error is None:
        return
    for handler in files:
        handler.noted = True
    LOGGER.warning("the terminal, or what reads it, takes no more (%s); the run goes on, and so does this log", error)
