"""Many jobs in one launch: `mpirun -n 3 python tests/many_jobs.py JOBS` runs the jobs of the JSON file JOBS in turn.

Each process that imports torch and transformers takes seconds for it: tests that look at outputs alone share them.
A job whose model is "echo" has the echo engine; one with "ranks" is run by so many, the first ones, in a world of their
own. Exit codes are the last line of rank 0's output.
"""

import json
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

from hpc.exit import REFUSED, Refusal
from hpc.job import Job
from hpc.model.loader import Loader
from hpc.mpi.comm import Comm, wait_for
from hpc.mpi.signals import Stop
from hpc.mpi.world import World, connect
from hpc.pipeline import generate
from tests.fakes import EchoLoader


def run(job: Job, world: Comm) -> int:
    """Run one job; return this rank's exit code."""
    try:
        return generate(job, world, EchoLoader() if job.model == "echo" else Loader(), Stop())
    except Refusal as refusal:
        print(refusal, file=sys.stderr, flush=True)
        return REFUSED
    except Exception as error:
        world.abort(f"{job.name}: {error!r}")


def worlds(jobs: list[dict[str, Any]], world: Comm) -> dict[int, Comm | None]:
    """The world of the first ranks, by their number; None on the other ranks."""
    made: dict[int, Comm | None] = {world.size: world}
    for ranks in sorted({job.get("ranks", world.size) for job in jobs} - {world.size}):
        from mpi4py import MPI

        inside = world.rank < ranks
        split = MPI.COMM_WORLD.Split(0 if inside else MPI.UNDEFINED, world.rank)
        made[ranks] = World(SimpleNamespace(**{**vars(MPI), "COMM_WORLD": split})) if inside else None
    return made


if __name__ == "__main__":
    world = connect()
    jobs = json.loads(Path(sys.argv[1]).read_text())
    world_of = worlds(jobs, world)
    codes = []
    for values in jobs:
        its_world = world_of[values.pop("ranks", world.size)]
        if its_world is not None:
            codes.append(run(Job.from_json(values), its_world))
    if world.size > 1:  # a rank that ends early would spin in Finalize, on a core that another needs
        from mpi4py import MPI

        wait_for(MPI.COMM_WORLD.Ibarrier().Test)
    if world.rank == 0:
        print(json.dumps(codes), flush=True)
