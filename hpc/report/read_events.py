"""Read the event files of a run into its history."""

import json
from collections.abc import Iterable
from dataclasses import dataclass, field, fields
from functools import cached_property
from pathlib import Path
from typing import Any

from hpc.report.spans import Span, chain, followed
from hpc.report.timeline import ENDINGS, KINDS, AttemptHistory, History, RankHistory
from hpc.rundir.directory import RunDirectory, attempt_and_rank
from hpc.rundir.events import FOLLOW
from hpc.rundir.lock import is_held
from hpc.rundir.progress import Progress, Work

LEADING = ("begin", "read", "plan", "merge", "drained", "done")
"""Phases that only rank 0 writes, or the job of a share."""


@dataclass
class _Log:
    """The contents of one event file."""

    rank: int
    times: list[float] = field(default_factory=list)
    at: dict[str, float] = field(default_factory=dict)
    """When the rank first wrote of each phase."""
    begin: dict[str, Any] = field(default_factory=dict)
    predicted: dict[str, Any] = field(default_factory=dict)
    work: Work | None = None
    latest: dict[str, Any] = field(default_factory=dict)
    """The latest event with counts."""
    begun: list[tuple[str, float]] = field(default_factory=list)
    """Kind and beginning of each span."""
    counts: list[tuple[float, int]] = field(default_factory=list)
    """Times and the tokens generated until then."""
    damaged: int = 0

    @cached_property
    def progress(self) -> Progress | None:
        """The latest progress; None if the rank had not begun to generate. Cached: ask when the file is read."""
        return Progress.from_json(self.latest) if self.latest else None

    @property
    def leads(self) -> bool:
        """Whether it is the file of rank 0, or of the job of a share."""
        return self.rank == 0 or any(phase in LEADING for phase in self.at)

    def take(self, event: dict[str, Any]) -> None:
        """Add an event; raise `ValueError`, `TypeError` or `KeyError` if it is none."""
        time, phase = float(event["time"]), str(event["phase"])
        if phase == "span":
            kind = str(event["kind"])
            self.begun.append((kind if kind in (*KINDS, FOLLOW) else "other", float(event["began"])))
        elif phase == "plan":
            self.work = Work(**{f.name: int(event[f.name]) for f in fields(Work)})
        elif phase in ("generate", "generated"):
            if event["began"]:
                self.counts.append((float(event["ended"]), int(event["generated_tokens"])))
                self.latest = event
        elif phase == "begin":
            self.begin = event
        elif phase == "load" and "seconds" in event:
            self.predicted = event
        self.times.append(time)
        self.at.setdefault(phase, time)

    def spans(self, began: float, ended: float) -> list[Span]:
        """Return its spans between two times.

        An earlier version wrote no spans: loading and generating are known from its counts.
        """
        begun = self.begun
        if not begun and (progress := self.progress):
            begun = [
                ("load", progress.began - progress.load_s), ("generate", progress.began), ("other", progress.ended)
            ]  # fmt: skip
        return chain(begun, began, ended, FOLLOW if self.begun or not self.times else "other")


@dataclass
class _Crew:
    """The ranks of one job in an attempt: all of them, or the one of a share."""

    logs: list[_Log]
    """The file of rank 0, or of the share, comes first; ranks without a file have a number alone."""
    directory: RunDirectory
    latest: bool
    began: float = field(init=False)
    ended: float = field(init=False)
    ending: str = field(init=False)

    def __post_init__(self) -> None:
        self.ending = self._ending()
        at, times = self.leader.at, [time for log in self.logs for time in log.times]
        self.ended = at.get("done") or at.get("drained") or max(times)
        loads = [log.progress.began - log.progress.load_s for log in self.logs if log.progress]
        self.began = min([*times, *loads, *(began for _, began in self.leader.begun[:1])])

    @property
    def leader(self) -> _Log:
        """The file of rank 0, or of the share."""
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
        """Yield the ranks with their spans over the whole attempt."""
        leading = [
            Span("other", span.began, span.ended) if span.kind == FOLLOW else span
            for span in self.leader.spans(self.began, self.ended)
        ]
        for log in self.logs:
            points = {(log.progress.began, 0), *log.counts} if log.progress else ()
            spans = leading if log is self.leader else followed(log.spans(self.began, self.ended), leading)
            yield RankHistory(log.rank, log.progress or Progress(), tuple(sorted(points)), tuple(spans))


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
    attempts = [_attempt(number, logs[number], directory, latest) for number in sorted(logs)]
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


def _attempt(number: int, logs: list[_Log], directory: RunDirectory, latest: dict[int, int]) -> AttemptHistory:
    """Make an attempt of its event files."""
    leaders = [log for log in logs if log.leads]
    followers = [log for log in logs if not log.leads]
    if followers and not (leaders and leaders[0].rank == 0):
        leaders.insert(0, followers.pop(0))  # rank 0's file is gone
    crews = []
    for leader in leaders:
        own = [leader, *(followers if leader is leaders[0] else ())]
        size = int(leader.begin.get("ranks", 0))
        silent = sorted(set(range(size)) - {log.rank for log in own}) if leader.rank == 0 else []
        crews.append(_Crew([*own, *map(_Log, silent)], directory, latest.get(leader.rank, number) <= number))
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
        any(log.begun for log in logs),
    )
