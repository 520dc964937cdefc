"""Record a request to stop, from a signal or another rank. Nothing is interrupted: loops check `Stop`."""

import os
import signal
from types import FrameType

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2)
"""Signals that ask for a stop: sent by Slurm, by the epilogue of a batch system, or from the keyboard."""


class Stop:
    """A request to stop, with its reason."""

    def __init__(self) -> None:
        self.reason: str | None = None

    def request(self, reason: str) -> None:
        """Ask for a stop; the first reason stays."""
        self.reason = self.reason or reason

    def listen(self) -> None:
        """Install the signal handlers. A second SIGINT exits at once."""
        for number in SIGNALS:
            signal.signal(number, self._handle)

    def _handle(self, number: int, frame: FrameType | None) -> None:  # noqa: ARG002
        if number == signal.SIGINT and self.reason:
            os._exit(128 + number)
        self.request(f"signal {signal.Signals(number).name}")
