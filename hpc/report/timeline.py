"""History: all attempts of a run as their events tell it, and where the time of every rank went. Draws nothing."""

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, fields
from functools import cached_property
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

from hpc.arrays import Floats
from hpc.report.spans import Span, Spans
from hpc.rundir.directory import RunDirectory, attempt_and_rank
from hpc.rundir.lock import is_held
from hpc.rundir.progress import Progress, Work, overall

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

LEADING = ("begin", "read", "plan", "merge", "drained", "done")
"""Phases that rank 0 alone writes, and every job with a share of the rows."""

ENDINGS = ("running", "failed", "interrupted", "drained", "done")


@dataclass(frozen=True)
class RankHistory:
    """A rank's part in an attempt, as of its last event."""

    number: int
    progress: Progress
    points: tuple[tuple[float, int], ...]
    """When, in seconds of the clock, it had generated how many tokens."""
    spans: tuple[Span, ...]
    """They follow one another without a gap; prefill and decode, which take turns at every step, are in "generate"."""

    @property
    def seconds(self) -> dict[str, float]:
        """Seconds by kind, prefill and decode apart."""
        found = dict.fromkeys(KINDS, 0.0)
        for span in self.spans:
            found[span.kind] += span.ended - span.began
        totals = self.progress.totals
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

    @cached_property
    def generating_s(self) -> float:
        """From the first prefill to the last token over all ranks."""
        times = [span for rank in self.ranks for span in rank.spans if span.kind in ("generate", "wait")]
        return max((s.ended for s in times), default=0.0) - min((s.began for s in times), default=0.0)

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


@dataclass
class _Log:
    """What one event file says."""

    rank: int
    times: list[float] = field(default_factory=list)
    at: dict[str, float] = field(default_factory=dict)
    """When the rank first wrote of each phase."""
    begin: dict[str, Any] = field(default_factory=dict)
    predicted: dict[str, Any] = field(default_factory=dict)
    gathered_s: float = 0.0
    work: Work | None = None
    latest: dict[str, Any] = field(default_factory=dict)
    """The latest event with counts."""
    spent: list[Span] = field(default_factory=list)
    """What it says itself that it did for a while."""
    counts: list[tuple[float, float, int]] = field(default_factory=list)
    """When it had waited how long and generated how many tokens."""
    damaged: int = 0

    @cached_property
    def progress(self) -> Progress | None:
        """What the rank had done at the latest event; None if it had not begun to generate. For when all is read."""
        return Progress.from_json(self.latest) if self.latest else None

    @property
    def leads(self) -> bool:
        """Whether it is rank 0's, or that of a job with a share of the rows."""
        return self.rank == 0 or any(phase in LEADING for phase in self.at)

    def take(self, event: dict[str, Any]) -> None:
        """Take in an event; raise if it is none."""
        time, phase = float(event["time"]), str(event["phase"])
        if phase == "plan":
            self.work = Work(**{f.name: int(event[f.name]) for f in fields(Work)})
        elif phase in ("generate", "generated"):
            if event["began"]:
                self.counts.append((float(event["ended"]), float(event["waited_s"]), int(event["generated_tokens"])))
                self.latest = event
        elif phase == "begin":
            self.begin = event
        elif phase == "spent" and event["kind"] in KINDS:
            self.spent.append(Span(str(event["kind"]), float(event["began"]), float(event["ended"])))
        elif phase == "load" and "seconds" in event:
            self.predicted = event
        elif phase == "done":
            self.gathered_s = float(event.get("gathered_s", 0.0))
        self.times.append(time)
        self.at.setdefault(phase, time)


