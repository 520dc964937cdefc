"""Show progress on the terminal while a run generates: log lines, or a progress bar."""

import logging
import sys
import time
from collections.abc import Mapping
from typing import TYPE_CHECKING

from hpc.rundir.progress import Progress, Work, describe, overall

if TYPE_CHECKING:
    from hpc.report.bar import Bar

LOGGER = logging.getLogger(__name__)

TERMINAL_S, FILE_S = 5.0, 30.0
"""Seconds between two lines on a terminal, and in a file, where they stay."""


class Lines:
    """Logs a line every few seconds."""

    def __init__(self, pause_s: float) -> None:
        self._pause_s = pause_s
        self._next = time.monotonic() + pause_s

    def update(self, work: Work, ranks: Mapping[int, Progress], expected_end: float | None) -> None:
        """Log the progress of the run if the pause is over."""
        now = time.monotonic()
        if now >= self._next:
            LOGGER.info("%s", describe(work, overall(ranks), time.time(), expected_end))
            self._next = now + self._pause_s

    def close(self) -> None:
        """Do nothing: the lines stay."""


def open_display(size: int) -> "Lines | Bar":
    """Return the display of a run of `size` ranks: a bar for one process on a terminal, else lines."""
    terminal = sys.stderr.isatty()
    if size == 1 and terminal:
        from hpc.report.bar import Bar

        return Bar()
    return Lines(TERMINAL_S if terminal else FILE_S)
