"""Write a rank's events: aggregates every ten seconds and what happens once."""

import json
import time
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, TextIO

from hpc.rundir.progress import LEAST_SPENT_S, Progress

EVENT_S = 10.0


class Events:
    """A rank's event file: its progress every `EVENT_S` seconds, more often at first, and every change of phase."""

    def __init__(self, path: Path) -> None:
        self._file: TextIO = open(path, "a", encoding="utf-8")  # noqa: SIM115  (closed by close)
        self._pause, self._next = 1.0, 0.0

    def write(self, phase: str, values: Mapping[str, Any]) -> None:
        """Write one event."""
        self._file.write(json.dumps({"time": round(time.time(), 3), "phase": phase, **values}) + "\n")
        self._file.flush()

    def spent(self, spans: Iterable[tuple[str, float, float]]) -> None:
        """Write what the time went to: kinds of `hpc.report.timeline`, from when to when in seconds of the clock."""
        for kind, began, ended in spans:
            if ended - began >= LEAST_SPENT_S:
                self.write("spent", {"kind": kind, "began": round(began, 3), "ended": round(ended, 3)})

    def tick(self, phase: str, progress: Progress) -> None:
        """Write the progress if it is time."""
        now = time.monotonic()
        if now >= self._next:
            self.write(phase, progress.as_json())
            self._next = now + self._pause
            self._pause = min(2 * self._pause, EVENT_S)

    def close(self) -> None:
        """Close the file."""
        self._file.close()
