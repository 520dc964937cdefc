"""Show progress on the terminal while a run generates: log lines, or a progress bar."""

import logging
import sys
import time
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

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


class Silent:
    """Shows nothing."""

    def update(self, work: Work, ranks: Mapping[int, Progress], expected_end: float | None) -> None:
        """Do nothing."""

    def close(self) -> None:
        """Do nothing."""


def open_bar() -> "Silent | Bar":
    """Return a bar where somebody looks at it, else what shows nothing."""
    return _bar() if _is_watched() else Silent()


def open_display(size: int) -> "Lines | Bar":
    """Return what shows how far a run of `size` ranks is: a bar for one process that is looked at, else lines."""
    if size == 1 and _is_watched():
        return _bar()
    return Lines(TERMINAL_S if sys.stderr.isatty() else FILE_S)


def in_notebook(modules: Mapping[str, Any] = sys.modules) -> bool:
    """Say whether this process, with these modules loaded, answers to a notebook: Jupyter's kernel, or Colab's."""
    shell = getattr(modules.get("IPython"), "get_ipython", lambda: None)()
    return type(shell).__name__ in ("ZMQInteractiveShell", "Shell")


def _is_watched() -> bool:
    return sys.stderr.isatty() or in_notebook()


def _bar() -> "Bar":
    from hpc.report.bar import Bar

    return Bar()
