"""Forecast: what a job will take on 1, 2, 4, … ranks, from its corpus and a calibration. Loads no model.

The corpus is read into the run directory, as a run would: a run that follows finds it there.
"""

import json
from collections import Counter
from dataclasses import asdict, dataclass, replace
from math import inf
from pathlib import Path
from typing import Any

import numpy as np

from hpc.arrays import Ints
from hpc.corpus.find import corpus_files, keep_corpus
from hpc.corpus.store import Prompts, TokenStore
from hpc.engine import bucket
from hpc.engine.registry import check_devices, measurable, traits
from hpc.executor.attempt import chat_date
from hpc.executor.crew import Crew
from hpc.executor.read import Inputs, make_checker, read_corpus
from hpc.exit import Refusal
from hpc.forecast import calibration
from hpc.forecast.calibration import Calibration
from hpc.forecast.estimate import Demand, Estimator, Prediction, fewest
from hpc.forecast.fit import Fit, fit
from hpc.job import Job
from hpc.model.find import Model, user_cache, with_template
from hpc.model.loader import Loader
from hpc.mpi.binding import Binding
from hpc.mpi.comm import Single
from hpc.mpi.signals import Stop
from hpc.output.journal import JournalIndex
from hpc.plan.arrange import cuts
from hpc.plan.pending import Pending, find_pending, lengths_seen
from hpc.rundir.directory import RunDirectory, run_path
from hpc.rundir.lock import RunLock
from hpc.rundir.progress import duration

MAX_RANKS = 1024
NO_GAIN = 1.02
"""A time that is so many times the shortest is as good."""
BAR = 40
"""Characters of the longest bar of a histogram."""


@dataclass(frozen=True)
class Memory:
    """What a rank needs of the memory it may have, in bytes."""

    weights: int
    cache: int
    cache_tokens: int
    all: int


@dataclass(frozen=True)
class Advice:
    """How many ranks to ask for."""

    fastest: Prediction
    """The fewest ranks that take no longer than any other number."""
    loading_from: int | None
    """The fewest ranks with which loading takes longer than generating; None if no number does."""
    cheapest: Prediction | None
    """The fewest ranks that meet the deadline; None where there is none, or none does."""
    time_min: int
    """Minutes to ask for with the cheapest, or the fastest: the 90th percentile, a quarter, and five more."""


@dataclass(frozen=True)
class Forecast:
    """What is known of a job before it runs."""

    rows: int
    refused: int
    refusals: dict[str, int]
    """Refused rows by kind."""
    reasons: list[str]
    """Why, of the first of each kind."""
    done: int
    duplicates: int
    requests: int
    prompt_tokens: int
    shared_tokens: int
    """Prompt tokens among them that are computed once for many."""
    longest_prompt: int
    most_new_tokens: int
    histogram: list[tuple[int, int]]
    """Lengths in tokens, and how many prompts are as long at most and longer than the one before."""
    engine: str
    """What will generate."""
    engine_reason: str
    """Why that one, where the job does not name it."""
    buckets: list[tuple[int, int]]
    """Lengths to which an engine that pads would, and how many prompts to each."""
    padding: float
    """Share of padding in them."""
    lengths_from: str
    """Where the lengths of the outputs come from."""
    calibration: str | None
    """None where there is none; then nothing is predicted."""
    load_s: float
    memory: Memory | None
    predictions: list[Prediction]
    advice: Advice | None
    fit: Fit | None = None
    """Whether the GPUs of a rank hold the model; None where that is not asked, or not known."""


