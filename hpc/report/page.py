"""Draw the page of a report: one HTML file with SVG in it, which needs no other file and no script."""

import html as markup
import re
from collections.abc import Sequence
from dataclasses import dataclass
from io import StringIO
from typing import TYPE_CHECKING

import numpy as np

from hpc.report.spans import Span
from hpc.report.timeline import KINDS, AttemptHistory, History

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


SHOWN_RANKS = 64
SHOWN_ATTEMPTS = 12
BINS = 120
"""Moments between which the rate of a run is drawn."""
MIN_SHOWN = 0.004
"""Share of an attempt below which waiting is drawn as generating: it would not be seen, and there is much of it."""

INK = "#010101"
COLOURS = {kind: f"#0102{index:02x}" for index, kind in enumerate(KINDS)}
"""What matplotlib draws with; in the page a variable of the style stands for each."""

STYLE = """
:root { color-scheme: light dark; --ink: #1b1f24; --paper: #fff; --faint: #d5dae0; --read: #0072b2; --load: #8e5ea2;
  --convert: #7a5c3e; --import: #c994c7; --build: #5b3a78;
  --prefill: #0b6e4f; --decode: #4cc29a; --generate: #1b9e77; --wait: #e6a800; --idle: #d55e00; --drain: #b0413e;
  --gather: #9ad4f5; --merge: #56b4e9; --other: #a8adb3; }
@media (prefers-color-scheme: dark) {
  :root { --ink: #e6e9ed; --paper: #15181c; --faint: #3a4048; --read: #4ba3e3; --load: #b48ad0;
    --convert: #b08d68; --import: #e3b8e1; --build: #9673b8;
    --prefill: #1d8a66; --decode: #6fe0ba; --generate: #35b98c; --wait: #f0bb3a; --idle: #f07a3c; --drain: #d9706d;
    --gather: #c3e6fa; --merge: #8fd0f5; --other: #6d747c; }
}
body { margin: 0; background: var(--paper); color: var(--ink); font: 16px/1.5 system-ui, sans-serif; }
main { max-width: 64rem; margin: auto; padding: 1rem; }
h1 { font-size: 1.5rem; overflow-wrap: anywhere; } h2 { font-size: 1.15rem; margin: 2rem 0 .5rem; }
p { overflow-wrap: anywhere; } summary { cursor: pointer; margin: .5rem 0; }
.scroll { overflow-x: auto; margin: .5rem 0; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; white-space: nowrap; }
th, td { padding: .25rem .75rem; text-align: right; border-bottom: 1px solid var(--faint); }
th:first-child, td:first-child { text-align: left; padding-left: 0; }
svg { display: block; width: 100%; min-width: 40rem; height: auto; }
.legend span { display: inline-block; margin-right: 1.25rem; white-space: nowrap; }
.legend i { display: inline-block; width: .8em; height: .8em; margin-right: .4em; border-radius: 2px; }
"""


@dataclass(frozen=True)
class Table:
    """What is printed on a terminal and stands in the page."""

    title: str
    heads: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]


def page(runs: Sequence[History], tables: Sequence[Table], notes: Sequence[Sequence[str]]) -> str:
    """Return the whole page; it needs no other file, and no script."""
    title = " and ".join(run.path.resolve().name for run in runs)
    parts = [f"<h1>{_text(title)}: where the time went</h1>"]
    for letter, lines in zip("AB", notes, strict=False):
        parts.append(f"<p>{f'{letter}: ' * (len(runs) > 1)}{'<br>'.join(map(_text, lines))}</p>")
    parts += [_table(table) for table in tables]
    swatches = "".join(f'<span><i style="background:var(--{k})"></i>{_text(name)}</span>' for k, name in KINDS.items())
    parts.append(f'<h2>Shares of the time of all ranks</h2><p class="legend">{swatches}</p>')
    bars = [(f"attempt {a.number}", a.seconds) for a in runs[0].attempts[-SHOWN_ATTEMPTS:]]
    if len(runs) > 1:
        bars = [("A", runs[0].seconds), ("B", runs[1].seconds)]
    parts.append(_svg(draw_shares(bars), "shares", "Share of the ranks' time by what it went to"))
    for letter, run in zip("AB", runs, strict=False):
        which = f" of {letter}" if len(runs) > 1 else ""
        parts += [f"<h2>Tokens per second{which}, all ranks</h2>"]
        parts.append(_svg(draw_rates(run), f"rates-{letter}", "Tokens per second over time"))
    if len(runs) == 1:
        parts += _timelines(runs[0])
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{_text(title)}: report</title>\n<style>{STYLE}</style>\n</head>\n<body>\n<main>\n"
        + "\n".join(parts)
        + "\n</main>\n</body>\n</html>\n"
    )


