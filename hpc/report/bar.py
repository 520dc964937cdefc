"""Draw the progress bar of a run in one process."""

import time
from collections.abc import Mapping

import rich.progress
from rich.console import Console

from hpc.rundir.progress import Progress, Work, describe, overall


class Bar:
    """The progress bar of a run in one process, on the terminal it was started from."""

    def __init__(self) -> None:
        self._progress = rich.progress.Progress(
            rich.progress.BarColumn(), rich.progress.TextColumn("{task.description}"), console=Console(stderr=True)
        )
        self._task = self._progress.add_task("", total=None)
        self._progress.start()

    def update(self, work: Work, ranks: Mapping[int, Progress], expected_end: float | None) -> None:
        """Show how far the run is."""
        total = overall(ranks)
        self._progress.update(
            self._task,
            total=work.rows,
            completed=work.done + work.refused + total.rows,
            description=describe(work, total, time.time(), expected_end),
        )

    def close(self) -> None:
        """Stop drawing."""
        self._progress.stop()