def forecast(
    job: Job,
    loader: Loader,
    given: Path | None = None,
    ranks_on_node: int | None = None,
    deadline_min: float | None = None,
    gpu_gib: float | None = None,
) -> Forecast:
    """Read the corpus of a job and predict; raise `Refusal` where it cannot be done."""
    if gpu_gib is not None and not 0 < gpu_gib < inf:
        raise Refusal(f"--gpu-gib {gpu_gib}: it must be more than 0")
    check_devices(job)
    files = corpus_files(job)
    model = with_template(loader.resolve(job.model), job.chat_template)
    found = _calibration(job, model, given, ranks_on_node)
    directory = RunDirectory(run_path(job, files))
    directory.create()
    lock = RunLock(directory.path)
    lock.acquire(job.force)
    try:
        crew = Crew(Single(), Stop())
        kept = keep_corpus(files, directory, job, crew.step)
        if kept is None:
            raise Refusal("stopped")
        own = replace(job, force=False, chat_date=chat_date(job, directory))  # a plan takes nothing's place
        inputs = Inputs(own, kept, model)
        index = JournalIndex(directory.journals())
        tokens = read_corpus(inputs, directory, index, crew, lambda: make_checker(loader, inputs, threads=1))
        if tokens is None:
            raise Refusal("stopped")
        reason = ""
        engine: Any = found.kind.engine if found is not None else None  # what was measured can generate
        if found is None and find_pending(tokens, index).work.requests:
            gpus = job.device == "auto" and job.slurm.gpus_per_node  # which this machine may not have
            choice = loader.choose_engine(replace(job, device="cuda") if gpus else job, model.path, Binding("", 0, 1))
            engine, reason = choice.engine, choice.reason
        if engine is not None:
            job = replace(job, engine=engine)
        return replace(
            _put_together(job, tokens, index, found, deadline_min, reason),
            fit=_fit(own, loader, model.path, gpu_gib, found),
        )
    finally:
        lock.release()


def _fit(job: Job, loader: Loader, path: Path, gpu_gib: float | None, found: Calibration | None) -> Fit | None:
    """Say whether GPUs hold the model; None where the job is for none, or the model's files do not tell."""
    if job.device == "cpu" or (needs := loader.needs(job, path)) is None:
        return None
    gpu_bytes = int(gpu_gib * 2**30) if gpu_gib is not None else loader.gpu_bytes()
    of_node = job.slurm.gpus_per_node
    for_gpus = job.device == "cuda" or job.replica_gpus > 1 or of_node is not None
    if gpu_bytes is None and for_gpus and found is not None:  # where it was measured, which may be a CPU otherwise
        gpu_bytes = found.size.memory_bytes // found.kind.devices
    return fit(needs, gpu_bytes, job.replica_gpus, of_node) if for_gpus or gpu_bytes is not None else None


def _calibration(job: Job, model: Model, given: Path | None, ranks_on_node: int | None) -> Calibration | None:
    if given is None:
        folder = user_cache() / "calibrations"
        return calibration.find_calibration(
            folder,
            model.revision,
            job.dtype,
            measurable(job.engine),
            ranks_on_node or job.slurm.tasks_per_node or 1,
            devices=job.replica_devices,
        )
    try:
        return calibration.read_calibration(given)
    except (OSError, ValueError) as error:
        raise Refusal(str(error)) from error


def _put_together(
    job: Job,
    tokens: TokenStore,
    index: JournalIndex,
    found: Calibration | None,
    deadline_min: float | None,
    engine_reason: str,
) -> Forecast:
    outlined = find_pending(tokens, index)
    asked = tokens.prompts(outlined.asked)
    shared = cuts(asked, job)
    if len(outlined.pending) < len(outlined.asked):
        pending = np.searchsorted(outlined.asked, outlined.pending)
        shared = shared[0][pending], shared[1][pending]
    prompts = tokens.prompts(outlined.pending)
    seen, lengths_from = lengths_seen(job, tokens, index)
    predictions: list[Prediction] = []
    advised = None
    if found is not None and outlined.work.requests:
        estimator = Estimator(job, Demand(prompts, shared, seen, outlined.work.rows), found)
        predictions, advised = predict_all(estimator, found.load_s, deadline_min)
    return Forecast(
        **_counted(tokens, outlined, prompts, shared[0], job),
        engine=job.engine,
        engine_reason=engine_reason,
        lengths_from=lengths_from,
        calibration=str(found) if found else None,
        load_s=found.load_s if found else 0.0,
        memory=_memory(found) if found else None,
        predictions=predictions,
        advice=advised,
    )


