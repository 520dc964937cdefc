"""Decide at the end of a batch script whether its job is requeued, from the run directory alone."""

import json
import sys
from pathlib import Path

from hpc.exit import FAULT, OK, UNFINISHED
from hpc.job import Job, Share
from hpc.rundir.directory import RunDirectory
from hpc.slurm.allocation import Allocation


def requeue(job: Job, allocation: Allocation | None) -> int:
    """Print what happens to the job and return it as an exit code: 0 done, 75 requeue, 1 neither.

    It is requeued only if its latest attempt finished a row: the next one would meet the same obstacle.
    """
    directory = RunDirectory(Path(job.runs) / job.name, Share.of(job.share))
    state = directory.state
    if allocation is not None and _was_refused(directory, allocation):
        return _end(f"{directory.path} is {state}, and this job was refused; its log says why")
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
    """Return whether this job's attempt, since its last start, has written completions."""
    own = bool(_own_phases(directory, allocation))
    return own and any(path.stat().st_size for path in directory.journals_of(directory.next_attempt() - 1))


def _was_refused(directory: RunDirectory, allocation: Allocation) -> bool:
    """Return whether this job's attempt was refused because of its corpus."""
    return "refused" in _own_phases(directory, allocation)


def _own_phases(directory: RunDirectory, allocation: Allocation) -> list[str]:
    """Return the phases of the latest attempt if this job made it since its last start; else nothing."""
    try:
        with open(directory.events(directory.next_attempt() - 1, 0), encoding="utf-8") as file:
            events = [json.loads(line) for line in file]
    except (OSError, ValueError):
        return []
    own = (allocation.job_id, allocation.restarts)
    is_own = events and (events[0].get("slurm_job"), events[0].get("restarts")) == own
    return [event["phase"] for event in events] if is_own else []


def _end(why: str) -> int:
    _say(f"{why}: the job is not requeued; `scattergen submit` goes on")
    return FAULT


def _say(text: str) -> None:
    print(f"scattergen: {text}", file=sys.stderr, flush=True)
