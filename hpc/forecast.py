"""Forecast: what a job will take on 1, 2, 4, … ranks, from its corpus and a calibration. Loads no model.

The corpus is read into the run directory, as a run would: a run that follows finds it there.
"""

import json
import os
import time
from collections import Counter
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from hpc import calibration, corpus, pipeline
from hpc.attempt import Attempt, run_path
from hpc.calibration import Calibration
from hpc.comm import Single
from hpc.corpus import CorpusError
from hpc.job import Job, Refusal
from hpc.journal import JournalIndex, decode
from hpc.leader import Leader
from hpc.loader import Loader
from hpc.model import user_cache
from hpc.outline import Outline, outline
from hpc.place import Place
from hpc.plan import Arrangement, arrange
from hpc.predict import Workload, interval, run
from hpc.progress import Events, duration
from hpc.rundir import RunDirectory
from hpc.stop import Stop
from hpc.store import TokenStore

Ints = npt.NDArray[np.int64]

MERGE_ROW_S = 4e-5
"""Seconds that rank 0 takes to gather and write a row."""
DRAWS = 9
"""Draws of output lengths behind an interval."""
LEAST_KNOWN = 32
"""Completions from which output lengths are drawn; with fewer, rows are taken to run to their limits."""
MOST_RANKS = 1024


@dataclass(frozen=True)
class Prediction:
    """What a job takes on a number of ranks; times in seconds."""

    ranks: int
    low_s: float
    seconds: float
    """The median of the draws, as `low_s` and `high_s` are their 10th and 90th percentile."""
    high_s: float
    rank_hours: float
    speedup: float
    """Over one rank."""
    efficiency: float
    """Of the ranks' time, the share that one rank would need too."""
    idle: float
    """Share of the ranks' time in which they wait for the last one."""


@dataclass(frozen=True)
class Forecast:
    """What is known of a job before it runs."""

    rows: int
    refused: int
    refusals: dict[str, int]
    """Refused rows by kind."""
    done: int
    duplicates: int
    requests: int
    prompt_tokens: int
    shared_tokens: int
    """Prompt tokens among them that are computed once for many."""
    longest_prompt: int
    most_new_tokens: int
    lengths_from: str
    """Where the lengths of the outputs come from."""
    calibration: str
    load_s: float
    predictions: list[Prediction]


def forecast(job: Job, loader: Loader, given: Path | None = None) -> Forecast:
    """Read the corpus of a job and predict; raise `Refusal` where it cannot be done."""
    try:
        files = corpus.find(job.corpus)
    except CorpusError as error:
        raise Refusal(str(error)) from error
    directory = RunDirectory(run_path(job, files))
    directory.create()
    directory.acquire(job.force)
    try:
        tokens, index, found = _read(job, directory, files, loader, given)
        outlined = outline(tokens, index)
        predictions, lengths_from = predict_all(job, tokens, index, outlined, found)
        return _put_together(tokens, outlined, predictions, lengths_from, found, job)
    finally:
        directory.release()


def _read(
    job: Job, directory: RunDirectory, files: tuple[Path, ...], loader: Loader, given: Path | None
) -> tuple[TokenStore, JournalIndex, Calibration]:
    if job.engine != "native":
        raise Refusal(f"the steps of the {job.engine} engine are not known; a prediction is for --engine native")
    model = loader.resolve(job.model)
    if given is not None:
        found = calibration.read(given)
    else:
        known = calibration.find(user_cache() / "calibrations", model.revision, job.dtype)
        if not known:
            raise Refusal(
                f"no run has measured {job.model} in {job.dtype} yet: on a node like those it will run on, run "
                "`scattergen run` with the same flags and --limit 64 (its completions count), then ask again"
            )
        found = known[0]
    leader = Leader(Single(), Stop())
    events = Events(Path(os.devnull))
    attempt = Attempt(
        job, leader, loader, directory, 0, files, model, {}, Place("", 0, 1), events, time.monotonic(), {}, None
    )
    index = JournalIndex(directory.journals())
    tokens = pipeline.read_corpus(attempt, index)
    if tokens is None:
        raise Refusal("stopped")
    return tokens, index, found


def predict_all(
    job: Job, tokens: TokenStore, index: JournalIndex, outlined: Outline, found: Calibration
) -> tuple[list[Prediction], str]:
    """Predict for 1, 2, 4, … ranks, until more would not help; say where the output's lengths come from."""
    prompts = tokens.prompts(outlined.asked)
    pending = np.searchsorted(outlined.asked, outlined.pending)
    samples = prompts.samples[pending]
    most_new = prompts.new_tokens[pending]
    draws, lengths_from = _draws(most_new, tokens, index)
    predictions: list[Prediction] = []
    ranks = 1
    while ranks <= max(1, min(MOST_RANKS, len(pending))):
        arranged = arrange(prompts, pending, job, ranks)
        alone = predictions[0].seconds if predictions else None
        rows = outlined.work.rows
        predictions.append(_predict(ranks, arranged, prompts.lengths[pending], samples, draws, found, rows, alone))
        best = min(prediction.seconds for prediction in predictions)
        if predictions[-1].seconds > 0.98 * best and ranks > 1 and predictions[-1].efficiency < 0.3:
            break
        ranks *= 2
    return predictions, lengths_from


