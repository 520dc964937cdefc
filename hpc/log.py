"""One line format for everything a run says: `12:00:01 [rank/size] message`."""

import logging
import sys
from pathlib import Path

LOGGER = logging.getLogger("hpc")


class _Terminal(logging.Handler):
    """Write to the current `sys.stderr`, whatever it is when the line comes."""

    def emit(self, record: logging.LogRecord) -> None:
        sys.stderr.write(self.format(record) + "\n")
        sys.stderr.flush()


def configure(rank: int, size: int, path: Path | None = None) -> None:
    """Send all log lines of this rank to the file `path`, and rank 0's from the level INFO to the terminal as well.

    Lines of other ranks reach the terminal from the level WARNING. Called again, it replaces what
    an earlier call set up.
    """
    for handler in list(LOGGER.handlers):
        LOGGER.removeHandler(handler)
        handler.close()
    line = logging.Formatter(f"%(asctime)s [{rank}/{size}] %(message)s", datefmt="%H:%M:%S")
    terminal = _Terminal(logging.INFO if rank == 0 else logging.WARNING)
    handlers: list[logging.Handler] = [terminal]
    if path is not None:
        handlers.append(logging.FileHandler(path, encoding="utf-8"))
    for handler in handlers:
        handler.setFormatter(line)
        LOGGER.addHandler(handler)
    LOGGER.setLevel(logging.DEBUG)
    LOGGER.propagate = False
