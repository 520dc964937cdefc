"""Describe all attempts of a run: what each rank did when, and where the time of all ranks went. Draws nothing."""

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from hpc.arrays import Floats
from hpc.report.spans import Span
from hpc.rundir.progress import Progress, overall

KINDS = {
    "convert": "finding, hashing, converting the model",
    "import": "importing libraries",
    "read": "reading and tokenizing",
    "load": "loading the model",
    "build": "building the kernel",
    "prefill": "prefill",
    "decode": "decode",
    "generate": "generating between steps (in the timelines: all of it)",
    "wait": "waiting for work",
    "idle": "idle at the end",
    "drain": "draining",
    "gather": "gather",
    "merge": "merge",
    "other": "other",
}
"""What the time of a rank goes to. An engine that does not tell prefill and decode apart has all in the rest."""

ENDINGS = ("running", "failed", "interrupted", "drained", "done")


@dataclass(frozen=True)
class RankHistory:
    """A rank's part in an attempt, as of its last event."""

    number: int
    progress: Progress
    points: tuple[tuple[float, int], ...]
    """When, in seconds of the clock, it had generated how many tokens."""
    spans: tuple[Span, ...]
    """They follow one another without a gap. Prefill and decode, which take turns at every step, are in "generate",
    and so are waits too short for a span."""

    @property
    def seconds(self) -> dict[str, float]:
        """Seconds by kind; prefill, decode and short waits apart."""
        found = dict.fromkeys(KINDS, 0.0)
        for span in self.spans:
            found[span.kind] += span.ended - span.began
        totals = self.progress.totals
        short = max(0.0, min(self.progress.waited_s - found["wait"], found["generate"]))
        found["wait"], found["generate"] = found["wait"] + short, found["generate"] - short
        steps = totals.prefill_s + totals.decode_s
        told = min(1.0, found["generate"] / steps) if steps else 0.0  # the last steps may have ended nothing
        found["prefill"], found["decode"] = told * totals.prefill_s, told * totals.decode_s
        found["generate"] = max(0.0, found["generate"] - found["prefill"] - found["decode"])
        return found


@dataclass(frozen=True)
class AttemptHistory:
    """One try at a run; times in seconds of the clock."""

    number: int
    ranks: tuple[RankHistory, ...]
    ending: str
    """One of `ENDINGS`."""
    slurm_job: str
    began: float
    ended: float
    """For an attempt that did not come to its end: when its latest event was written."""
    duplicates: int
    predicted: dict[str, Any]
    """What was expected of it, as its event has it; empty where nothing was."""
    planned: float
    """When, in seconds of the clock, it was known what to do; what was expected counts from there."""
    told: bool = True
    """Whether its ranks wrote spans; those of an earlier version wrote progress alone."""

    @property
    def limit_share(self) -> float | None:
        """Share of the time in steps that the device would have needed at its fastest; None where that is unknown.

        Of all steps together the longer of two times: for the operations of layers and head, attention
        apart, and for reading the weights once a step and what the rows that decode have stored.
        """
        size, speed = self.predicted.get("size"), self.predicted.get("speed")
        totals = self.total.totals
        spent = totals.prefill_s + totals.decode_s
        if not (size and speed and spent):
            return None
        least = 0.0
        for totals in (rank.progress.totals for rank in self.ranks):
            flops = size["token_flops"] * totals.step_tokens + size["choice_flops"] * totals.step_chosen
            read = size["weight_bytes"] * totals.steps + self.predicted["token_bytes"] * totals.step_kv
            least += max(flops / speed["flops_per_s"], read / speed["bytes_per_s"])
        return float(least / spent)

    @property
    def total(self) -> Progress:
        """The counts of all ranks."""
        return overall({rank.number: rank.progress for rank in self.ranks})

    @cached_property
    def seconds(self) -> dict[str, float]:
        """Rank-seconds by kind."""
        found = dict.fromkeys(KINDS, 0.0)
        for rank in self.ranks:
            for kind, seconds in rank.seconds.items():
                found[kind] += seconds
        return found

    @property
    def generating_s(self) -> float:
        """From the first prefill to the last completion over all ranks."""
        ended = max((rank.progress.ended for rank in self.ranks), default=0.0)
        return max(0.0, ended - self.total.began)

    def rates(self, edges: Floats) -> Floats:
        """Return the tokens/s of all ranks between moments, in seconds since the attempt began."""
        counts = np.zeros(len(edges))
        for rank in self.ranks:
            if rank.points:
                times, tokens = np.array(rank.points).T
                counts += np.interp(edges, times - self.began, tokens)
        return np.diff(counts) / np.diff(edges)


@dataclass(frozen=True)
class History:
    """A run, from its first attempt to its latest."""

    path: Path
    job: dict[str, Any]
    """What `job.json` says."""
    summary: dict[str, Any]
    """What `summary.json` says; empty before the end."""
    attempts: tuple[AttemptHistory, ...]
    damaged: int
    """Lines of events that could not be read."""

    @property
    def total(self) -> Progress:
        """The counts of all attempts."""
        return overall({attempt.number: attempt.total for attempt in self.attempts})

    @property
    def seconds(self) -> dict[str, float]:
        """Rank-seconds of all attempts by kind."""
        return {kind: sum(attempt.seconds[kind] for attempt in self.attempts) for kind in KINDS}