def _timelines(run: History) -> list[str]:
    """Return what the ranks did, attempt by attempt, the latest first; it alone is unfolded."""
    parts = ["<h2>What each rank did, and its tokens</h2>"]
    for attempt in run.attempts[: -SHOWN_ATTEMPTS - 1 : -1]:
        count, is_last = len(attempt.ranks), attempt is run.attempts[-1]
        label = f"attempt {attempt.number}, {attempt.ending}: "
        label += f"{SHOWN_RANKS} of {count:,} ranks" if count > SHOWN_RANKS else several(count, "rank")
        drawn = _svg(draw_ranks(attempt), f"ranks-{attempt.number}", f"What the ranks did, {label}")
        parts.append(f"<details{' open' * is_last}><summary>{_text(label)}</summary>{drawn}</details>")
    if (left := len(run.attempts) - SHOWN_ATTEMPTS) > 0:
        parts.append(f"<p>{several(left, 'earlier attempt')} not drawn</p>")
    return parts


def _text(text: str) -> str:
    return markup.escape(text)


def _table(table: Table) -> str:
    lines = ["<tr>" + "".join(f"<th>{_text(head)}</th>" for head in table.heads) + "</tr>"]
    lines += ["<tr>" + "".join(f"<td>{_text(cell)}</td>" for cell in row) + "</tr>" for row in table.rows]
    return f'<h2>{_text(table.title)}</h2>\n<div class="scroll"><table>\n' + "\n".join(lines) + "\n</table></div>"


def _figure_of(height: float) -> "Figure":
    from matplotlib.figure import Figure

    return Figure(figsize=(10, height), layout="constrained")


def draw_shares(bars: Sequence[tuple[str, dict[str, float]]]) -> "Figure":
    """Draw a bar for each, of the shares of its rank-seconds."""
    figure = _figure_of(0.6 + 0.35 * len(bars))
    axes = figure.subplots()
    for index, (_, seconds) in enumerate(bars):
        left, whole = 0.0, sum(seconds.values()) or 1.0
        for kind, value in seconds.items():
            axes.barh(index, 100 * value / whole, left=left, height=0.7, color=COLOURS[kind])
            left += 100 * value / whole
    axes.set(yticks=range(len(bars)), yticklabels=[name for name, _ in bars], xlim=(0, 100), xlabel="%")
    axes.invert_yaxis()
    return _inked(figure)


def draw_rates(run: History) -> "Figure":
    """Draw the tokens/s of all ranks over time, attempt after attempt, without the time between them."""
    figure = _figure_of(2.6)
    axes = figure.subplots()
    whole = sum(attempt.ended - attempt.began for attempt in run.attempts)
    unit, name = _unit(whole)
    offset = 0.0
    for attempt in run.attempts:
        took = attempt.ended - attempt.began
        if took > 0:
            edges = np.linspace(0, took, 2 + round(BINS * took / whole))
            rates = attempt.rates(edges)
            axes.stairs(rates, (offset + edges) / unit, fill=True, color=COLOURS["generate"], alpha=0.35)
            axes.stairs(rates, (offset + edges) / unit, color=COLOURS["generate"], linewidth=1.5)
        if offset:
            axes.axvline(offset / unit, color=INK, linewidth=0.8, linestyle=":")
        offset += took
    axes.set(xlim=(0, max(whole, 1e-3) / unit), xlabel=f"time in attempts, {name}", ylabel="tokens/s")
    axes.set_ylim(bottom=0)
    return _inked(figure)