def _counted(tokens: TokenStore, outlined: Pending, prompts: Prompts, cut: Ints, job: Job) -> dict[str, Any]:
    """Return what counting alone tells of a corpus."""
    work, lengths = outlined.work, prompts.lengths
    kinds, reasons = Counter[str](), dict[str, str]()
    for _, error in tokens.errors():
        kinds[error["kind"]] += 1
        reasons.setdefault(error["kind"], error["message"])
    ends = 2 ** np.arange(4, max(5, int(lengths.max(initial=1) - 1).bit_length() + 1))
    in_bin = np.bincount(np.searchsorted(ends, lengths), minlength=len(ends)).tolist()
    padded_to = bucket.boundaries(lengths, job.buckets) if len(lengths) else lengths
    assigned = bucket.assign(lengths, padded_to)
    return {
        "rows": tokens.num_rows,
        "refused": work.refused,
        "refusals": dict(kinds),
        "reasons": list(reasons.values()),
        "done": work.done,
        "duplicates": work.duplicates,
        "requests": work.requests,
        "prompt_tokens": int(lengths.sum()),
        "shared_tokens": int(cut.sum()),
        "longest_prompt": int(lengths.max(initial=0)),
        "most_new_tokens": int((prompts.new_tokens * prompts.samples).sum()),
        "histogram": list(zip(ends.tolist(), in_bin, strict=True)),
        "buckets": [(int(length), int((assigned == length).sum())) for length in padded_to],
        "padding": 1 - float(lengths.sum() / assigned.sum()) if len(lengths) else 0.0,
    }


def _memory(found: Calibration) -> Memory:
    engine, size = found.engine, found.size
    cache = engine.cache_tokens * engine.token_bytes
    return Memory(size.weight_bytes, cache, engine.cache_tokens, size.memory_bytes)


def predict_all(estimator: Estimator, load_s: float, deadline_min: float | None) -> tuple[list[Prediction], Advice]:
    """Predict for 1, 2, 4, … ranks, until more would not help, and say how many to ask for."""
    most = min(MAX_RANKS, estimator.most_ranks)
    predict = estimator.predict
    predictions = [predict(1)]
    while 2 * predictions[-1].ranks <= most:
        predictions.append(predict(2 * predictions[-1].ranks))
        best = min(prediction.seconds for prediction in predictions)
        if predictions[-1].seconds > best / NO_GAIN and predictions[-1].efficiency < 0.3:
            break
    last, best = predictions[-1].ranks, min(prediction.seconds for prediction in predictions)
    fastest = predict(fewest(lambda ranks: predict(ranks).seconds <= NO_GAIN * best, last) or last)
    loading = fewest(lambda ranks: predict(ranks).seconds <= 2 * load_s, last)
    cheapest = None
    if deadline_min is not None:
        enough = fewest(lambda ranks: predict(ranks).high_s <= 60 * deadline_min, last)
        cheapest = predict(enough) if enough else None
    asked = cheapest or fastest
    return predictions, Advice(fastest, loading, cheapest, int(asked.high_s * 1.25 / 60) + 5)


def show(found: Forecast, deadline_min: float | None = None) -> None:
    """Print a forecast as a table, with the answer to how many ranks to ask for."""
    from rich import box
    from rich.console import Console
    from rich.table import Table

    console = Console(highlight=False, markup=False, soft_wrap=True, width=200)  # nothing is cut or broken
    kinds = "".join(f", {count:,} {kind}" for kind, count in sorted(found.refusals.items()))
    console.print(
        f"{found.rows:,} rows: {found.refused:,} refused{kinds}; {found.done:,} done before, {found.duplicates:,} "
        f"duplicates, {found.requests:,} requests to generate\n{found.prompt_tokens:,} prompt tokens "
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
    most = max(count for _, count in found.histogram)
    for end, count in found.histogram:
        console.print(f"  up to {end:>7,} tokens {count:>12,} {'█' * -(-BAR * count // most)}")
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
        return (
            "No time is predicted: nothing has measured this model, dtype and engine yet. On a node like those it "
            "will run on, run `scattergen calibrate --model M --dtype D`, under mpirun or srun with as many ranks as "
            "the node is to have (and --engine vllm if that is to generate; hf cannot be measured), then ask again."
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


def to_json(found: Forecast) -> str:
    """Return a forecast for programs."""
    values: dict[str, Any] = asdict(found)
    return json.dumps(values, indent=2)
