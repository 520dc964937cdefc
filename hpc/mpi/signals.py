"""Being told to stop: by a signal, or by another rank. Nothing is interrupted; the loops look here."""

import os
import signal
from types import FrameType

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2)
"""What Slurm, a batch system's epilogue or a person at the keyboard sends before it is too late."""


class Stop:
    """Whether this rank is to stop, and why."""

    def __init__(self) -> None:
        self.reason: str | None = None

    def request(self, reason: str) -> None:
        """Ask for a stop; the first reason stays."""
        self.reason = self.reason or reason

    def listen(self) -> None:
        """Take the signals from now on. A second SIGINT leaves at once."""
        for number in SIGNALS:
            signal.signal(number, self._handle)

    def _handle(self, number: int, frame: FrameType | None) -> None:  # noqa: ARG002
        if number == signal.SIGINT and self.reason:
            os._exit(128 + number)
        self.request(f"signal {signal.Signals(number).name}")
