"""Report: where the time of a run went, or of two beside each other: tables, and a page with pictures of them."""

import sys
import time
from collections.abc import Sequence
from pathlib import Path

from rich import box
from rich.console import Console
from rich.table import Table as RichTable

from hpc.exit import FAULT, OK, Refusal
from hpc.report.page import Table, page, several
from hpc.report.read_events import read
from hpc.report.timeline import KINDS, AttemptHistory, History
from hpc.report.trace import trace
from hpc.rundir import atomic
from hpc.rundir.progress import duration

TERMINAL_COLUMNS = 240
"""A table takes what it needs of them; one that is cut says less than one that is wrapped."""


def report(paths: Sequence[Path], html: bool = True) -> int:
    """Print where the time of a run went, or of two, and with `html` write a page of it; return the exit code.

    Raises `Refusal` for a path that is no run directory.
    """
    if not 1 <= len(paths) <= 2:
        raise Refusal(f"report takes one run directory, or two to compare, not {len(paths)}")
    runs = [read(path) for path in paths]
    empty = [run for run in runs if not run.attempts]
    for run in empty:
        print(f"{run.path}: nothing to report yet: no attempt has said anything in {run.path / 'events'}")
    if empty:
        return OK
    tables = [attempts_table(runs[0]), time_table(runs[0])] if len(runs) == 1 else [versus_table(*runs)]
    notes = [(describe(run), *remarks(run)) for run in runs]
    show(tables, notes)
    if not html:
        return OK
    if len(runs) == 1 and (code := write_trace(runs[0])) != OK:
        return code
    name = "report.html" if len(runs) == 1 else f"report-versus-{runs[1].path.resolve().name}.html"
    return write_page(runs[0].path / name, runs, tables, notes)


def write_page(path: Path, runs: Sequence[History], tables: Sequence[Table], notes: Sequence[Sequence[str]]) -> int:
    """Write the page and say where it is, or how to get it; return the exit code."""
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        print("no page was written, for want of matplotlib: pip install 'scattergen[report]'")
        return OK
    try:
        atomic.write(path, page(runs, tables, notes))
    except OSError as error:
        print(f"scattergen: cannot write {path}: {error.strerror}; --no-html prints the tables alone", file=sys.stderr)
        return FAULT
    print(f"page: {path}")
    return OK


def write_trace(run: History) -> int:
    """Write the spans of a run beside its page; return the exit code."""
    path = run.path / "trace.json"
    try:
        atomic.write(path, trace(run))
    except OSError as error:
        print(f"scattergen: cannot write {path}: {error.strerror}; --no-html prints the tables alone", file=sys.stderr)
        return FAULT
    print(f"trace: {path} (open it in https://ui.perfetto.dev)")
    return OK


def describe(run: History) -> str:
    """Say what ran, and how it ended."""
    job, last = run.job["job"], run.attempts[-1]
    engine = run.summary.get("engine", job["engine"])
    what = f"{job['model']} with the {engine} engine in {run.job['bound'].get('dtype', job['dtype'])}"
    return f"{run.path}: {what}; {several(len(run.attempts), 'attempt')}, the last of them {last.ending}"


def remarks(run: History) -> list[str]:
    """Say what else the events and the summary tell."""
    total, found = run.total, []
    if total.guessed_tokens:
        right = total.accepted_tokens / total.guessed_tokens
        found.append(f"{total.guessed_tokens:,} tokens guessed, {total.accepted_tokens:,} of them right ({right:.0%})")
    found += predictions(run)
    answered = total.prompt_tokens - total.totals.step_prompt
    if total.totals.step_prompt and answered > 0:
        share = answered / total.prompt_tokens
        found.append(
            f"{answered:,} of {total.prompt_tokens:,} prompt tokens were shared, and not computed ({share:.0%})"
        )
    if duplicates := run.attempts[-1].duplicates:
        number = run.attempts[-1].number
        found.append(f"{several(duplicates, 'row')} answered by another row's completion in attempt {number}")
    if padding := run.summary.get("padding"):
        found.append(f"at most {padding:.1%} padding in the prompts")
    if total.errors:
        found.append(f"{several(total.errors, 'row')} ended in an engine error")
    if run.attempts[-1].ending == "running":
        found.append("the run is going on: figures are as of its latest events")
    elif any(attempt.ending in ("interrupted", "failed") for attempt in run.attempts):
        found.append("figures of an attempt that did not come to its end are as of its latest events")
    for attempt in run.attempts:
        if not attempt.told:
            found.append(
                f"attempt {attempt.number} is of an earlier version, whose ranks did not write what they did: only "
                "loading, generating and waiting are told apart"
            )
    if run.damaged:
        found.append(f"{several(run.damaged, 'line')} of events could not be read: half written, or damaged")
    return found


