"""How far a rank is, and the whole run: counters, the event file that `status` reads, the lines that `run` prints."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from typing import Any

from hpc.engine.steps import StepTotals

ESTIMATE_S, ESTIMATE_SHARE, ESTIMATE_ROWS = 10.0, 0.05, 3
"""After so many seconds, and so many of the rows, the rest of a run can be told from its beginning: the first rows to
end say little, as those that take longest are begun first."""
MESSAGE_S = 2.0


@dataclass
class Progress:
    """What a rank has done in this attempt."""

    rows: int = 0
    """Rows answered, those that share a completion too."""
    errors: int = 0
    """Rows among them that ended in an engine error."""
    requests: int = 0
    prompt_tokens: int = 0
    generated_tokens: int = 0
    guessed_tokens: int = 0
    """Tokens that an engine guessed, to compute several of a row at once."""
    accepted_tokens: int = 0
    """Those among them that the model chose."""
    totals: StepTotals = field(default_factory=StepTotals)
    """What the engine's steps computed together, where it tells."""
    load_s: float = 0.0
    gpu: str = ""
    """UUID of the GPU that computes, as torch says it."""
    busy_s: float = 0.0
    """From the first request until the last completion, less the waiting for work."""
    waited_s: float = 0.0
    began: float = 0.0
    """When generation began and ended, in seconds of the clock; 0 while it has not."""
    ended: float = 0.0
    engine: str = ""
    """What generates, by the name of its flag."""

    def as_json(self) -> dict[str, Any]:
        """Return the figures as messages and events have them: flat, those of the steps among the others."""
        values: dict[str, Any] = {}
        for name, value in asdict(self).items():
            values |= value if name == "totals" else {name: value}
        return values

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> "Progress":
        """Return the progress that `as_json` gave; what an event of another version lacks is 0, and more is ignored."""
        own = {f.name: values[f.name] for f in fields(cls) if f.name in values and f.name != "totals"}
        return cls(**own, totals=StepTotals(**{f.name: values[f.name] for f in fields(StepTotals) if f.name in values}))


@dataclass(frozen=True)
class Work:
    """What there is to do, as known after reading."""

    rows: int
    refused: int
    done: int
    """Rows answered by earlier attempts."""
    requests: int
    """Completions to be generated in this attempt."""
    duplicates: int
    """Rows that another row's completion answers."""


def overall(ranks: Mapping[int, Progress]) -> Progress:
    """Add up the progress of ranks."""
    total = Progress()
    for progress in ranks.values():
        for counted in fields(Progress):
            if counted.type is int:  # times, names and the rest are each rank's own
                setattr(total, counted.name, getattr(total, counted.name) + getattr(progress, counted.name))
        total.totals += progress.totals
    started = [progress.began for progress in ranks.values() if progress.began]
    total.began = min(started, default=0.0)
    return total


def describe(work: Work, total: Progress, now: float, expected_end: float | None = None) -> str:
    """Return the line that says how far a run is, at what rate, and when it will be over.

    Until its own rows tell that, what was predicted does: `expected_end`, in seconds of the clock like `now`.
    """
    done = work.done + work.refused + total.rows
    text = f"{done:,} of {work.rows:,} rows ({done / work.rows:.0%})"
    elapsed = now - total.began if total.began else 0.0
    if elapsed > 0 and total.generated_tokens:
        text += f", {total.generated_tokens / elapsed:,.0f} tokens/s"
    to_do = work.rows - work.done - work.refused
    if 0 < total.rows < to_do and _tells(total.rows, to_do, elapsed):
        text += f", about {duration(elapsed * (to_do - total.rows) / total.rows)} left"
    elif expected_end is not None and total.rows < to_do and now < expected_end:
        text += f", {duration(expected_end - now)} left as predicted"
    return text


def _tells(rows: int, to_do: int, elapsed: float) -> bool:
    """Say whether so many rows in so many seconds tell how long the rest of those that were to do will take."""
    return elapsed >= ESTIMATE_S and rows >= max(ESTIMATE_ROWS, ESTIMATE_SHARE * to_do)


def left(work: Work, total: Progress, now: float) -> str:
    """Return the line with which an attempt ends before the end: rows done and left, and how long they would take."""
    done = work.done + work.refused + total.rows
    text = f"{done:,} rows done, {total.rows:,} of them in this attempt; {work.rows - done:,} left"
    elapsed = now - total.began if total.began else 0.0
    if _tells(total.rows, total.rows + work.rows - done, elapsed):
        text += f", about {duration(elapsed * (work.rows - done) / total.rows)} on these ranks"
    return text


def duration(seconds: float) -> str:
    """Write seconds for people: 41 s, 3 min 20 s, 2 h 05 min."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    return f"{whole // 3600} h {whole % 3600 // 60:02d} min"
