"""Record a request to stop, from a signal or another rank. Nothing is interrupted: loops check `Stop`."""

import contextlib
import os
import signal
import threading
from collections.abc import Iterator
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

    @contextlib.contextmanager
    def listening(self, *numbers: int) -> Iterator[None]:
        """Handle signals within, and restore the earlier handlers; a second SIGINT raises `KeyboardInterrupt`.

        In a thread other than the main one, which cannot set handlers, nothing changes.
        """
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        before = {number: signal.signal(number, self._handle_or_raise) for number in numbers}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, signal.SIG_DFL if handler is None else handler)

    @property
    def interrupted(self) -> bool:
        """Whether SIGINT, as of Ctrl-C, was the reason to stop."""
        return self.reason == _reason(signal.SIGINT)

    def _handle_or_raise(self, number: int, frame: FrameType | None) -> None:  # noqa: ARG002
        if number == signal.SIGINT and self.reason:
            raise KeyboardInterrupt
        self.request(_reason(number))

    def _handle(self, number: int, frame: FrameType | None) -> None:  # noqa: ARG002
        if number == signal.SIGINT and self.reason:
            os._exit(128 + number)
        self.request(_reason(number))


def _reason(number: int) -> str:
    return f"signal {signal.Signals(number).name}"
