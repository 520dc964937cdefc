"""The command line: verbs, flags, exit codes. The only place that reads arguments."""

import json
import logging
import socket
import sys
import traceback
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, NoReturn

from hpc.exit import FAULT, OK, REFUSED, Refusal
from hpc.job import Job
from hpc.model.loader import Loader
from hpc.mpi.comm import Comm
from hpc.mpi.signals import Stop
from hpc.mpi.world import connect, is_alone, launched_rank
from hpc.pipeline import generate
from hpc.rundir import log, terminal
from hpc.rundir.directory import run_path
from hpc.slurm.queue import has_slurm

LOGGER = logging.getLogger(__name__)


@dataclass(frozen=True)
class Status:
    """Say how far a run is, from its run directory alone."""

    run: Path
    """The run directory."""
    follow: bool = False
    """Keep showing it until it ends."""


@dataclass(frozen=True)
class Verify:
    """Prove the accounting of a run: exit 0 if every row is right, 1 if one is wrong, 75 if it is unfinished."""

    run: Path
    """The run directory."""


@dataclass(frozen=True)
class Merge:
    """Write the completions of a run from its journals, completions.partial.jsonl while rows are missing."""

    run: Path
    """The run directory."""


@dataclass(frozen=True)
class Report:
    """Say where the time of a run went, on the terminal and as report.html; of two runs, compare them."""

    runs: tuple[Path, ...]
    """The run directory, or two."""
    html: bool = True
    """Write the page."""


@dataclass(frozen=True)
class Cancel:
    """Stop a run, so that nothing finished is lost, and cancel its Slurm job."""

    run: Path
    """The run directory."""


@dataclass(frozen=True)
class Fetch:
    """Resolve and store a model, on a machine that has a way to the hub; print where it is."""

    model: str
    """A hub id, a model directory or a .gguf file."""


@dataclass(frozen=True)
class Script(Job):
    """Print the batch script of a job, and write what it needs into the run directory: give it to sbatch."""


@dataclass(frozen=True)
class Submit(Job):
    """Submit a job to Slurm: the bytes that `script` prints; print Slurm's id and the run directory."""

    doctor: bool = False
    """Submit a check of the allocation instead, wait for it, and print what it says."""


@dataclass(frozen=True)
class Plan(Job):
    """Say what a job will take on 1, 2, 4, … ranks: from its corpus, and from what the steps of earlier runs took."""

    json: bool = False
    """Print it for programs."""
    deadline_min: float | None = None
    """Minutes within which the job is to end: find the cheapest number of ranks that does."""
    calibration: Path | None = None
    """File of a calibration; else one of this model in the user's cache."""
    plot: Path | None = None
    """File for a picture of time and efficiency over ranks: .svg, .png or .pdf."""
    ranks_on_node: int | None = None
    """Ranks that share a node, as when it was calibrated; else --slurm.tasks-per-node."""


@dataclass(frozen=True)
class Doctor(Job):
    """Check the allocation it runs in, under srun or mpirun: every line is ok, or says how to mend it."""


@dataclass(frozen=True)
class Calibrate(Job):
    """Measure what the steps of a model cost on this node, for `plan`: with as many ranks as it is to have."""

    corpus: tuple[str, ...] = ("-",)
    """Not read."""
    seconds: float | None = None
    """Measure for so many seconds; else 9 on cores and 2.5 on a GPU."""


@dataclass(frozen=True)
class Settle(Job):
    """The end of a batch script: exit 0 if the run is done, 75 if its job is to be requeued, 1 if not."""


JOBS: dict[str, type[Job]] = {
    "run": Job,
    "plan": Plan,
    "script": Script,
    "submit": Submit,
    "doctor": Doctor,
    "calibrate": Calibrate,
    "settle": Settle,
}
VIEWS = {"status": Status, "verify": Verify, "merge": Merge, "report": Report, "cancel": Cancel}
Command = Job | Status | Verify | Merge | Report | Cancel | Fetch