def _predict(
    ranks: int,
    arranged: Arrangement,
    lengths: Ints,
    samples: Ints,
    draws: list[Ints],
    found: Calibration,
    rows: int,
    alone: float | None,
) -> Prediction:
    """Predict for one number of ranks; `alone` is what one rank takes."""
    idle = []
    # The samples of a prompt share all of it but its last token.
    several = samples > 1
    prefixes = np.where(several, lengths - 1, arranged.prefixes)
    groups = np.where(several, arranged.groups.max(initial=0) + 1 + np.arange(len(lengths)), arranged.groups)

    def seconds(new: Ints) -> float:
        work = Workload(lengths, prefixes, groups, new, samples)
        clocks = run(found.costs, found.engine, work, arranged.shards, arranged.costs)
        idle.append(1 - sum(clocks) / (ranks * max(clocks)) if max(clocks) else 0.0)
        return found.load_s + max(clocks) + MERGE_ROW_S * rows

    low, middle, high = interval(seconds, draws)
    alone = alone or middle
    return Prediction(
        ranks, low, middle, high, ranks * middle / 3600, alone / middle, alone / middle / ranks, float(np.median(idle))
    )


def _draws(most_new: Ints, tokens: TokenStore, index: JournalIndex) -> tuple[list[Ints], str]:
    """Return the tokens that requests may generate: their limits, or limits times what was seen so far of them."""
    rows = np.flatnonzero(tokens.good)
    numbers = index.find(tokens.keys[rows])
    known = np.unique(numbers[numbers >= 0])[:2048]
    shares = []
    limits = dict(zip(rows.tolist(), tokens.prompts(rows).new_tokens.tolist(), strict=True))
    for record in index.read(known.tolist()):
        completion = decode(record)
        if completion.error is None and completion.row in limits:
            shares.append(min(1.0, completion.num_tokens / max(1, limits[completion.row])))
    if len(shares) < LEAST_KNOWN:
        return [most_new], "max_new_tokens: at most so long"
    random = np.random.default_rng(0)
    drawn = [np.maximum(1, (most_new * random.choice(shares, len(most_new))).astype(np.int64)) for _ in range(DRAWS)]
    return drawn, f"{len(shares):,} completions of this run"


def _put_together(
    tokens: TokenStore,
    outlined: Outline,
    predictions: list[Prediction],
    lengths_from: str,
    found: Calibration,
    job: Job,
) -> Forecast:
    prompts = tokens.prompts(outlined.pending)
    asked = tokens.prompts(outlined.asked)
    arranged = arrange(asked, np.searchsorted(outlined.asked, outlined.pending), job, 1)
    return Forecast(
        rows=tokens.num_rows,
        refused=outlined.work.refused,
        refusals=dict(Counter(error["kind"] for _, error in tokens.errors())),
        done=outlined.work.done,
        duplicates=outlined.work.duplicates,
        requests=outlined.work.requests,
        prompt_tokens=int(prompts.lengths.sum()),
        shared_tokens=int(arranged.prefixes.sum()),
        longest_prompt=int(prompts.lengths.max(initial=0)),
        most_new_tokens=int((prompts.new_tokens * prompts.samples).sum()),
        lengths_from=lengths_from,
        calibration=str(found),
        load_s=found.load_s,
        predictions=predictions,
    )


def show(found: Forecast, deadline_min: float | None = None) -> None:
    """Print a forecast as a table, with the answer to how many ranks to ask for."""
    from rich.console import Console
    from rich.table import Table

    console = Console(highlight=False)
    kinds = "".join(f", {count:,} {kind}" for kind, count in sorted(found.refusals.items()))
    console.print(
        f"{found.rows:,} rows: {found.refused:,} refused{kinds}; {found.done:,} done before, {found.duplicates:,} "
        f"duplicates, {found.requests:,} requests to generate\n{found.prompt_tokens:,} prompt tokens "
        f"({found.shared_tokens:,} of them shared), the longest prompt {found.longest_prompt:,}; at most "
        f"{found.most_new_tokens:,} new tokens\nlengths of the outputs: {found.lengths_from}\n"
        f"measured on: {found.calibration}; loading takes {found.load_s:.0f} s"
    )
    table = Table()
    for title in ("ranks", "time", "10-90 %", "rank hours", "speed-up", "efficiency", "idle at the end"):
        table.add_column(title, justify="right")
    for p in found.predictions:
        table.add_row(
            f"{p.ranks:,}", duration(p.seconds), f"{duration(p.low_s)} - {duration(p.high_s)}", f"{p.rank_hours:,.2f}",
            f"{p.speedup:.1f}", f"{p.efficiency:.0%}", f"{p.idle:.1%}",
        )  # fmt: skip
    console.print(table)
    console.print(advice(found, deadline_min))


def advice(found: Forecast, deadline_min: float | None) -> str:
    """Say how many ranks to ask for, and for how long."""
    if not found.requests:
        return "Nothing is left to generate."
    fastest = min(found.predictions, key=lambda p: p.seconds)
    text = f"Fastest: {fastest.ranks:,} ranks, {duration(fastest.seconds)}; with more, start-up eats the gain."
    asked = fastest
    if deadline_min is not None:
        meeting = [p for p in found.predictions if p.high_s <= 60 * deadline_min]
        if not meeting:
            return f"{text} No number of ranks meets {duration(60 * deadline_min)}."
        asked = min(meeting, key=lambda p: p.rank_hours)
        text += f" Cheapest within {duration(60 * deadline_min)}: {asked.ranks:,} ranks, {duration(asked.seconds)}."
    minutes = int(asked.high_s * 1.25 / 60) + 5
    return f"{text} Ask for {asked.ranks:,} ranks and --slurm.time-min {minutes}."


def to_json(found: Forecast) -> str:
    """Return a forecast for programs."""
    values: dict[str, Any] = asdict(found)
    return json.dumps(values, indent=2)