@dataclass
class _Crew:
    """The ranks of one job in an attempt: all of them, or the one of a share."""

    logs: list[_Log]
    """That of rank 0 or of the share first; those without events have nothing but a number."""
    directory: RunDirectory
    latest: bool
    took_s: float
    """How long the attempt took as its summary has it; 0 if unknown."""
    began: float = field(init=False)
    ended: float = field(init=False)
    ending: str = field(init=False)

    def __post_init__(self) -> None:
        self.ending = self._ending()
        at, times = self.leader.at, [time for log in self.logs for time in log.times]
        self.ended = at.get("done") or at.get("drained") or max(times)
        loads = [log.progress.began - log.progress.load_s for log in self.logs if log.progress]
        self.began = min([*times, *loads, *(span.began for span in self.leader.spent)])
        if "done" in at and self.took_s:
            self.began = min(self.began, self.ended - self.took_s)

    @property
    def leader(self) -> _Log:
        """Who tells the others what to do."""
        return self.logs[0]

    def _ending(self) -> str:
        leader = self.leader
        for ending in ("done", "drained"):
            if ending in leader.at:
                return ending
        done = sum(log.progress.requests for log in self.logs if log.progress)
        settled = "generated" in leader.at or (leader.work and not leader.work.requests)
        if settled and "merge" not in leader.at and leader.work and done == leader.work.requests:
            return "done"  # a share that leaves the merging to another says no more
        if not self.latest:
            return "interrupted"
        lock = f"lock-{leader.rank}"
        if is_held(self.directory.path, lock if leader.rank or (self.directory.path / lock).exists() else "lock"):
            return "running"
        return "failed" if self.directory.state == "failed" else "interrupted"

    def ranks(self) -> Iterable[RankHistory]:
        """Yield the ranks with what they did from the beginning to the end."""
        stops = {log.rank: self._stop(log, log.progress) for log in self.logs if log.progress}
        last = max(stops.values(), default=self.began)
        for log in self.logs:
            points = []
            if log.progress:
                points = sorted({(log.progress.began, 0), *((when, tokens) for when, _, tokens in log.counts)})
            spans = tuple(self._spans(log, stops.get(log.rank), last))
            yield RankHistory(log.rank, log.progress or Progress(), tuple(points), spans)

    def _stop(self, log: _Log, progress: Progress) -> float:
        """Return when a rank stopped generating: after its last token, or later if it was told to in the middle."""
        if "generated" not in log.at:
            return self.ended
        if self.ending == "drained":
            # Rank 0 writes it when all have stopped, the others when they do.
            told = min(other.at["generated"] for other in self.logs if "generated" in other.at)
            return max(progress.ended, told if log is self.leader else log.at["generated"])
        return progress.ended

    def _spans(self, log: _Log, stop: float | None, last: float) -> Iterable[Span]:
        """Yield what a rank did; `stop`, if it generated, is when it stopped, `last` when the last one did."""
        at, spans = self.leader.at, Spans(self.began)
        loading = log.progress.began - log.progress.load_s if log.progress else self.ended
        planned = min(at.get("plan", loading), self.ended)
        spans.add("other", min(at.get("read", planned), planned))
        spans.add("read", planned)
        if log.progress and stop is not None:
            spans.add("other", loading)
            spans.add("load", log.progress.began)
            for kind, until in _waits(log.progress, log.counts):
                spans.add(kind, min(until, self.ended))
            spans.add("generate", min(stop, self.ended))
            spans.add("drain" if self.ending == "drained" else "idle", min(last, self.ended))
        elif self.ending in ENDINGS[:3] and "merge" not in at and self.leader.work and self.leader.work.requests:
            spans.add("load", self.ended)  # a rank says nothing until its model is there
        spans.add("drain" if self.ending == "drained" and log.progress else "other", at.get("merge", self.ended))
        if "merge" in at:
            spans.add("gather", min(at["merge"] + self.leader.gathered_s, self.ended))
        spans.add("merge", self.ended)
        told = [span for span in self.leader.spent if log is self.leader or span.ended <= loading]  # the others wait
        return _told(spans.done, told if log is self.leader else [*told, *log.spent])


def _told(spans: Iterable[Span], told: Sequence[Span]) -> list[Span]:
    """Return spans with what a rank says itself in the place of what it was taken for, as far as that reaches."""
    for own in told:
        cut: list[Span] = []
        for span in spans:
            began, ended = max(span.began, own.began), min(span.ended, own.ended)
            parts = [
                (span.kind, span.began, min(began, span.ended)),
                (own.kind, began, ended),
                (span.kind, ended, span.ended),
            ]
            if began < ended and span.kind in ("other", "read", "load"):
                cut += [Span(*part) for part in parts if part[1] < part[2]]
            else:
                cut.append(span)
        spans = cut
    return list(spans)