def main(job: Job | None = None, loader: Loader | None = None) -> NoReturn:
    """Run the command line and exit. A job file passes its job, whose values are then the flags' defaults.

    `loader` takes the place of what loads models.
    """
    terminal.prepare()
    arguments = sys.argv[1:]
    if job is not None and (not arguments or arguments[0] not in (*JOBS, *VIEWS)):
        arguments = ["run", *arguments]
    try:
        job, arguments = take_job_file(job, arguments)
    except Refusal as refusal:  # on every rank for itself: this node may be the only one that does not see the file
        _refuse(f"{socket.gethostname()}: {refusal}", quiet=False)
    command = parse(arguments, job)
    if isinstance(command, Doctor | Calibrate) or type(command) is Job:
        sys.exit(run(command, loader or Loader()))
    try:
        code = ACTIONS[type(command)](command, loader)
    except Refusal as refusal:
        _refuse(str(refusal), quiet=False)
    if (error := terminal.loss()) is not None:  # what is printed is all that these verbs are for
        print(f"scattergen: cannot write to standard output: {error.strerror}", file=sys.stderr, flush=True)
        code = code or FAULT
    sys.exit(code)


def take_job_file(job: Job | None, arguments: list[str]) -> tuple[Job | None, list[str]]:
    """Take `--job FILE` out of the arguments: the job.json of a run directory, in the place of a job file's job."""
    arguments = [part for text in arguments for part in (text.split("=", 1) if text.startswith("--job=") else [text])]
    if "--job" not in arguments[:-1] or arguments[0] not in JOBS:
        return job, arguments
    at = arguments.index("--job")
    path = Path(arguments[at + 1])
    try:
        job = Job.from_json(json.loads(path.read_text(encoding="utf-8"))["job"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise Refusal(f"--job {path}: {error!r}; it must be the job.json of a run directory") from error
    return job, arguments[:at] + arguments[at + 2 :]


def parse(arguments: list[str], job: Job | None) -> Command:
    """Make a command of arguments; exit with 2, saying why on rank 0 alone, if they make none."""
    import tyro

    quiet = launched_rank() > 0
    verbs = (*JOBS, *VIEWS, "fetch")
    if arguments and not arguments[0].startswith("-") and arguments[0] not in verbs:
        _refuse(f"there is no verb {arguments[0]!r}; the verbs are {', '.join(verbs)}", quiet)
    conf = tyro.conf
    commands: Any = None
    for verb, kind in JOBS.items():
        default: dict[str, Any] = {} if job is None else {"default": kind(**vars(job))}
        one = Annotated[kind, conf.subcommand(verb, **default)]  # type: ignore[valid-type]
        commands = one if commands is None else commands | one
    for verb, view in {**VIEWS, "fetch": Fetch}.items():
        commands = commands | Annotated[view, conf.subcommand(verb), conf.PositionalRequiredArgs]
    if job is not None and arguments[0] in VIEWS and not any(not text.startswith("-") for text in arguments[1:]):
        arguments = [arguments[0], str(run_path(job, tuple(Path(name) for name in job.corpus))), *arguments[1:]]
    try:
        command: Command = tyro.cli(
            commands,
            args=arguments,
            prog="scattergen",
            description="Completions for a large prompt corpus, in order and exactly once. In the place of flags, "
            "run, script, submit and doctor take --job RUN/job.json.",
            console_outputs=not quiet,
            config=(conf.OmitSubcommandPrefixes,),
        )
    except SystemExit as ending:
        raise SystemExit(0 if quiet else ending.code) from None
    return command


def script(command: Script, loader: Loader | None) -> int:
    """Print the batch script of a job."""
    from hpc.slurm.script import prepare_run

    text = prepare_run(_job(command), _program(loader))
    sys.stdout.flush()
    sys.stdout.buffer.write(text.encode("utf-8", "surrogateescape"))  # its paths, whatever the terminal takes
    return OK


def submit(command: Submit, loader: Loader | None) -> int:
    """Submit a job, its model resolved here."""
    from hpc.slurm.submit import show_log, submit_script

    log.configure(0, 1)
    job = _job(command)
    model = (loader or Loader()).resolve(job.model)
    verb = "doctor" if command.doctor else "run"
    job_id, path = submit_script(job, model, _program(loader), verb)
    print(f"Slurm job {job_id}\n{path}", flush=True)
    return show_log(job_id, path) if command.doctor else OK


def plan(command: Plan, loader: Loader | None) -> int:
    """Print what a job will take."""
    from hpc.forecast import forecast

    log.configure(0, 1)
    found = forecast.forecast(
        _job(command), loader or Loader(), command.calibration, command.ranks_on_node, command.deadline_min
    )
    if command.json:
        print(forecast.to_json(found))
    else:
        forecast.show(found, command.deadline_min)
    if command.plot is not None:
        forecast.plot(found, command.plot)
    return OK


def fetch(command: Fetch, loader: Loader | None) -> int:
    """Store a model and print where."""
    log.configure(0, 1)
    print((loader or Loader()).resolve(command.model).path)
    return OK


def settle(command: Settle, loader: Loader | None) -> int:  # noqa: ARG001  (one signature for all)
    """Decide what becomes of the Slurm job."""
    from hpc.slurm.requeue import requeue as decide

    return decide(_job(command), has_slurm())


def look(command: Any, loader: Loader | None) -> int:  # noqa: ARG001
    """Look at a run directory, or stop what runs in it."""
    from hpc.output.verify import merge_run, verify_run
    from hpc.report.status import status
    from hpc.slurm.cancel import cancel

    if isinstance(command, Status):
        return status(command.run, command.follow)
    if isinstance(command, Report):
        from hpc.report.report import report

        return report(command.runs, command.html)
    actions: Mapping[type, Callable[[Path], int]] = {Verify: verify_run, Merge: merge_run, Cancel: cancel}
    return actions[type(command)](command.run)


ACTIONS: Mapping[type, Callable[[Any, Loader | None], int]] = {
    Script: script, Submit: submit, Plan: plan, Fetch: fetch, Settle: settle, **dict.fromkeys(VIEWS.values(), look)
}  # fmt: skip


def _job(command: Job) -> Job:
    """Return the job of a verb that takes a job's flags."""
    return Job(**{name: getattr(command, name) for name in Job.__dataclass_fields__})


def _program(loader: Loader | None) -> tuple[str, ...]:
    """Return what runs on the nodes: this program itself, where it brings its own loader."""
    from hpc.slurm.script import PROGRAM

    return PROGRAM if loader is None else (sys.executable, str(Path(sys.argv[0]).absolute()))


def run(job: Job, loader: Loader) -> int:
    """Run a job on this rank; return its exit code, which is 0 on every rank but rank 0."""
    quiet = launched_rank() > 0
    try:
        world = is_alone() if job.share else connect()
    except Refusal as refusal:
        _refuse(str(refusal), quiet)
    stop = Stop()
    stop.listen()
    log.configure(world.rank, world.size)
    try:
        if isinstance(job, Doctor):
            from hpc.doctor.examine import examine

            return examine(_job(job), world, loader)
        if isinstance(job, Calibrate):
            from hpc.forecast.calibrate import calibrate

            return calibrate(_job(job), world, loader, job.seconds)
        code = generate(job, world, loader, stop, has_slurm() if world.rank == 0 else None)
        log.note_lost()
        return code
    except Refusal as refusal:
        _refuse(str(refusal), quiet=False)
    except Exception as error:
        _abort(world, error)


def _refuse(message: str, quiet: bool) -> NoReturn:
    if not quiet:
        print(f"scattergen: {message}", file=sys.stderr, flush=True)
    sys.exit(0 if quiet else REFUSED)


def _abort(world: Comm, error: Exception) -> NoReturn:
    """End all ranks with one message; the traceback goes to this rank's log."""
    LOGGER.debug("%s", traceback.format_exc())
    world.abort(f"scattergen: rank {world.rank} of {world.size} failed: {type(error).__name__}: {error}")
