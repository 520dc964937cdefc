"""Make the page of a report: one HTML file with SVG in it, which needs no other file and no script."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from hpc.report.contents import Contents
from hpc.report.draw import draw_lengths, draw_ranks, draw_rates, draw_shares, svg
from hpc.report.rows import Answered, prompt_of
from hpc.report.tables import SHOWN_RANKS, Table, ranks_table, several
from hpc.report.timeline import KINDS, AttemptHistory, History

SHOWN_ATTEMPTS = 12
MAX_CHARS = 300
"""Of an input or output in the table of rows."""


@dataclass(frozen=True)
class Example:
    """A row of the run, as texts of the page."""

    name: str
    input: str
    output: str
    ended: str


def page(
    runs: Sequence[History], tables: Sequence[Table], notes: Sequence[Sequence[str]], contents: Contents | None = None
) -> str:
    """Return the page of one run, with its `contents` where known, or the comparison of two."""
    import jinja2
    from markupsafe import Markup

    source = Path(__file__).with_name("page.html.j2").read_text(encoding="utf-8")
    environment = jinja2.Environment(
        autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    two, last = len(runs) > 1, runs[0].attempts[-1]
    bars = [(f"attempt {a.number}", a.seconds) for a in runs[0].attempts[-SHOWN_ATTEMPTS:]]
    if two:
        bars = [("A", runs[0].seconds), ("B", runs[1].seconds)]
    shown = () if two else runs[0].attempts[: -SHOWN_ATTEMPTS - 1 : -1]  # the latest first
    left = len(runs[0].attempts) - SHOWN_ATTEMPTS
    lengths = ""
    if contents:
        drawn = draw_lengths(contents.prompt_tokens, contents.completion_tokens)
        lengths = svg(drawn, "lengths", "How many prompts and outputs have which length")
    return environment.from_string(source).render(
        title=" and ".join(run.path.resolve().name for run in runs),
        two=two,
        notes=notes,
        tables=tables,
        lengths=Markup(lengths),
        examples=[_example(row) for row in contents.examples] if contents else (),
        kinds=KINDS,
        shares=Markup(svg(draw_shares(bars), "shares", "Share of the ranks' time by what it went to")),
        rates=[
            Markup(svg(draw_rates(run), f"rates-{letter}", "Tokens per second over time"))
            for letter, run in zip("AB", runs, strict=False)
        ],
        attempts=[(label := _label(attempt), Markup(_ranks(attempt, label))) for attempt in shown],
        not_drawn=several(left, "earlier attempt") if left > 0 and not two else "",
        ranks=None if two else ranks_table(last),
    )


def _label(attempt: AttemptHistory) -> str:
    count = len(attempt.ranks)
    shown = f"{SHOWN_RANKS} of {count:,} ranks" if count > SHOWN_RANKS else several(count, "rank")
    return f"attempt {attempt.number}, {attempt.ending}: {shown}"


def _ranks(attempt: AttemptHistory, label: str) -> str:
    return svg(draw_ranks(attempt), f"ranks-{attempt.number}", f"What the ranks did, {label}")


def _example(row: Answered) -> Example:
    """Return a row as texts of the page."""
    turns = prompt_of(row.read_as) if row.read_as is not None else ()
    given = "\n".join(f"{role}: {text}" if role else text for role, text in turns)
    output = row.error["message"] if row.error else (row.completion.text if row.completion else "") or ""
    name = str(row.row) if row.id in (None, row.row) else f"{row.row} ({row.id})"
    ended = row.finish_reason if row.error is None else f"error: {row.error['kind']}"
    return Example(name, _cut(given), _cut(output), ended)


def _cut(text: str) -> str:
    text = text.encode("utf-8", "replace").decode()
    return text if len(text) <= MAX_CHARS else f"{text[:MAX_CHARS]} …"
