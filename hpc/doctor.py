"""Doctor: check an allocation, on all of its ranks, before hours are spent in it."""

from hpc.comm import Comm
from hpc.job import Job
from hpc.loader import Loader


def examine(job: Job, world: Comm, loader: Loader) -> int:
    """Check the allocation."""
    raise NotImplementedError
