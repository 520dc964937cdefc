"""Make the tables of a report, for the terminal and for the page."""

import time
from collections.abc import Sequence
from dataclasses import dataclass

from hpc.report.contents import Contents
from hpc.report.timeline import KINDS, AttemptHistory, History, RankHistory
from hpc.rundir.progress import duration

SHOWN_RANKS = 64


@dataclass(frozen=True)
class Table:
    """A table of the terminal and of the page."""

    title: str
    heads: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]


def attempts_table(run: History) -> Table:
    """Return a table of attempts: time, ranks, rows, tokens, ending."""
    heads = ("attempt", "began", "took", "ranks", "rows", "tokens", "tokens/s", "ended", "Slurm job")
    rows = [
        (
            str(attempt.number), time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(attempt.began)),
            show_time(attempt.ended - attempt.began), f"{len(attempt.ranks):,}", f"{attempt.total.rows:,}",
            f"{attempt.total.generated_tokens:,}", _figure(_rate([attempt])), attempt.ending, attempt.slurm_job or "-",
        )
        for attempt in run.attempts
    ]  # fmt: skip
    if len(rows) > 1:
        took = sum(attempt.ended - attempt.began for attempt in run.attempts)
        total = run.total
        rows.append(("all", "", show_time(took), "", f"{total.rows:,}", f"{total.generated_tokens:,}",
                     _figure(_rate(run.attempts)), "", ""))  # fmt: skip
    return Table("Attempts", heads, tuple(rows))


def time_table(run: History) -> Table:
    """Return a table of the rank-seconds of each attempt by kind."""
    listed = [(str(attempt.number), attempt.seconds) for attempt in run.attempts]
    if len(listed) > 1:
        listed.append(("all", run.seconds))
    rows = [(name, *map(_figure, seconds.values()), _figure(sum(seconds.values()))) for name, seconds in listed]
    whole = sum(run.seconds.values())
    if whole:
        rows.append(("share", *(f"{value / whole:.1%}" for value in run.seconds.values()), "100.0%"))
    # In the order of KINDS.
    heads = ("attempt", "convert", "import", "read", "load", "build", "prefill", "decode", "rest", "wait", "idle",
             "drain", "gather", "merge", "other", "ranks x time")  # fmt: skip
    return Table("Where the time of all ranks went, in rank-seconds", heads, tuple(rows))


def versus_table(one: History, other: History) -> Table:
    """Return a table of the figures of two runs, and their ratio."""
    rows = []
    for (name, value), versus in zip(_figures(one).items(), _figures(other).values(), strict=True):
        ratio = versus / value if value else None
        shown = "-" if ratio is None else f"{ratio:.2f}" if ratio >= 0.1 else f"{ratio:.2g}"
        rows.append((name, _figure(value), _figure(versus), shown))
    heads = ("", f"A: {one.path.resolve().name}", f"B: {other.path.resolve().name}", "B / A")
    return Table("Two runs", heads, tuple(rows))


def endings_table(contents: Contents) -> Table:
    """Return a table of rows by finish reason, and of errors by kind."""
    counted = sum(contents.endings.values())
    rows = [(name, f"{count:,}", f"{count / counted:.1%}") for name, count in contents.endings.items()]
    title = "How the rows ended"
    if counted < contents.answered:
        title += f", of {counted:,} rows spread over {contents.answered:,} that have"
    if missing := contents.rows - contents.answered:
        title += f"; {several(missing, 'row')} of {contents.rows:,} without an answer yet"
    return Table(title, ("finish reason or error", "rows", "share"), tuple(rows))


def ranks_table(attempt: AttemptHistory) -> Table:
    """Return a table of the tokens/s of each rank; of more than `SHOWN_RANKS` the slowest."""
    listed = [(_speed(rank), rank) for rank in attempt.ranks]
    title = f"Tokens per second of each rank, attempt {attempt.number}"
    if len(listed) > SHOWN_RANKS:
        listed = sorted(listed, key=lambda each: each[0])[:SHOWN_RANKS]
        title += f": the slowest {SHOWN_RANKS} of {len(attempt.ranks):,}"
    rows = []
    for speed, rank in listed:
        progress, seconds = rank.progress, rank.seconds
        rows.append(
            (
                f"rank {rank.number}", f"{progress.rows:,}", f"{progress.generated_tokens:,}", _figure(speed),
                _figure(progress.busy_s), _figure(seconds["wait"]), _figure(seconds["idle"]),
            )
        )  # fmt: skip
    heads = ("", "rows", "tokens", "tokens/s", "seconds busy", "waiting", "idle")
    return Table(title, heads, tuple(rows))


def _speed(rank: RankHistory) -> float:
    seconds = rank.progress.ended - rank.progress.began
    return rank.progress.generated_tokens / seconds if seconds > 0 else 0.0


def _figures(run: History) -> dict[str, float]:
    seconds, total, ranks = run.seconds, run.total, max(len(attempt.ranks) for attempt in run.attempts)
    return {
        "attempts": len(run.attempts),
        "ranks": ranks,
        "rows": total.rows,
        "tokens": total.generated_tokens,
        "total time, s": sum(attempt.ended - attempt.began for attempt in run.attempts),
        "tokens/s": _rate(run.attempts),
        "tokens/s per rank": _rate(run.attempts) / ranks,
        "ranks x time, rank-seconds": sum(seconds.values()),
        **{name: seconds[kind] for kind, name in KINDS.items()},
    }


def _rate(attempts: Sequence[AttemptHistory]) -> float:
    """Return the tokens per second while generating."""
    seconds = sum(attempt.generating_s for attempt in attempts)
    return sum(attempt.total.generated_tokens for attempt in attempts) / seconds if seconds else 0.0


def _figure(value: float) -> str:
    return f"{value:,.0f}" if value >= 1000 or value == int(value) else f"{value:,.{1 if value >= 10 else 2}f}"


def show_time(seconds: float) -> str:
    """Return a duration for people; below 10 s with tenths."""
    return duration(seconds) if seconds >= 10 else f"{seconds:.1f} s"


def several(count: int, noun: str) -> str:
    """Return a count with its noun."""
    return f"{count:,} {noun}{'s' * (count != 1)}"