def _waits(progress: Progress, counts: Sequence[tuple[float, float, int]]) -> list[tuple[str, float]]:
    """Return until when a rank waited and generated in turn, from its first prefill to its last token.

    How long it waited is known; when, only to within two events. A wait is noted after it, so what does
    not fit between two events was before them.
    """
    found: list[tuple[str, float]] = []
    moments = sorted({(progress.began, 0.0), *((when, waited) for when, waited, _ in counts)})
    left = 0.0
    for (since, before), (until, after) in reversed(list(pairwise(moments))):
        left += after - before
        waited = max(0.0, min(left, until - since))
        found += [("generate", until), ("wait", since + waited)]
        left -= waited
    return found[::-1]


def read(path: Path) -> History:
    """Read the history of a run; raise `Refusal` if the path is no run directory."""
    directory = RunDirectory(path)
    job = directory.recorded_job()
    summary = _read_summary(directory.summary)
    logs: dict[int, list[_Log]] = {}
    damaged = 0
    for (number, rank), file in sorted((attempt_and_rank(file), file) for file in (path / "events").glob("*.jsonl")):
        log = _read_log(file, rank)
        damaged += log.damaged
        if number and log.times:
            logs.setdefault(number, []).append(log)
    latest = {log.rank: number for number in sorted(logs) for log in logs[number] if log.leads}
    attempts = [_attempt(number, logs[number], directory, latest, summary) for number in sorted(logs)]
    return History(path, job, summary, tuple(attempts), damaged)


def _read_summary(path: Path) -> dict[str, Any]:
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return values if isinstance(values, dict) else {}


def _read_log(path: Path, rank: int) -> _Log:
    log = _Log(rank)
    *lines, rest = path.read_bytes().split(b"\n")
    for line in lines:
        try:
            log.take(json.loads(line))
        except (ValueError, TypeError, KeyError):
            log.damaged += 1
    log.damaged += bool(rest)  # half written: by a run that is still going on, or was killed
    return log


def _attempt(
    number: int, logs: list[_Log], directory: RunDirectory, latest: dict[int, int], summary: dict[str, Any]
) -> AttemptHistory:
    """Put together what the event files of an attempt say."""
    known = [entry for entry in summary.get("attempts", ()) if entry.get("attempt") == number]
    took_s = float(known[-1]["seconds"]["total"]) if known else 0.0
    leaders = [log for log in logs if log.leads]
    followers = [log for log in logs if not log.leads]
    if followers and not (leaders and leaders[0].rank == 0):
        leaders.insert(0, followers.pop(0))  # rank 0's file is gone
    crews = []
    for leader in leaders:
        own = [leader, *(followers if leader is leaders[0] else ())]
        size = int(leader.begin.get("ranks", 0))
        if known and len(leaders) == 1:
            size = max(size, int(known[-1]["ranks"]))
        silent = sorted(set(range(size)) - {log.rank for log in own}) if leader.rank == 0 else []
        is_latest = latest.get(leader.rank, number) <= number
        crews.append(_Crew([*own, *map(_Log, silent)], directory, is_latest, took_s))
    jobs = dict.fromkeys(str(log.begin["slurm_job"]) for log in leaders if log.begin.get("slurm_job"))
    return AttemptHistory(
        number,
        tuple(sorted((rank for crew in crews for rank in crew.ranks()), key=lambda rank: rank.number)),
        min((crew.ending for crew in crews), key=ENDINGS.index),
        ", ".join(jobs),
        min(crew.began for crew in crews),
        max(crew.ended for crew in crews),
        sum(log.work.duplicates for log in leaders if log.work),
        leaders[0].predicted,
        leaders[0].at.get("plan", leaders[0].times[0] if leaders[0].times else 0.0),
    )