def predictions(run: History) -> list[str]:
    """Compare what was expected of each attempt that came to its end with what it was, and with the device's limit."""
    found = []
    for attempt in run.attempts:
        what = f"attempt {attempt.number}: "
        if attempt.predicted and attempt.ending == "done":
            expected, took = float(attempt.predicted["seconds"]), attempt.ended - attempt.planned
            low, high = (duration(attempt.predicted[name]) for name in ("low_s", "high_s"))
            found.append(
                f"{what}loading, generating and merging were predicted to take {_time(expected)} ({low} to {high}), "
                f"and took {_time(took)} ({took / expected - 1:+.0%})"
            )
        if (share := attempt.limit_share) is not None:
            found.append(f"{what}the device at its fastest would have needed {share:.0%} of the time in steps")
    return found


def attempts_table(run: History) -> Table:
    """Return when each attempt was, and what was done in it."""
    heads = ("attempt", "began", "took", "ranks", "rows", "tokens", "tokens/s", "ended", "Slurm job")
    rows = [
        (
            str(attempt.number), time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(attempt.began)),
            _time(attempt.ended - attempt.began), f"{len(attempt.ranks):,}", f"{attempt.total.rows:,}",
            f"{attempt.total.generated_tokens:,}", _figure(_rate([attempt])), attempt.ending, attempt.slurm_job or "-",
        )
        for attempt in run.attempts
    ]  # fmt: skip
    if len(rows) > 1:
        took = sum(attempt.ended - attempt.began for attempt in run.attempts)
        total = run.total
        rows.append(("all", "", _time(took), "", f"{total.rows:,}", f"{total.generated_tokens:,}",
                     _figure(_rate(run.attempts)), "", ""))  # fmt: skip
    return Table("Attempts", heads, tuple(rows))


def time_table(run: History) -> Table:
    """Return the rank-seconds of each attempt by what they went to."""
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
    """Return the figures of two runs side by side, and what the second has for each 1 of the first."""
    rows = []
    for (name, value), versus in zip(_figures(one).items(), _figures(other).values(), strict=True):
        ratio = versus / value if value else None
        shown = "-" if ratio is None else f"{ratio:.2f}" if ratio >= 0.1 else f"{ratio:.2g}"
        rows.append((name, _figure(value), _figure(versus), shown))
    heads = ("", f"A: {one.path.resolve().name}", f"B: {other.path.resolve().name}", "B / A")
    return Table("Two runs", heads, tuple(rows))


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
    """Return tokens per second of generating."""
    seconds = sum(attempt.generating_s for attempt in attempts)
    return sum(attempt.total.generated_tokens for attempt in attempts) / seconds if seconds else 0.0


def _figure(value: float) -> str:
    return f"{value:,.0f}" if value >= 1000 or value == int(value) else f"{value:,.{1 if value >= 10 else 2}f}"


def _time(seconds: float) -> str:
    return duration(seconds) if seconds >= 10 else f"{seconds:.1f} s"


def show(tables: Sequence[Table], notes: Sequence[Sequence[str]]) -> None:
    """Print the tables."""
    console = Console(highlight=False, markup=False, soft_wrap=True, width=TERMINAL_COLUMNS)
    for first, *others in notes:
        console.print(first)
        for text in others:
            console.print(f"  {text}")
    for table in tables:
        drawn = RichTable(title=table.title, title_justify="left", box=box.SIMPLE_HEAD)
        for index, head in enumerate(table.heads):
            drawn.add_column(head, justify="right" if index else "left", no_wrap=True)
        for row in table.rows:
            drawn.add_row(*row)
        console.print(drawn)
