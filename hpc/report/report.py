"""Report where the time of a run went, or of two in comparison: tables on the terminal, a page, and a trace."""

import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from rich import box
from rich.console import Console
from rich.table import Table as RichTable

from hpc.exit import FAULT, OK, Refusal
from hpc.report.contents import read_contents
from hpc.report.page import page
from hpc.report.read_events import read
from hpc.report.tables import Table, attempts_table, endings_table, several, show_time, time_table, versus_table
from hpc.report.timeline import History
from hpc.report.trace import trace
from hpc.rundir import atomic
from hpc.rundir.progress import duration

TERMINAL_COLUMNS = 240
"""Width that is allowed to tables: the terminal wraps a wide line, where rich would cut it."""


def report(paths: Sequence[Path], html: bool = True) -> int:
    """Print where the time of one run or of two went; with `html` write the page too; return the exit code.

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
    contents = read_contents(paths[0]) if len(runs) == 1 else None
    tables = [attempts_table(runs[0]), time_table(runs[0])] if len(runs) == 1 else [versus_table(*runs)]
    if contents is not None and contents.answered:
        tables.append(endings_table(contents))
    notes = [(describe(run), *remarks(run)) for run in runs]
    show(tables, notes)
    if not html:
        return OK
    if len(runs) == 1 and (code := write_trace(runs[0])) != OK:
        return code
    name = "report.html" if len(runs) == 1 else f"report-versus-{runs[1].path.resolve().name}.html"
    return write_page(runs[0].path / name, lambda: page(runs, tables, notes, contents))


def write_page(path: Path, make: Callable[[], str]) -> int:
    """Write the page, or say which library is missing; return the exit code."""
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        print("no page was written, for want of matplotlib: pip install 'scattergen[report]'")
        return OK
    try:
        atomic.write(path, make().encode("utf-8", "replace").decode())  # ids may have half of a surrogate pair
    except OSError as error:
        print(f"scattergen: cannot write {path}: {error.strerror}; --no-html prints the tables alone", file=sys.stderr)
        return FAULT
    print(f"page: {path}")
    return OK


def write_trace(run: History) -> int:
    """Write the trace of a run; return the exit code."""
    path = run.path / "trace.json"
    try:
        atomic.write(path, trace(run))
    except OSError as error:
        print(f"scattergen: cannot write {path}: {error.strerror}; --no-html prints the tables alone", file=sys.stderr)
        return FAULT
    print(f"trace: {path} (open it in https://ui.perfetto.dev)")
    return OK


def describe(run: History) -> str:
    """Return a line on the model, the engine and the ending of a run."""
    job, last = run.job["job"], run.attempts[-1]
    engine = run.summary.get("engine", job["engine"])
    what = f"{job['model']} with the {engine} engine in {run.job['bound'].get('dtype', job['dtype'])}"
    return f"{run.path}: {what}; {several(len(run.attempts), 'attempt')}, the last of them {last.ending}"


def remarks(run: History) -> list[str]:
    """Return further facts of the events and the summary, a line each."""
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
    """Return lines that compare each finished attempt with its prediction and with the limit of the device."""
    found = []
    for attempt in run.attempts:
        what = f"attempt {attempt.number}: "
        if attempt.predicted and attempt.ending == "done":
            expected, took = float(attempt.predicted["seconds"]), attempt.ended - attempt.planned
            low, high = (duration(attempt.predicted[name]) for name in ("low_s", "high_s"))
            found.append(
                f"{what}loading, generating and merging were predicted to take {show_time(expected)} "
                f"({low} to {high}), and took {show_time(took)} ({took / expected - 1:+.0%})"
            )
        if (share := attempt.limit_share) is not None:
            found.append(f"{what}the device at its fastest would have needed {share:.0%} of the time in steps")
    return found


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
