"""Measure the step costs of a model on this node, on all of its ranks at once, and store them."""

import time
from collections.abc import Callable
from dataclasses import asdict, replace
from math import inf
from pathlib import Path
from typing import Any

import numpy as np

from hpc.engine.bounds import Speed
from hpc.engine.registry import ENGINES
from hpc.engine.steps import Measured
from hpc.exit import Refusal
from hpc.forecast.calibration import Calibration, Kind, add_steps
from hpc.job import Job
from hpc.model.find import user_cache
from hpc.model.loader import Loader, Replica
from hpc.mpi.ask import Inquiry, answer
from hpc.mpi.binding import Binding, bind_process, bind_ranks, host_info
from hpc.mpi.comm import Buffer, Comm, pack, unpack

CPU_S, GPU_S = 9.0, 2.5
"""Default duration of a trial. A GPU takes as many steps in less time."""
LOAD = "load"
"""Key of the first question to a rank, which says what to load. The second question is empty and means: measure."""


def calibrate(job: Job, world: Comm, loader: Loader, seconds: float | None = None) -> int:
    """Measure on every rank for `seconds`, print the result on rank 0; return the exit code.

    Raises `Refusal`, on rank 0 only, if there is nothing to measure.
    """
    if world.rank:
        answer(world, host_info(), replies(loader))
        world.close()
        return 0
    inquiry = Inquiry(world)
    try:
        found = lead_calibration(job, inquiry, loader, seconds)
    finally:  # whatever it was, nobody is to wait for more
        inquiry.dismiss()
    world.close()
    show(found)
    return 0


def lead_calibration(job: Job, inquiry: Inquiry, loader: Loader, seconds: float | None = None) -> Calibration:
    """Bind the ranks, load and measure on all of them, and store the calibration."""
    if seconds is not None and not 0 < seconds < inf:
        raise Refusal(f"--seconds {seconds}: it must be more than 0; without it, a trial takes {CPU_S} s")
    places = bind_ranks([host_info(), *inquiry.wait_for_hellos()], job.device != "cpu", job.replica_gpus)
    bind_process(places[0])
    model = loader.resolve(job.model)
    loader.examine(job, model.path)
    dtype: Any = loader.dtype(job)
    job = replace(job, dtype=dtype)
    loader.check(job, model.path, places[0])
    engine: Any = loader.choose_engine(job, model.path, places[0]).engine
    job = replace(job, engine=engine)
    if not ENGINES[job.engine].reports_steps:
        raise Refusal(f"the steps of {job.model} cannot be measured: {job.engine} generates with it")
    what = {"job": asdict(job), "model_path": str(model.path), "seconds": seconds}
    inquiry.ask(lambda rank: {LOAD: {**what, "place": asdict(places[rank])}})
    began = time.monotonic()
    replica = loader.load(job, model.path, places[0])
    load_s = time.monotonic() - began
    inquiry.wait_for_answers()
    if replica.engine.bounds is None or replica.size is None:
        raise Refusal(
            f"the steps of {job.model} cannot be measured: another engine generates with it, or it is quantized"
        )
    inquiry.ask(lambda _: {})
    samples, speed = loader.trial(replica, seconds or _seconds(places[0]))
    for buffer in inquiry.wait_for_answers():
        samples += [tuple(row) for row in unpack(buffer)[1]["samples"].tolist()]
    own = places[0]
    kind = Kind(
        model.revision, job.dtype, replica.device, own.threads, own.ranks_on_node, job.engine, job.replica_devices
    )
    bounds = replica.engine.bounds
    return add_steps(user_cache() / "calibrations", kind, bounds, replica.size, load_s, trial=samples, speed=speed)


def replies(loader: Loader) -> Callable[[dict[str, Any]], Buffer]:
    """Return how a rank other than 0 answers questions: it loads first, then measures."""
    loaded: list[tuple[Replica, float]] = []

    def reply(question: dict[str, Any]) -> Buffer:
        if LOAD in question:
            values = question[LOAD]
            own = Binding(**values["place"])
            bind_process(own)
            replica = loader.load(Job.from_json(values["job"]), Path(values["model_path"]), own)
            loaded.append((replica, values["seconds"] or _seconds(own)))
            return pack()
        samples: list[Measured] = loader.trial(*loaded[0])[0]
        return pack(samples=np.array(samples, dtype=np.float64).reshape(-1, 5))

    return reply


def _seconds(own: Binding) -> float:
    return GPU_S if own.gpus else CPU_S


def show(found: Calibration) -> None:
    """Print a calibration."""
    costs, engine, speed = found.costs, found.engine, found.speed or Speed(0, 0)
    print(f"{found}; loading takes {found.load_s:.1f} s")
    if found.speed is not None:
        print(f"reads {speed.bytes_per_s / 1e9:,.1f} GB/s and computes {speed.flops_per_s / 1e9:,.0f} GFLOP/s a rank")
    for rows in (1, 8, 32, 128, 256):
        if rows <= engine.max_seqs:
            seconds = costs.step(rows, rows, 0, rows * 256)
            print(f"decode, {rows} rows of 256 tokens: {1e3 * seconds:.1f} ms a step, {rows / seconds:,.0f} tokens/s")
    count = min(512, engine.step_tokens)
    for behind in (0, 4096):
        seconds = costs.step(count, 0, count * (behind + count / 2), 0)
        print(f"prefill, {count} tokens behind {behind:,}: {1e3 * seconds:.0f} ms, {count / seconds:,.0f} tokens/s")
