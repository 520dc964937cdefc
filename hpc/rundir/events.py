"""Write the events of a rank: progress every ten seconds, phases, and spans of its activities."""

import json
import time
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, TextIO

from hpc.rundir.progress import Progress

EVENT_S = 10.0
"""Seconds between two lines of progress: a day makes 8,640, some 4 MB."""
MIN_SPAN_S = 0.05
"""Shorter spans are not written: they are too short to see, and a run has thousands."""
MIN_WAIT_SHARE = 1 / 256
"""Waits are written from this share of the time since the first wait on, so at most 256 (1 + ln(86,400 s / 12.8 s)) =
2,500 in a day. The sum of all waits is in the progress."""
FOLLOW = "follow"
"""The kind of span in which a rank waits for messages of rank 0, whose own spans give the reason."""


class Events:
    """The event file of a rank: progress every `EVENT_S` seconds, at first more often, phases, and spans.

    Each line is flushed, so that a killed rank loses at most its last line. A span is written when it
    begins, and lasts until the next one begins, so that the file has the span in which a rank was killed.
    """

    def __init__(self, path: Path) -> None:
        self._file: TextIO = open(path, "a", encoding="utf-8")  # noqa: SIM115  (closed by close)
        self._pause, self._next = 1.0, 0.0
        self._kind = ""
        self._first_wait: float | None = None
        self._waits_since: float | None = None

    def write(self, phase: str, values: Mapping[str, Any]) -> None:
        """Write one event."""
        self._file.write(json.dumps({"time": round(time.time(), 3), "phase": phase, **values}) + "\n")
        self._file.flush()

    def span(self, kind: str, began: float | None = None) -> None:
        """Write the beginning of a span: a kind of `hpc.report.timeline`, or `FOLLOW`.

        `began` is in seconds of the clock, by default now, and not before the beginning of the last span.
        """
        self._kind, self._waits_since = kind, None
        self.write("span", {"kind": kind, "began": round(time.time() if began is None else began, 3)})

    def within(self, spans: Iterable[tuple[str, float, float]]) -> None:
        """Write finished spans (kind, beginning, end) that lie within the current one, which then goes on."""
        kind = self._kind
        for inner, began, ended in spans:
            if ended - began >= MIN_SPAN_S:
                self.span(inner, began)
                self.span(kind, ended)

    def wait(self, waiting: bool, now: float | None = None) -> None:
        """Note, at each pull of the engine, whether it got nothing and must wait; a long wait becomes a span."""
        now = time.time() if now is None else now
        if not waiting:
            if self._kind == "wait":
                self.span("generate", now)
            self._waits_since = None
        elif self._kind == "generate":
            if self._waits_since is None:
                self._waits_since = now
            if self._first_wait is None:
                self._first_wait = now
            if now - self._waits_since >= max(MIN_SPAN_S, MIN_WAIT_SHARE * (now - self._first_wait)):
                self.span("wait", self._waits_since)

    def tick(self, phase: str, progress: Progress) -> None:
        """Write the progress if the pause is over."""
        now = time.monotonic()
        if now >= self._next:
            self.write(phase, progress.as_json())
            self._next = now + self._pause
            self._pause = min(2 * self._pause, EVENT_S)

    def close(self) -> None:
        """Close the file."""
        self._file.close()