def draw_ranks(attempt: AttemptHistory) -> "Figure":
    """Draw what each rank did over time, and beside it the tokens it generated."""
    ranks = sorted(attempt.ranks, key=lambda rank: rank.progress.ended)
    if len(ranks) > SHOWN_RANKS:  # the first and the last to end among them
        ranks = [ranks[round(i)] for i in np.linspace(0, len(ranks) - 1, SHOWN_RANKS)]
    ranks.sort(key=lambda rank: rank.number)
    figure = _figure_of(1.0 + 0.24 * len(ranks))
    left, right = figure.subplots(1, 2, sharey=True, width_ratios=(3, 1))
    unit, name = _unit(attempt.ended - attempt.began)
    least = MIN_SHOWN * (attempt.ended - attempt.began)
    for index, rank in enumerate(ranks):
        for kind, began, ended in _drawn(rank.spans, least):
            bar = ((began - attempt.began) / unit, (ended - began) / unit)
            left.broken_barh([bar], (index - 0.38, 0.76), color=COLOURS[kind], linewidth=0)
        right.barh(index, rank.progress.generated_tokens, height=0.76, color=COLOURS["generate"])
    every = max(1, len(ranks) // 32)
    left.set(yticks=range(0, len(ranks), every), yticklabels=[f"rank {rank.number}" for rank in ranks[::every]])
    left.set(xlim=(0, max(attempt.ended - attempt.began, 1e-3) / unit), xlabel=f"time, {name}")
    left.set_ylim(len(ranks) - 0.4, -0.6)
    right.set(xlabel="tokens")
    right.locator_params(axis="x", nbins=3)
    return _inked(figure)


def _drawn(spans: Sequence[Span], least: float) -> list[tuple[str, float, float]]:
    """Return what to draw of a rank: kind, beginning and end; waiting shorter than `least` seconds as generating."""
    found: list[tuple[str, float, float]] = []
    for span in spans:
        kind = "generate" if span.kind == "wait" and span.ended - span.began < least else span.kind
        began = found.pop()[1] if found and found[-1][0] == kind else span.began
        found.append((kind, began, span.ended))
    return found


def _unit(seconds: float) -> tuple[float, str]:
    """Return what to measure a time in: seconds of the unit, its name."""
    return (1, "s") if seconds < 300 else (60, "min") if seconds < 3 * 3600 else (3600, "h")


def _inked(figure: "Figure") -> "Figure":
    """Give axes the colour of the text and short numbers of tokens; leave away what is not needed."""
    from matplotlib.ticker import EngFormatter

    axes: Axes
    for axes in figure.axes:
        axes.tick_params(colors=INK)
        axes.spines[["top", "right"]].set_visible(False)
        axes.spines[["left", "bottom"]].set_color(INK)
        axes.xaxis.label.set_color(INK)
        axes.yaxis.label.set_color(INK)
        for axis in (axes.xaxis, axes.yaxis):
            if "tokens" in axis.label.get_text():
                axis.set_major_formatter(EngFormatter(sep=""))
    return figure


def _svg(figure: "Figure", name: str, label: str) -> str:
    """Return a figure as an SVG element for a page, with ids that begin with `name` and the page's colours."""
    import matplotlib

    drawn = StringIO()
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": name}):
        figure.savefig(drawn, format="svg", transparent=True)
    text = drawn.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
    text = re.sub(r' id="', f' id="{name}-', text)
    text = re.sub(r'(url\(|href=")#', rf"\g<1>#{name}-", text)
    text = re.sub(r"font: ([\d.]+px)[^;\"]*", r"font-size: \1", text)
    for colour, variable in {INK: "ink", **{colour: kind for kind, colour in COLOURS.items()}}.items():
        text = text.replace(colour, f"var(--{variable})")
    text = text.replace("<svg ", f'<svg role="img" aria-label="{_text(label)}" ', 1)
    return f'<div class="scroll">{text}</div>'


def several(count: int, noun: str) -> str:
    """Return a count with its noun."""
    return f"{count:,} {noun}{'s' * (count != 1)}"
