"""The entry point: parse the arguments, run the verb, exit."""

import json
import socket
import sys
from pathlib import Path
from typing import Annotated, Any, NoReturn

from hpc.cli.actions import HIDDEN, VERBS, Verb, refuse
from hpc.cli.flags import command_of, flags_of
from hpc.exit import FAULT, Refusal
from hpc.job import Job
from hpc.model.loader import Loader
from hpc.mpi.world import launched_rank
from hpc.rundir import terminal
from hpc.rundir.directory import run_path


def main(job: Job | None = None, loader: Loader | None = None) -> NoReturn:
    """Run the command line and exit. A job file passes its job; its values are the defaults of the flags.

    `loader` replaces the loader of models.
    """
    terminal.prepare()
    arguments = sys.argv[1:]
    if job is not None and (not arguments or arguments[0] not in VERBS):
        arguments = ["run", *arguments]
    try:
        job, arguments = take_job_file(job, arguments)
    except Refusal as refusal:  # on every rank for itself: this node may be the only one that does not see the file
        refuse(f"{socket.gethostname()}: {refusal}")
    verb, command = parse(arguments, job)
    try:
        code = verb.does(command, loader)
    except Refusal as refusal:
        refuse(str(refusal))
    if not verb.on_ranks and (error := terminal.loss()) is not None:
        print(f"scattergen: cannot write to standard output: {error.strerror}", file=sys.stderr, flush=True)
        code = code or FAULT
    sys.exit(code)


def take_job_file(job: Job | None, arguments: list[str]) -> tuple[Job | None, list[str]]:
    """Remove `--job FILE`, the job.json of a run directory, from the arguments; return its job and the rest."""
    arguments = [part for text in arguments for part in (text.split("=", 1) if text.startswith("--job=") else [text])]
    if "--job" not in arguments[:-1] or arguments[0] not in VERBS or not VERBS[arguments[0]].has_job:
        return job, arguments
    at = arguments.index("--job")
    path = Path(arguments[at + 1])
    try:
        job = Job.from_json(json.loads(path.read_text(encoding="utf-8"))["job"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise Refusal(f"--job {path}: {error!r}; it must be the job.json of a run directory") from error
    return job, arguments[:at] + arguments[at + 2 :]


def parse(arguments: list[str], job: Job | None) -> tuple[Verb, Any]:
    """Return the verb and its parsed dataclass; on wrong arguments exit with 2, and say why on rank 0 alone."""
    import tyro

    quiet, asked = launched_rank() > 0, arguments[0] if arguments else ""
    shown = [name for name in VERBS if name != HIDDEN or asked == HIDDEN]
    if asked and not asked.startswith("-") and asked not in shown:
        refuse(f"there is no verb {asked!r}; the verbs are {', '.join(shown)}", quiet)
    has_job = asked in VERBS and VERBS[asked].has_job
    short = has_job and not {"-H", "--help-verbose"} & set(arguments) and bool({"-h", "--help"} & set(arguments))
    commands: Any = None
    verb_of: dict[type, Verb] = {}
    for name in shown:
        verb = VERBS[name]
        kind = flags_of(verb.takes, job, short) if verb.has_job else verb.takes
        verb_of[kind] = verb
        one: Any = Annotated[kind, tyro.conf.subcommand(name)]
        one = one if verb.has_job else Annotated[one, tyro.conf.PositionalRequiredArgs]
        commands = one if commands is None else commands | one
    if job is not None and not has_job and not any(not text.startswith("-") for text in arguments[1:]):
        arguments = [asked, str(run_path(job, tuple(Path(name) for name in job.corpus))), *arguments[1:]]
    try:
        found = tyro.cli(
            commands,
            args=arguments,
            prog="scattergen",
            description="Completions for a large prompt corpus, in order and exactly once.",
            console_outputs=not quiet,
            compact_help=has_job,
            config=(tyro.conf.OmitSubcommandPrefixes,),
        )
    except SystemExit as ending:
        raise SystemExit(0 if quiet else ending.code) from None
    verb = verb_of[type(found)]
    if not verb.has_job:
        return verb, found
    if asked == HIDDEN and job is None:
        refuse("settle takes --job RUN/job.json, the run that it is about", quiet)
    try:
        return verb, command_of(verb.takes, found, job)
    except ValueError as error:
        refuse(f"{error}; see scattergen {asked} --help", quiet)
