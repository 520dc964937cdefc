"""Write a rank's events: its progress every ten seconds, what happens once, and spans of what it does."""

import json
import time
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, TextIO

from hpc.rundir.progress import Progress

EVENT_S = 10.0
MIN_SPAN_S = 0.05
"""A shorter span is not written: nobody would see it, and a run has thousands of them."""
MIN_WAIT_SHARE = 1 / 256
"""A wait is written if it takes this share of the time since the first one: so a rank writes at most 2,500 in a day,
256 (1 + ln(86,400 s / 12.8 s)). The sum of all waits is in its progress."""
FOLLOW = "follow"
"""The kind of span in which a rank waits for rank 0's next message: what that time goes to, rank 0's spans say."""


class Events:
    """A rank's event file: its progress every `EVENT_S` seconds, more often at first, phases, and spans.

    Every line is flushed, so that a rank that is killed leaves all but its last line. A span is written
    when it begins, and ends where the next one begins: what a killed rank was doing is there, too.
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
        """Write that the rank does something of a kind of `hpc.report.timeline`, or follows, from `began` on.

        `began` is in seconds of the clock, now by default, and not before the beginning of the span before.
        """
        self._kind, self._waits_since = kind, None
        self.write("span", {"kind": kind, "began": round(time.time() if began is None else began, 3)})

    def within(self, spans: Iterable[tuple[str, float, float]]) -> None:
        """Write spans that have ended, each with its kind, beginning and end; the one that they were in goes on."""
        kind = self._kind
        for inner, began, ended in spans:
            if ended - began >= MIN_SPAN_S:
                self.span(inner, began)
                self.span(kind, ended)

    def wait(self, waiting: bool, now: float | None = None) -> None:
        """Note whether the engine has nothing to do; called whenever it asks. A wait of some length is a span."""
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
        """Write the progress if it is time."""
        now = time.monotonic()
        if now >= self._next:
            self.write(phase, progress.as_json())
            self._next = now + self._pause
            self._pause = min(2 * self._pause, EVENT_S)

    def close(self) -> None:
        """Close the file."""
        self._file.close()
