"""A job with the echo engine, for tests that start processes: `mpirun -n 3 python tests/echo_job.py --corpus …`."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

from hpc import main
from hpc.mpi.world import launched_rank
from tests.fakes import echo_from_environment

if __name__ == "__main__":
    if len(sys.argv) < 2 or sys.argv[1].startswith("-"):
        sys.argv.insert(1, "run")
    if "--job" not in sys.argv and sys.argv[1] in ("run", "plan", "script", "submit", "doctor"):
        sys.argv[2:2] = ["--model", "echo"]
    main(loader=echo_from_environment(launched_rank()))
