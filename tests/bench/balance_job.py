"""A job of the balance benchmark: the model, or the paced engine, with one slow rank if BALANCE_SLOW names it.

With the model, BALANCE_PIN binds each rank to the core of its number; what makes a core slow is started beside it.
"""

import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))

from hpc import main
from hpc.mpi.world import launched_rank
from tests.bench.paced import PacedLoader

if __name__ == "__main__":
    rank = launched_rank()
    if "BALANCE_PIN" in os.environ:
        os.sched_setaffinity(0, {sorted(os.sched_getaffinity(0))[int(os.environ["BALANCE_PIN"]) + rank]})
    slowness = 2.0 if os.environ.get("BALANCE_SLOW") == str(rank) else 1.0
    main(loader=PacedLoader(slowness) if "BALANCE_PACED" in os.environ else None)
