"""Calibrate: measure what the steps of a model cost on this node, all of its ranks at once, and keep it."""

import time
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
from hpc.mpi.binding import Binding, bind_process, bind_ranks, host_info
from hpc.mpi.comm import Buffer, Comm, Message, Tag, pack, unpack, wait_for

CPU_S, GPU_S = 9.0, 2.5
"""How long a trial takes where nobody says."""


def calibrate(job: Job, world: Comm, loader: Loader, seconds: float | None = None) -> int:
    """Measure on every rank for so many seconds, print on rank 0 what was found; return the exit code.

    Raises `Refusal`, on rank 0 alone, where there is nothing to measure.
    """
    if world.rank:
        follow_calibration(world, loader)
        return 0
    try:
        found = lead_calibration(job, world, loader, seconds)
    finally:  # whatever it was, nobody is to wait for more
        for rank in range(1, world.size):
            world.send(rank, Tag.BYE, pack())
    world.close()
    show(found)
    return 0


def lead_calibration(job: Job, world: Comm, loader: Loader, seconds: float | None = None) -> Calibration:
    """Place the ranks, load and measure with them all, and keep what was found."""
    if seconds is not None and not 0 < seconds < inf:
        raise Refusal(f"--seconds {seconds}: it must be more than 0; without it, a trial takes {CPU_S} s")
    others = range(1, world.size)
    answers: dict[int, Buffer] = {}

    def wait_for_all() -> list[Buffer]:
        def all_here() -> bool:
            answers.update((message.source, message.array) for message in world.poll())
            return len(answers) == len(others)

        wait_for(all_here)
        found = [answers[rank] for rank in others]
        answers.clear()
        return found

    hellos = [host_info(), *wait_for_all()]
    places = bind_ranks(hellos, job.device != "cpu")
    bind_process(places[0])
    model = loader.resolve(job.model)
    loader.examine(job, model.path)
    dtype: Any = loader.dtype(job)
    job = replace(job, dtype=dtype)
    engine: Any = loader.choose_engine(job, model.path, places[0]).engine
    job = replace(job, engine=engine)
    if not ENGINES[job.engine].reports_steps:
        raise Refusal(f"the steps of {job.model} cannot be measured: {job.engine} generates with it")
    for rank in others:
        values = {
            "job": asdict(job), "model_path": str(model.path), "place": asdict(places[rank]), "seconds": seconds
        }  # fmt: skip
        world.send(rank, Tag.JOB, pack(values))
    began = time.monotonic()
    replica = loader.load(job, model.path, places[0])
    load_s = time.monotonic() - began
    wait_for_all()
    if replica.engine.bounds is None or replica.size is None:
        raise Refusal(
            f"the steps of {job.model} cannot be measured: another engine generates with it, or it is quantized"
        )
    for rank in others:
        world.send(rank, Tag.START, pack())
    samples, speed = loader.trial(replica, seconds or _seconds(places[0]))
    for buffer in wait_for_all():
        samples += [tuple(row) for row in unpack(buffer)[1]["samples"].tolist()]
    kind = Kind(model.revision, job.dtype, replica.device, places[0].threads, places[0].ranks_on_node, job.engine)
    bounds = replica.engine.bounds
    return add_steps(user_cache() / "calibrations", kind, bounds, replica.size, load_s, trial=samples, speed=speed)


def follow_calibration(world: Comm, loader: Loader) -> None:
    """Do what rank 0 says until it says goodbye."""
    world.send(0, Tag.HELLO, host_info())
    replica: Replica | None = None
    seconds = CPU_S

    def take(message: Message) -> bool:
        nonlocal replica, seconds
        if message.tag == Tag.JOB:
            values = unpack(message.array)[0]
            own = Binding(**values["place"])
            bind_process(own)
            seconds = values["seconds"] or _seconds(own)
            replica = loader.load(Job.from_json(values["job"]), Path(values["model_path"]), own)
            world.send(0, Tag.DONE, pack())
        elif message.tag == Tag.START and replica is not None:
            samples: list[Measured] = loader.trial(replica, seconds)[0]
            world.send(0, Tag.ROWS, pack(samples=np.array(samples, dtype=np.float64).reshape(-1, 5)))
        return message.tag == Tag.BYE

    wait_for(lambda: any(list(map(take, world.poll()))))
    world.close()


def _seconds(own: Binding) -> float:
    return CPU_S if own.gpu is None else GPU_S


def show(found: Calibration) -> None:
    """Print what was found."""
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
