"""The actions of the verbs: each takes the dataclass of its verb and returns the exit code."""

import logging
import sys
import traceback
from collections.abc import Callable
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, NoReturn

from hpc.cli import verbs
from hpc.exit import OK, REFUSED, Refusal
from hpc.job import Job
from hpc.model.loader import Loader
from hpc.mpi.comm import Comm
from hpc.mpi.signals import Stop
from hpc.mpi.world import connect, is_alone, launched_rank
from hpc.pipeline import generate
from hpc.rundir import log
from hpc.slurm.queue import has_slurm

LOGGER = logging.getLogger(__name__)


def run(command: verbs.Run, loader: Loader | None) -> int:
    """Run a job on this rank; return the exit code, which is 0 on every rank above 0."""

    def work(world: Comm, stop: Stop) -> int:
        code = generate(command.job, world, loader or Loader(), stop, has_slurm() if world.rank == 0 else None)
        log.note_lost()
        return code

    return _on_ranks(command.job, work)


def doctor(command: verbs.Doctor, loader: Loader | None) -> int:
    """Check the allocation on all ranks."""
    from hpc.doctor.examine import examine

    return _on_ranks(command.job, lambda world, _: examine(command.job, world, loader or Loader()))


def calibrate(command: verbs.Calibrate, loader: Loader | None) -> int:
    """Measure steps on all ranks."""
    from hpc.forecast.calibrate import calibrate

    return _on_ranks(command.job, lambda world, _: calibrate(command.job, world, loader or Loader(), command.seconds))


def script(command: verbs.Script, loader: Loader | None) -> int:
    """Print the batch script of a job."""
    from hpc.slurm.script import prepare_run

    text = prepare_run(command.job, _program(loader))
    sys.stdout.flush()
    sys.stdout.buffer.write(text.encode("utf-8", "surrogateescape"))  # its paths, whatever the terminal takes
    return OK


def submit(command: verbs.Submit, loader: Loader | None) -> int:
    """Resolve the model here, and submit the job."""
    from hpc.model.find import with_template
    from hpc.slurm.submit import show_log, submit_script

    log.configure(0, 1)
    model = with_template((loader or Loader()).resolve(command.job.model), command.job.chat_template)
    verb = "doctor" if command.doctor else "run"
    job_id, path = submit_script(command.job, model, _program(loader), verb)
    print(f"Slurm job {job_id}\n{path}", flush=True)
    return show_log(job_id, path) if command.doctor else OK


def plan(command: verbs.Plan, loader: Loader | None) -> int:
    """Print the predicted time and memory of a job."""
    from hpc.forecast import show
    from hpc.forecast.forecast import forecast, to_json

    log.configure(0, 1)
    found = forecast(
        command.job,
        loader or Loader(),
        command.calibration,
        command.ranks_on_node,
        command.deadline_min,
        command.gpu_gib,
    )
    if command.json:
        print(to_json(found))
    else:
        show.show(found, command.deadline_min)
    if command.plot is not None:
        show.plot(found, command.plot)
    return OK


def settle(command: verbs.Settle, loader: Loader | None) -> int:  # noqa: ARG001  (one signature for all)
    """Return whether the Slurm job is to be requeued, as an exit code."""
    from hpc.slurm.requeue import requeue

    return requeue(command.job, has_slurm())


def fetch(command: verbs.Fetch, loader: Loader | None) -> int:
    """Store a model and print its path."""
    log.configure(0, 1)
    print((loader or Loader()).resolve(command.model).path)
    return OK


def status(command: verbs.Status, loader: Loader | None) -> int:  # noqa: ARG001
    """Print the progress of a run."""
    from hpc.report.status import status

    return status(command.run, command.follow)


def verify(command: verbs.Verify, loader: Loader | None) -> int:  # noqa: ARG001
    """Check the accounting of a run."""
    from hpc.model.token_bytes import token_bytes
    from hpc.output.verify import verify_run

    return verify_run(command.run, token_bytes, command.where)


def merge(command: verbs.Merge, loader: Loader | None) -> int:  # noqa: ARG001
    """Write the output of a run from its journals."""
    from hpc.model.token_bytes import token_bytes
    from hpc.output.verify import merge_run

    return merge_run(command.run, token_bytes, command.where, command.force)


def report(command: verbs.Report, loader: Loader | None) -> int:  # noqa: ARG001
    """Print where the time of a run went."""
    from hpc.report.report import report

    return report(command.runs, command.html)


def show(command: verbs.Show, loader: Loader | None) -> int:  # noqa: ARG001
    """Print rows of a run."""
    from hpc.report.show import show

    return show(command.run, command.where, command.id, command.sample, command.rows, command.whole)


def cancel(command: verbs.Cancel, loader: Loader | None) -> int:  # noqa: ARG001
    """Stop the job that runs in a run directory."""
    from hpc.slurm.cancel import cancel

    return cancel(command.run)


@dataclass(frozen=True)
class Verb:
    """The flags and the action of a verb."""

    takes: type
    does: Callable[[Any, Loader | None], int]
    on_ranks: bool = False
    """Whether all ranks of an MPI job do it. The other verbs only print, and fail if that is lost."""

    @property
    def has_job(self) -> bool:
        """Whether it takes a job's flags."""
        return any(each.name == "job" for each in fields(self.takes))


VERBS = {
    "run": Verb(verbs.Run, run, on_ranks=True),
    "plan": Verb(verbs.Plan, plan),
    "script": Verb(verbs.Script, script),
    "submit": Verb(verbs.Submit, submit),
    "doctor": Verb(verbs.Doctor, doctor, on_ranks=True),
    "calibrate": Verb(verbs.Calibrate, calibrate, on_ranks=True),
    "settle": Verb(verbs.Settle, settle),
    "status": Verb(verbs.Status, status),
    "verify": Verb(verbs.Verify, verify),
    "merge": Verb(verbs.Merge, merge),
    "report": Verb(verbs.Report, report),
    "show": Verb(verbs.Show, show),
    "cancel": Verb(verbs.Cancel, cancel),
    "fetch": Verb(verbs.Fetch, fetch),
}
HIDDEN = "settle"
"""The verb of batch scripts, which no list of verbs names."""


def refuse(message: str, quiet: bool = False) -> NoReturn:
    """Print a message and exit with 2; with `quiet`, on ranks above 0, only exit with 0."""
    if not quiet:
        print(f"scattergen: {message}", file=sys.stderr, flush=True)
    sys.exit(0 if quiet else REFUSED)


def _program(loader: Loader | None) -> tuple[str, ...]:
    """Return the command for the nodes; a program with its own loader runs itself there."""
    from hpc.slurm.script import PROGRAM

    return PROGRAM if loader is None else (sys.executable, str(Path(sys.argv[0]).absolute()))


def _on_ranks(job: Job, work: Callable[[Comm, Stop], int]) -> int:
    """Do the work of this rank and return its exit code; an exception ends all ranks."""
    try:
        world = is_alone() if job.share else connect()
    except Refusal as refusal:
        refuse(str(refusal), launched_rank() > 0)
    stop = Stop()
    stop.listen()
    log.configure(world.rank, world.size)
    try:
        return work(world, stop)
    except Refusal as refusal:
        refuse(str(refusal))
    except Exception as error:
        _abort(world, error)


def _abort(world: Comm, error: Exception) -> NoReturn:
    """End all ranks with one message; the traceback goes to this rank's log."""
    LOGGER.debug("%s", traceback.format_exc())
    world.abort(f"scattergen: rank {world.rank} of {world.size} failed: {type(error).__name__}: {error}")
