"""Draw the pictures of a report, as SVG elements that take their colours from the page."""

import html as markup
import re
from collections.abc import Sequence
from io import StringIO
from typing import TYPE_CHECKING

import numpy as np

from hpc.arrays import Ints
from hpc.report.spans import Span
from hpc.report.tables import SHOWN_RANKS
from hpc.report.timeline import KINDS, AttemptHistory, History

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

BINS = 120
"""Number of intervals for which the rate of a run is drawn."""
MIN_SHOWN = 0.004
"""Waits shorter than this share of an attempt are drawn as generating: they are many, and too thin to see."""

INK = "#010101"
COLOURS = {kind: f"#0102{index:02x}" for index, kind in enumerate(KINDS)}
"""Placeholder colours for matplotlib; `svg` replaces each by a variable of the page's style."""


def _figure_of(height: float) -> "Figure":
    from matplotlib.figure import Figure

    return Figure(figsize=(10, height), layout="constrained")


def draw_shares(bars: Sequence[tuple[str, dict[str, float]]]) -> "Figure":
    """Draw a bar for each name, divided by the kinds of its rank-seconds."""
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


def draw_lengths(prompts: Ints, outputs: Ints) -> "Figure":
    """Draw histograms of the lengths of prompts and outputs, in tokens, by powers of two."""
    figure = _figure_of(2.8)
    parts = (("prompt", prompts, "read"), ("output", outputs, "generate"))
    for axes, (name, lengths, kind) in zip(figure.subplots(1, 2), parts, strict=True):
        powers = np.ceil(np.log2(np.maximum(lengths, 1))).astype(np.int64)
        low, high = (int(powers.min()), int(powers.max())) if len(powers) else (0, 0)
        counts = np.bincount(powers - low, minlength=high - low + 1)
        names = [f"{2**power:,}" for power in range(low, high + 1)]
        axes.bar(names, counts, width=0.9, color=COLOURS[kind])
        axes.set(xlabel=f"length of the {name}, up to", ylabel="rows")
        axes.tick_params(axis="x", labelrotation=45 if len(names) > 8 else 0)
    return _inked(figure)


def draw_rates(run: History) -> "Figure":
    """Draw the tokens/s of all ranks over time, one attempt after the other, leaving out the time between them."""
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
    """Draw the spans of each rank over time, and beside them its number of tokens."""
    ranks = sorted(attempt.ranks, key=lambda rank: rank.progress.ended)
    if len(ranks) > SHOWN_RANKS:  # the first and the last to end among them
        ranks = [ranks[round(i)] for i in np.linspace(0, len(ranks) - 1, SHOWN_RANKS)]
    ranks.sort(key=lambda rank: rank.number)
    figure = _figure_of(1.0 + 0.24 * len(ranks))
    left, right = figure.subplots(1, 2, sharey=True, width_ratios=(3, 1))
    unit, name = _unit(attempt.ended - attempt.began)
    min_s = MIN_SHOWN * (attempt.ended - attempt.began)
    for index, rank in enumerate(ranks):
        for kind, began, ended in _drawn(rank.spans, min_s):
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


def _drawn(spans: Sequence[Span], min_s: float) -> list[tuple[str, float, float]]:
    """Return kind, beginning and end of the bars of a rank; a wait below `min_s` seconds becomes generating."""
    found: list[tuple[str, float, float]] = []
    for span in spans:
        kind = "generate" if span.kind == "wait" and span.ended - span.began < min_s else span.kind
        began = found.pop()[1] if found and found[-1][0] == kind else span.began
        found.append((kind, began, span.ended))
    return found


def _unit(seconds: float) -> tuple[float, str]:
    """Return the unit for a duration: its seconds and its name."""
    return (1, "s") if seconds < 300 else (60, "min") if seconds < 3 * 3600 else (3600, "h")


def _inked(figure: "Figure") -> "Figure":
    """Give axes the colour of the text, short numbers for tokens and rows, and no frame."""
    from matplotlib.ticker import EngFormatter

    axes: Axes
    for axes in figure.axes:
        axes.tick_params(colors=INK)
        axes.spines[["top", "right"]].set_visible(False)
        axes.spines[["left", "bottom"]].set_color(INK)
        axes.xaxis.label.set_color(INK)
        axes.yaxis.label.set_color(INK)
        for axis in (axes.xaxis, axes.yaxis):
            if axis.label.get_text() in ("tokens", "tokens/s", "rows"):
                axis.set_major_formatter(EngFormatter(sep=""))
    return figure


def svg(figure: "Figure", name: str, label: str) -> str:
    """Return a figure as an SVG element with the page's colours; its ids begin with `name`."""
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
    text = text.replace("<svg ", f'<svg role="img" aria-label="{markup.escape(label)}" ', 1)
    return f'<div class="scroll">{text}</div>'
