"""Draw the predicted time and efficiency over the number of ranks, as a picture in a file."""

from collections.abc import Sequence
from pathlib import Path

from hpc.forecast.estimate import Prediction


def draw_plan(path: Path, predictions: Sequence[Prediction]) -> None:
    """Draw time, with its 10-90 % interval, and efficiency over ranks; the name's suffix says the format.

    Raises `ValueError` for a suffix that is none of a picture's, `OSError` if the file cannot be written.
    """
    from matplotlib.figure import Figure
    from matplotlib.ticker import FuncFormatter, NullLocator

    ranks = [p.ranks for p in predictions]
    alone = predictions[0].seconds
    unit, name = (1, "s") if alone < 600 else (60, "min") if alone < 36_000 else (3600, "h")
    figure = Figure(figsize=(7, 5), layout="constrained")
    above, below = figure.subplots(2, 1, sharex=True, height_ratios=(3, 2))
    low, middle, high = ([getattr(p, key) / unit for p in predictions] for key in ("low_s", "seconds", "high_s"))
    above.fill_between(ranks, low, high, color="#1b9e77", alpha=0.25, linewidth=0)
    above.plot(ranks, middle, color="#1b9e77", marker="o", label="predicted")
    above.plot(ranks, [middle[0] / n for n in ranks], color="#777777", linestyle=":", label="without loss")
    above.set(ylabel=f"time, {name}", xscale="log", yscale="log")
    above.legend(frameon=False)
    below.plot(ranks, [100 * p.efficiency for p in predictions], color="#0072b2", marker="o")
    below.set(ylabel="efficiency, %", xlabel="ranks", ylim=(0, 105), xticks=ranks)
    below.xaxis.set_minor_locator(NullLocator())
    below.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}"))
    above.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,g}"))
    for axes in (above, below):
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(alpha=0.3)
    figure.savefig(path)
