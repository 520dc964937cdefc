"""Count the progress of a rank and of a run, and describe it in a line."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from typing import Any

from hpc.engine.steps import StepTotals

ESTIMATE_S, ESTIMATE_SHARE, ESTIMATE_ROWS = 10.0, 0.05, 3
"""Conditions for an estimate of the time left: seconds, share of the rows, number of rows. The first rows to end say
little, because the longest are begun first."""
MESSAGE_S = 2.0
"""Seconds between two messages of a rank to rank 0 about its progress."""


@dataclass
class Progress:
    """The progress of a rank in this attempt."""

    rows: int = 0
    """Rows answered, including those that share a completion."""
    errors: int = 0
    """Rows among them that ended in an engine error."""
    requests: int = 0
    prompt_tokens: int = 0
    generated_tokens: int = 0
    guessed_tokens: int = 0
    """Draft tokens that the engine proposed."""
    accepted_tokens: int = 0
    """Draft tokens that the model accepted."""
    totals: StepTotals = field(default_factory=StepTotals)
    """Totals over the engine's steps; zeros if it does not report steps."""
    load_s: float = 0.0
    gpu: str = ""
    """UUID of the GPU that computes, as torch says it."""
    busy_s: float = 0.0
    """Seconds from the first request to the last completion, without waiting for work."""
    waited_s: float = 0.0
    began: float = 0.0
    """Beginning and end of generating, in seconds of the clock; 0 before."""
    ended: float = 0.0
    engine: str = ""
    """Name of the engine, as in `--engine`."""

    def as_json(self) -> dict[str, Any]:
        """Return the figures for messages and events: flat, those of the steps among the others."""
        values: dict[str, Any] = {}
        for name, value in asdict(self).items():
            values |= value if name == "totals" else {name: value}
        return values

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> "Progress":
        """Return the progress of `as_json`. Of another version, missing figures are 0 and unknown ones are ignored."""
        own = {f.name: values[f.name] for f in fields(cls) if f.name in values and f.name != "totals"}
        return cls(**own, totals=StepTotals(**{f.name: values[f.name] for f in fields(StepTotals) if f.name in values}))


@dataclass(frozen=True)
class Work:
    """The rows of a run and the work left, known after reading."""

    rows: int
    refused: int
    done: int
    """Rows answered by earlier attempts."""
    requests: int
    """Requests to generate in this attempt."""
    duplicates: int
    """Rows that are answered by another row's completion."""


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
    """Return a line with the rows done, the rate and the time left of a run.

    The time left is estimated from its rows; before there are enough, from `expected_end`, the prediction,
    in seconds of the clock like `now`.
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
    """Return whether the rows done in `elapsed` seconds are enough to estimate the time of the rest."""
    return elapsed >= ESTIMATE_S and rows >= max(ESTIMATE_ROWS, ESTIMATE_SHARE * to_do)


def left(work: Work, total: Progress, now: float) -> str:
    """Return the last line of a drained attempt: rows done, rows left, and the time these would take."""
    done = work.done + work.refused + total.rows
    text = f"{done:,} rows done, {total.rows:,} of them in this attempt; {work.rows - done:,} left"
    elapsed = now - total.began if total.began else 0.0
    if _tells(total.rows, total.rows + work.rows - done, elapsed):
        text += f", about {duration(elapsed * (work.rows - done) / total.rows)} on these ranks"
    return text


def duration(seconds: float) -> str:
    """Return a duration for people: 41 s, 3 min 20 s, 2 h 05 min."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    return f"{whole // 3600} h {whole % 3600 // 60:02d} min"
