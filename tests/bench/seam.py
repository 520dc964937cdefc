"""What the seam costs: vLLM inside a rank against vLLM alone, on the same work, in one process, with the same settings.

`make bench-seam` runs it in the environment of `make test-vllm`. Both sides drive one engine, in turn, so that they
share its weights, its settings and the machine's minutes. vLLM alone gets all requests at once and gives tokens; a rank
feeds it piece by piece, makes text, trims it, and writes the journal. On a machine that others use, wall times tell
little: the time of the CPU, of all threads of the process, stands beside them.
"""

import argparse
import json
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from hpc.engine.vllm.engine import VllmEngine
from hpc.executor.gather import OwnRecords
from hpc.executor.generate import completion_maker, generate_shard
from hpc.executor.heartbeat import Every, Heartbeat
from hpc.job import Job
from hpc.model.loader import Loader, Replica
from hpc.mpi.binding import Binding
from hpc.mpi.signals import Stop
from hpc.output.journal import JournalWriter
from hpc.rundir.events import Events
from hpc.rundir.progress import MESSAGE_S, Progress
from tests.bench.__main__ import BENCH, DEMO_MODEL, make_weights, make_workloads
from tests.bench.measure import Ask
from tests.bench.run_native import arranged
from tests.fakes import ListSource

Took = tuple[float, float]
"""Seconds by the clock, and of the CPU."""
Tokens = dict[int, list[int]]


class Handed(ListSource):
    """A rank's backlog, all of which is there."""

    waited_s = 0.0

    def done(self, row: int, num_tokens: int) -> tuple[int, ...]:
        """No row has the request of another."""
        return ()


def alone(engine: Any, asks: Sequence[Ask]) -> Tokens:
    """Have vLLM generate, as its own `LLM.generate` drives it."""
    from vllm import SamplingParams
    from vllm.sampling_params import RequestOutputKind

    for ask in asks:
        asked = SamplingParams(
            temperature=0, max_tokens=ask.max_new, ignore_eos=True, detokenize=False,
            output_kind=RequestOutputKind.FINAL_ONLY,
        )  # fmt: skip
        engine.add_request(str(ask.id), {"prompt_token_ids": ask.prompt}, asked)
    found: Tokens = {}
    while engine.has_unfinished_requests():
        for output in engine.step():
            if output.finished:
                found[int(output.request_id)] = list(output.outputs[0].token_ids)
    return found


def inside(replica: Replica, asks: Sequence[Ask], job: Job, folder: Path) -> Tokens:
    """Have a rank generate, as it does between the first piece and the last."""
    path, progress = folder / f"{time.monotonic_ns()}.jsonl", Progress()
    journal = JournalWriter(path)
    beat = Heartbeat(
        Stop(), lambda: None, journal, Events(path.with_suffix(".events")), progress, Every(MESSAGE_S, lambda: None)
    )
    finish, found = completion_maker(replica.eos_token_ids, replica.decode), Tokens()

    def keeping(samples: Any) -> Any:
        found[int(samples[0].request.id)] = list(samples[0].token_ids)
        return finish(samples)

    backlog: Any = Handed(arranged(asks, job))
    generate_shard(replica.engine, backlog, journal, OwnRecords(path), progress, beat, keeping)
    return found


def timed(side: Callable[[Sequence[Ask]], Tokens], asks: Sequence[Ask]) -> tuple[Took, Tokens]:
    """Return what a side took for some requests, and gave."""
    clock, cpu = time.perf_counter(), time.process_time()
    found = side(asks)
    return (time.perf_counter() - clock, time.process_time() - cpu), found


def main() -> None:
    """Measure in turn, and print the medians and their ratio."""
    parser = argparse.ArgumentParser("python -m tests.bench.seam", description=__doc__.splitlines()[0])
    parser.add_argument("--workload", default="W1", help="W1 to W4, or a part of one: W1q, W1p")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=min(2, len(os.sched_getaffinity(0))))
    parser.add_argument("--dtype", default="float32")
    told = parser.parse_args()
    weights, works = make_weights(DEMO_MODEL), BENCH / "workloads"
    if not (works / "W1.json").exists():
        make_workloads(weights.folder, works, quick=False)
    work = json.loads((works / f"{told.workload}.json").read_text())
    asks, warm = ([Ask(**row) for row in work[name]] for name in ("asks", "warmup"))
    job = Job(str(weights.folder), ("unused",), engine="vllm", device="cpu", dtype=told.dtype)
    replica = Loader().load(job, weights.folder, Binding("localhost", 0, told.threads))
    assert isinstance(replica.engine, VllmEngine)
    engine = replica.engine._engine
    scheduler = engine.engine_core.engine_core.scheduler
    watched = scheduler.update_from_output

    def raw(some: Sequence[Ask]) -> Tokens:
        del scheduler.update_from_output  # nobody notes its steps
        try:
            return alone(engine, some)
        finally:
            scheduler.update_from_output = watched

    with tempfile.TemporaryDirectory() as name:
        sides = {"alone": raw, "inside": lambda some: inside(replica, some, job, Path(name))}
        took: dict[str, list[Took]] = {side: [] for side in sides}
        given: dict[str, Tokens] = {}
        for number in range(-1, told.rounds):  # the first is for nothing
            for side in sorted(sides, reverse=bool(number % 2)):
                engine.reset_prefix_cache()
                seconds, given[side] = timed(sides[side], asks if number >= 0 else warm)
                if number >= 0:
                    took[side].append(seconds)
                    print(f"round {number + 1}, {side}: {seconds[0]:.2f} s, {seconds[1]:.2f} s of the CPU", flush=True)
    same = sum(given["alone"][ask.id] == given["inside"][ask.id] for ask in asks)
    print(f"{told.workload} ({work['digest']}), {told.dtype}, {told.threads} threads: {same} of {len(asks)} rows alike")
    for index, what in enumerate(("wall time", "CPU time")):
        of = {side: statistics.median(each[index] for each in took[side]) for side in sides}
        pairs = [inner[index] / outer[index] for inner, outer in zip(took["inside"], took["alone"], strict=True)]
        print(
            f"{what}: alone {of['alone']:.2f} s, inside a rank {of['inside']:.2f} s; the ratio's median "
            f"{statistics.median(pairs):.3f} ({min(pairs):.3f} to {max(pairs):.3f}, {len(pairs)} rounds)"
        )
    os._exit(0)  # vLLM's own end takes its time


if __name__ == "__main__":
    main()
