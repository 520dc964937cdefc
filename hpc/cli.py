"""The command line: verbs, flags, exit codes. The only place that reads arguments."""

import logging
import sys
import traceback
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, NoReturn

from hpc import comm, log
from hpc.attempt import run_path
from hpc.comm import Comm
from hpc.job import Job, Refusal
from hpc.loader import Loader
from hpc.pipeline import REFUSED, generate
from hpc.stop import Stop

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


VIEWS = {"status": Status, "verify": Verify, "merge": Merge}


def main(job: Job | None = None, loader: Loader | None = None) -> NoReturn:
    """Run the command line and exit. A job file passes its job, whose values are then the flags' defaults.

    `loader` takes the place of what loads models.
    """
    arguments = sys.argv[1:]
    if job is not None and (not arguments or arguments[0] not in ("run", *VIEWS)):
        arguments = ["run", *arguments]
    command = parse(arguments, job)
    if isinstance(command, Job):
        sys.exit(run(command, loader or Loader()))
    from hpc import view

    code = 0
    try:
        if isinstance(command, Status):
            code = view.status(command.run, command.follow)
        elif isinstance(command, Verify):
            code = view.verify(command.run)
        else:
            code = view.merge(command.run)
    except Refusal as refusal:
        print(f"scattergen: {refusal}", file=sys.stderr)
        code = REFUSED
    sys.exit(code)


def parse(arguments: list[str], job: Job | None) -> Job | Status | Verify | Merge:
    """Make a command of arguments; exit with 2, saying why on rank 0 alone, if they make none."""
    import tyro

    quiet = comm.launched_rank() > 0
    default: dict[str, Any] = {} if job is None else {"default": job}
    conf = tyro.conf
    commands: Any = Annotated[Job, conf.subcommand("run", **default)]
    for verb, kind in VIEWS.items():
        commands = commands | Annotated[kind, conf.subcommand(verb), conf.PositionalRequiredArgs]
    if job is not None and arguments[0] in VIEWS and not any(not text.startswith("-") for text in arguments[1:]):
        arguments = [arguments[0], str(run_path(job, tuple(Path(name) for name in job.corpus))), *arguments[1:]]
    try:
        command: Job | Status | Verify | Merge = tyro.cli(
            commands,
            args=arguments,
            prog="scattergen",
            description="Completions for a large prompt corpus, in order and exactly once.",
            console_outputs=not quiet,
            config=(conf.OmitSubcommandPrefixes,),
        )
    except SystemExit as ending:
        raise SystemExit(0 if quiet else ending.code) from None
    return command


def run(job: Job, loader: Loader) -> int:
    """Run a job on this rank; return its exit code, which is 0 on every rank but rank 0."""
    quiet = comm.launched_rank() > 0
    try:
        world = comm.connect()
    except Refusal as refusal:
        _refuse(str(refusal), quiet)
    stop = Stop()
    stop.listen()
    log.configure(world.rank, world.size)
    try:
        return generate(job, world, loader, stop)
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
