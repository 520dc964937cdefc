"""Many jobs in one launch: `mpirun -n 3 python tests/many_jobs.py JOBS` runs the jobs of the JSON file JOBS in turn.

Each process that imports torch and transformers takes seconds for it: tests that look at outputs alone share them.
A job whose model is "echo" has the echo engine. Exit codes are the last line of rank 0's output.
"""

import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

from hpc.exit import REFUSED, Refusal
from hpc.job import Job
from hpc.model.loader import Loader
from hpc.mpi.comm import Comm
from hpc.mpi.signals import Stop
from hpc.mpi.world import connect
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


if __name__ == "__main__":
    world = connect()
    codes = [run(Job.from_json(values), world) for values in json.loads(Path(sys.argv[1]).read_text())]
    if world.rank == 0:
        print(json.dumps(codes), flush=True)
