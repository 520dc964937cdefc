"""Show a forecast: a table on the terminal, a picture, and how many ranks to ask for."""

from pathlib import Path

from hpc.engine.registry import ENGINES, traits
from hpc.exit import Refusal
from hpc.forecast.forecast import Forecast
from hpc.rundir.progress import duration

_BAR = 40
"""Characters of the longest bar of a histogram: with the numbers before it, it fits 80 columns."""


def show(found: Forecast, deadline_min: float | None = None) -> None:
    """Print a forecast as a table, with the answer to how many ranks to ask for."""
    from rich import box
    from rich.console import Console
    from rich.table import Table

    console = Console(highlight=False, markup=False, soft_wrap=True, width=200)  # nothing is cut or broken
    kinds = ", ".join(f"{count:,} {kind}" for kind, count in sorted(found.refusals.items()))
    refused = f"{found.refused:,} refused" + (f" ({kinds})" if kinds else "")
    console.print(
        f"{found.rows:,} rows: {refused}; {found.done:,} done before, {found.duplicates:,} duplicates, "
        f"{found.requests:,} requests to generate\n{found.prompt_tokens:,} prompt tokens "
        f"({found.shared_tokens:,} of them shared), the longest prompt {found.longest_prompt:,}; at most "
        f"{found.most_new_tokens:,} new tokens\nlengths of the outputs: {found.lengths_from}"
    )
    for reason in found.reasons:
        console.print(f"refused: {reason}")
    if found.fit is not None:
        console.print(str(found.fit))
    if not found.requests:  # no table of nothing
        console.print(advice(found, deadline_min))
        return
    console.print("lengths of the prompts:")
    max_count = max(count for _, count in found.histogram)
    for end, count in found.histogram:
        console.print(f"  up to {end:>7,} tokens {count:>12,} {'█' * -(-_BAR * count // max_count)}")
    padded = ", ".join(f"{length:,}" for length, _ in found.buckets)
    if found.engine_reason:
        console.print(found.engine_reason)
    which = "" if traits(found.engine).pads else "none; with --engine hf "
    console.print(f"padding: {which}{found.padding:.1%}, to {padded} tokens")
    if found.memory is not None:
        weights, cache, everything = (
            f"{size / 2**30:.1f} GiB" for size in (found.memory.weights, found.memory.cache, found.memory.all)
        )
        console.print(
            f"memory of a rank: {weights} of weights, {cache} for {found.memory.cache_tokens:,} tokens, of {everything}"
        )
    if found.calibration is not None:
        console.print(f"measured on: {found.calibration}; loading takes {found.load_s:.0f} s")
        if not traits(found.engine).simulated:
            console.print(
                f"{found.engine} is predicted as if it took prompts in as the native engine does, with all that they "
                "share in its prefix cache"
            )
        table = Table(box=box.SIMPLE_HEAD)
        for title in ("ranks", "time", "10-90 %", "rank hours", "speed-up", "efficiency", "idle at the end"):
            table.add_column(title, justify="right", no_wrap=True)
        for p in found.predictions:
            table.add_row(
                f"{p.ranks:,}", duration(p.seconds), f"{duration(p.low_s)} - {duration(p.high_s)}",
                f"{p.rank_hours:,.2f}", f"{p.speedup:.1f}", f"{p.efficiency:.0%}", f"{p.idle:.1%}",
            )  # fmt: skip
        console.print(table)
    console.print(advice(found, deadline_min))


def plot(found: Forecast, path: Path) -> None:
    """Draw time and efficiency over ranks into a file; raise `Refusal` where that cannot be."""
    from hpc.forecast.chart import draw_plan

    if not found.predictions:
        raise Refusal(f"{path}: there is no prediction to draw")
    try:
        draw_plan(path, found.predictions)
    except ImportError as error:
        raise Refusal(f"--plot needs matplotlib: pip install 'scattergen[report]' ({error})") from error
    except (OSError, ValueError) as error:
        raise Refusal(f"--plot {path}: {error}") from error


def advice(found: Forecast, deadline_min: float | None) -> str:
    """Say how many ranks to ask for, and for how long."""
    if not found.requests:
        return "Nothing is left to generate."
    if found.advice is None:
        if found.engine in ENGINES and not ENGINES[found.engine].reports_steps:
            return (
                f"No time is predicted: the {found.engine} engine generates with this model, and it does not report "
                "steps that could be measured. Time a few rows with --limit, and multiply."
            )
        return (
            "No time is predicted: nothing has measured this model, dtype and engine yet. On a node like those it "
            "will run on, run `scattergen calibrate --model M --dtype D`, under mpirun or srun with as many ranks as "
            "the node is to have (and --engine vllm if that is to generate), then ask again."
        )
    fastest, cheapest = found.advice.fastest, found.advice.cheapest
    text = f"Fastest: {_ranks(fastest.ranks)}, {duration(fastest.seconds)}; more gain nothing."
    if found.advice.loading_from:
        text += f" From {_ranks(found.advice.loading_from)} on, loading takes longer than generating."
    if deadline_min is not None and cheapest is None:
        return f"{text} No number of ranks meets {duration(60 * deadline_min)}."
    if deadline_min is not None and cheapest is not None:
        text += f" Fewest within {duration(60 * deadline_min)}: {_ranks(cheapest.ranks)}, {duration(cheapest.seconds)}."
    each = f" of {found.fit.gpus} GPUs each" if found.fit is not None and found.fit.gpus > 1 else ""
    asked = f"{_ranks((cheapest or fastest).ranks)}{each}"
    return f"{text} Ask for {asked} and --slurm.time-min {found.advice.time_min}."


def _ranks(count: int) -> str:
    return f"{count:,} rank{'s' * (count != 1)}"
