"""The end of a batch script: whether its job goes back into the queue. Decided by the run directory alone."""

import json
import sys
from pathlib import Path

from hpc.allocation import Allocation, Share
from hpc.job import Job
from hpc.pipeline import FAULT, OK, UNFINISHED
from hpc.rundir import RunDirectory


def settle(job: Job, allocation: Allocation | None) -> int:
    """Say, and return as an exit code, what is to become of the job: 0 done, 75 requeue, 1 neither.

    It goes on only if its latest attempt finished something: what stands in the way of one attempt
    stands in the way of the next.
    """
    directory = RunDirectory(Path(job.runs) / job.name, Share.of(job.share))
    state = directory.state
    if state == "done":
        return OK
    if state not in ("drained", "running"):  # running: killed before it could write another word
        return _end(f"{directory.path} is {state}")
    if directory.cancelled.exists():
        return _end(f"{directory.path} was cancelled")
    if allocation is None or not _got_on(directory, allocation):
        return _end(f"work is left in {directory.path}, but this attempt finished none of it")
    if allocation.restarts >= job.slurm.max_requeues:
        return _end(f"work is left in {directory.path}, but the job was requeued {allocation.restarts} times already")
    _say(f"work is left in {directory.path}: job {allocation.job_id} goes back into the queue")
    return UNFINISHED


def _got_on(directory: RunDirectory, allocation: Allocation) -> bool:
    """Return whether the attempt of this very job, since it was last started, has written completions."""
    number = directory.next_attempt() - 1
    try:
        with open(directory.events(number, 0), encoding="utf-8") as file:
            event = json.loads(file.readline())
    except (OSError, ValueError):
        return False
    own = (event.get("slurm_job"), event.get("restarts")) == (allocation.job_id, allocation.restarts)
    return own and any(path.stat().st_size for path in directory.journals_of(number))


def _end(why: str) -> int:
    _say(f"{why}: the job is not requeued; `scattergen submit` goes on")
    return FAULT


def _say(text: str) -> None:
    print(f"scattergen: {text}", file=sys.stderr, flush=True)
