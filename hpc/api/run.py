"""`hpc.run`: a whole job, from Python."""

import contextlib
import json
import sys
from typing import Any

from hpc.api.read import read_run
from hpc.corpus.find import corpus_files
from hpc.exit import FAULT, UNFINISHED, Refusal, Unfinished
from hpc.job import Job
from hpc.model.loader import Loader
from hpc.model.verbosity import keeping_verbosity
from hpc.mpi.binding import keeping_environment
from hpc.mpi.comm import Comm
from hpc.mpi.signals import SIGNALS, Stop
from hpc.mpi.world import connect, is_alone, launched_size
from hpc.pipeline import generate
from hpc.rundir import log
from hpc.rundir.directory import RunDirectory, run_path
from hpc.slurm.queue import has_slurm


def run(job: Job, *, loader: Loader | None = None) -> dict[str, Any] | None:
    """Run a whole job, as `scattergen run` does; return its summary.

    >>> job = Job(model="MODEL", corpus=("prompts.jsonl",), sampling=SamplingParams(max_new_tokens=8))
    >>> summary = run(job)
    >>> summary["rows"], summary["errors"]
    (2, 0)

    It goes on with what is in the run directory, which is below the current folder where the job's `runs` says no
    other. What the command prints goes to standard error. Started by mpirun or srun, every process calls it: rank 0
    returns the summary, and the others None. So does a share of a job (`share`) that leaves rows to other shares.

    Raises `hpc.Refusal` where nothing was begun; `hpc.Unfinished` when it was told to stop, and `KeyboardInterrupt`
    when that was Ctrl-C, everything finished being kept; `RuntimeError` if there are more error rows than the job
    allows. A fault of one of several processes ends all of them.
    """
    world = connect() if launched_size() > 1 and not job.share else is_alone()
    stop = Stop()
    with contextlib.ExitStack() as stack:
        stack.enter_context(keeping_environment())
        stack.enter_context(keeping_verbosity())
        stack.enter_context(log.restoring())
        stack.enter_context(contextlib.redirect_stdout(sys.stderr))
        stack.enter_context(stop.listening(*SIGNALS))
        log.configure(world.rank, world.size)
        code = _generate(job, world, loader or Loader(), stop)
    return None if world.rank else _outcome(job, code, stop)


def _generate(job: Job, world: Comm, loader: Loader, stop: Stop) -> int:
    try:
        return generate(job, world, loader, stop, has_slurm() if world.rank == 0 else None)
    except Refusal:
        raise
    except BaseException as error:
        if world.size > 1:  # the others would wait for this one
            world.abort(f"scattergen: rank {world.rank} of {world.size} failed: {type(error).__name__}: {error}")
        raise


def _outcome(job: Job, code: int, stop: Stop) -> dict[str, Any] | None:
    """Return the summary of a run that is over, or raise what its exit code stands for."""
    directory = RunDirectory(run_path(job, corpus_files(job)))
    if code == UNFINISHED and stop.interrupted:
        raise KeyboardInterrupt
    if code == UNFINISHED:
        why = stop.reason or "the rest would not end within the time limit"
        raise Unfinished(f"{directory.path}: stopped ({why}); run it again to go on")
    if job.share and directory.whole_state != "done":
        return None
    summary: dict[str, Any] = json.loads(directory.summary.read_text(encoding="utf-8"))
    if code == FAULT:
        raise RuntimeError(
            f"{directory.path}: {summary['errors']} of {summary['rows']} rows are error rows, and max_error_rate is "
            f"{job.max_error_rate}; the first says: {_first_error(directory)}"
        )
    return summary


def _first_error(directory: RunDirectory) -> str:
    return next((row["error"]["message"] for row in read_run(directory.path) if row["error"]), "")
