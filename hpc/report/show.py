"""Show rows of a run on the terminal, input and output side by side."""

import re
import sys
from collections.abc import Sequence
from itertools import islice
from pathlib import Path

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from hpc.exit import OK, Refusal
from hpc.report.rows import Answered, Condition, RunRows, prompt_of

MAX_CHARS = 2000
"""Of an input or output, without `--whole`: some 40 lines of a column."""
MIN_COLUMNS = 60
"""A narrower terminal wraps the lines: two columns would hold no text."""
_CONTROLS = re.compile("[\0-\x08\x0b-\x1f\x7f-\x9f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")
"""Control characters except tab and newline, bidirectional controls, halves of surrogate pairs."""


def show(path: Path, where: Sequence[str], ids: Sequence[str], sample: int | None, rows: int, whole: bool) -> int:
    """Print the first rows that fulfil all conditions, or a sample of them; return the exit code.

    A row without completion or error is printed only if `ids` name it. Raises `Refusal` for a path that
    is no run directory, and for a malformed condition.
    """
    for name, number in (("--sample", sample), ("--rows", rows)):
        if number is not None and number < 1:
            raise Refusal(f"{name} is {number}; it must be at least 1")
    conditions = [Condition.of(text) for text in where]
    run = RunRows(path)
    candidates = run.named(ids) if ids else run.answered
    chosen = run.select(candidates, conditions)
    if sample is not None:
        shown = run.sample(list(chosen), sample)
    else:
        shown = list(islice(chosen, len(candidates) if ids else rows))
    if run.gone:
        print(f"note: {run.gone}: outputs alone are shown", file=sys.stderr)
    console = Console(highlight=False, markup=False, emoji=False)
    if console.width < MIN_COLUMNS:
        console = Console(highlight=False, markup=False, emoji=False, width=MIN_COLUMNS)
    for answered in run.read(shown):
        console.print(draw(answered, None if whole else MAX_CHARS))
    total = f"{run.run.tokens.num_rows:,} rows, {len(run.answered):,} of them with a completion or an error"
    asked = "".join(f" with {text}" for text in where)
    print(f"{len(shown):,} shown{asked}; {total}" if shown else f"no row{asked}; {total}")
    return OK


def draw(answered: Answered, max_chars: int | None) -> Table:
    """Return a row as a table of input and output; title and heads name the row, its lengths and its ending."""
    title = f"row {answered.row}"
    if answered.id is not None and answered.id != answered.row:
        title += f", id {answered.id!r}"
    if answered.place:
        title += f", {answered.place}"
    table = Table(title=Text(printable(title)), title_justify="left", box=box.SIMPLE_HEAD, expand=True, pad_edge=False)
    tokens = f"{answered.prompt_tokens:,} tokens"
    made = f", {answered.completion.num_tokens:,} tokens" if answered.completion and not answered.error else ""
    table.add_column(Text(f"input, {tokens}"), ratio=1, overflow="fold")
    table.add_column(Text(f"output, {answered.finish_reason}{made}"), ratio=1, overflow="fold")
    table.add_row(_cut(_input(answered), max_chars), _cut(_output(answered), max_chars))
    return table


def _input(answered: Answered) -> Text:
    if answered.read_as is None:
        return Text("it cannot be read", style="dim")
    text = Text()
    for role, content in prompt_of(answered.read_as):
        if role:
            text.append(f"{printable(role)}: ", style="bold")
        text.append(printable(content) + "\n")
    text.rstrip()
    return text


def _output(answered: Answered) -> Text:
    if answered.error is not None:
        return Text(printable(f"{answered.error['kind']}: {answered.error['message']}"), style="red")
    if answered.completion is None:
        return Text("no completion yet", style="dim")
    samples = answered.completion.samples
    text = Text()
    for index, each in enumerate(samples):
        if len(samples) > 1:
            text.append(f"sample {index}, {each.finish_reason}: ", style="bold")
        text.append(printable(each.text) + "\n")
    text.rstrip()
    return text


def _cut(text: Text, max_chars: int | None) -> Text:
    if max_chars is None or len(text) <= max_chars:
        return text
    left = len(text) - max_chars
    text = text[:max_chars]
    text.append(f"\n… {left:,} more characters (--whole)", style="dim")
    return text


def printable(text: str | None) -> str:
    """Return a text with control characters escaped, so that it cannot command the terminal."""
    return _CONTROLS.sub(lambda found: found[0].encode("unicode_escape").decode(), text or "")
