"""Forecast a job on 1, 2, 4, … ranks, from its corpus and a calibration. Loads no model.

The corpus is read into the run directory, where a later run finds it.
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
from hpc.engine.registry import check_devices, measurable
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
from hpc.output.target import check_output
from hpc.plan.arrange import cuts
from hpc.plan.pending import Pending, find_pending, lengths_seen
from hpc.rundir.directory import RunDirectory, run_path
from hpc.rundir.lock import RunLock

MAX_RANKS = 1024
"""Predictions are made for no more ranks."""
NO_GAIN = 1.02
"""A time up to this multiple of the shortest counts as equally good."""


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
    """All that is known of a job before it runs."""

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
    """Upper ends of bins of prompt lengths, in tokens, and the prompts in each bin."""
    engine: str
    """The engine that will generate."""
    engine_reason: str
    """Why this engine, if the job does not name it."""
    buckets: list[tuple[int, int]]
    """Lengths to which an engine that pads would, and how many prompts to each."""
    padding: float
    """Share of padding in them."""
    lengths_from: str
    """Source of the lengths of the outputs, in words."""
    calibration: str | None
    """The calibration, in words; None without one, and then nothing is predicted."""
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
        check_output(job, inputs.corpus, directory)
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
    if job.vllm.quantization and not needs.quantized:  # vLLM quantizes them when it loads them
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
    """Return the fields of a forecast that need no calibration."""
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
    max_ranks = min(MAX_RANKS, estimator.max_ranks)
    predict = estimator.predict
    predictions = [predict(1)]
    while 2 * predictions[-1].ranks <= max_ranks:
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


def to_json(found: Forecast) -> str:
    """Return a forecast for programs."""
    values: dict[str, Any] = asdict(found)
    return json.dumps(values, indent=2)
