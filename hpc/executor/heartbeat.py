"""What every rank does between two steps of its engine."""

import time
from collections.abc import Callable
from dataclasses import dataclass

from hpc.mpi.signals import Stop
from hpc.output.journal import FSYNC_S, JournalWriter
from hpc.rundir.events import Events
from hpc.rundir.progress import Progress


@dataclass(frozen=True)
class Heartbeat:
    """Deals with messages, saves what has ended and says how far a rank is; called at every step of its engine."""

    stop: Stop
    serve: Callable[[], None]
    """Deals with the messages that are there."""
    journal: JournalWriter
    events: Events
    progress: Progress
    report: Callable[[], None]
    """Says how far the rank is, or the run, to whom it concerns, as often as it should."""

    def __call__(self) -> bool:
        """Do what is due; return whether the rank is to stop."""
        self.serve()
        self.journal.sync(FSYNC_S)
        self.events.tick("generate", self.progress)
        self.report()
        return bool(self.stop.reason)


class Every:
    """Does something when it is called, but once in so many seconds at most."""

    def __init__(self, seconds: float, action: Callable[[], None]) -> None:
        self._seconds, self._action = seconds, action
        self._next = 0.0

    def __call__(self) -> None:
        """Do it if it is time."""
        if time.monotonic() >= self._next:
            self._next = time.monotonic() + self._seconds
            self._action()
