"""Describe the attempts of a run: the spans of each rank, and the rank-seconds by kind. Draws nothing."""

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
"""Kinds of spans. With an engine that does not report steps, prefill and decode count as "generate"."""

ENDINGS = ("running", "failed", "interrupted", "drained", "done")


@dataclass(frozen=True)
class RankHistory:
    """A rank in an attempt, as of its last event."""

    number: int
    progress: Progress
    points: tuple[tuple[float, int], ...]
    """Times, in seconds of the clock, and the tokens generated until then."""
    spans: tuple[Span, ...]
    """They cover the attempt without a gap. Prefill and decode, which take turns at every step, are in "generate",
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
        told = min(1.0, found["generate"] / steps) if steps else 0.0  # steps that ended no sequence are not in it yet
        found["prefill"], found["decode"] = told * totals.prefill_s, told * totals.decode_s
        found["generate"] = max(0.0, found["generate"] - found["prefill"] - found["decode"])
        return found


@dataclass(frozen=True)
class AttemptHistory:
    """One attempt; times in seconds of the clock."""

    number: int
    ranks: tuple[RankHistory, ...]
    ending: str
    """One of `ENDINGS`."""
    slurm_job: str
    began: float
    ended: float
    """For an unfinished attempt the time of its latest event."""
    duplicates: int
    predicted: dict[str, Any]
    """The prediction, as its event has it; empty if there was none."""
    planned: float
    """When, in seconds of the clock, the plan was made; the prediction counts from then."""
    told: bool = True
    """Whether its ranks wrote spans; an earlier version wrote progress alone."""

    @property
    def limit_share(self) -> float | None:
        """Share of the time in steps that the device would need at its fastest; None if that is unknown.

        That time is the longer of two, over all steps: for the operations of layers and head, without
        attention, and for reading the weights once a step and the KV cache of the rows that decode.
        """
        size, speed = self.predicted.get("size"), self.predicted.get("speed")
        totals = self.total.totals
        spent = totals.prefill_s + totals.decode_s
        if not (size and speed and spent):
            return None
        min_s = 0.0
        for totals in (rank.progress.totals for rank in self.ranks):
            flops = size["token_flops"] * totals.step_tokens + size["choice_flops"] * totals.step_chosen
            read = size["weight_bytes"] * totals.steps + self.predicted["token_bytes"] * totals.step_kv
            min_s += max(flops / speed["flops_per_s"], read / speed["bytes_per_s"])
        return float(min_s / spent)

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
