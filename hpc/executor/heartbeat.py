"""The heartbeat of a rank: messages, journal, events and progress, between two steps of its engine."""

import time
from collections.abc import Callable
from dataclasses import dataclass

from hpc.mpi.signals import Stop
from hpc.output.journal import FSYNC_S, JournalWriter
from hpc.rundir.events import Events
from hpc.rundir.progress import Progress


@dataclass(frozen=True)
class Heartbeat:
    """Handles messages, syncs the journal and reports progress; called at every step of the engine."""

    stop: Stop
    serve: Callable[[], None]
    """Handles the messages that have come."""
    journal: JournalWriter
    events: Events
    progress: Progress
    report: Callable[[], None]
    """Reports the progress of this rank to rank 0, or on rank 0 that of the run to the display."""

    def __call__(self) -> bool:
        """Do all of it; return whether the rank is to stop."""
        self.serve()
        self.journal.sync(FSYNC_S)
        self.events.tick("generate", self.progress)
        self.report()
        return bool(self.stop.reason)


class Every:
    """Limits an action to once in `seconds`, however often it is called."""

    def __init__(self, seconds: float, action: Callable[[], None]) -> None:
        self._seconds, self._action = seconds, action
        self._next = 0.0

    def __call__(self) -> None:
        """Do the action if the last time is long enough ago."""
        if time.monotonic() >= self._next:
            self._next = time.monotonic() + self._seconds
            self._action()
