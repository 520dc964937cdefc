"""An attempt: the resolved job, its ranks and its run directory, as rank 0 holds them."""

import contextlib
import functools
import logging
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field, replace
from datetime import datetime
from pathlib import Path
from typing import Any

from hpc.executor.crew import Crew
from hpc.executor.deadline import Deadline
from hpc.executor.read import Inputs
from hpc.job import EARLY_SIGNAL_S, Job
from hpc.model.bind import bind_run
from hpc.model.find import Model, with_template
from hpc.model.loader import Loader
from hpc.mpi.binding import Binding, bind_process
from hpc.output.target import Target, is_batch, target_of, with_absolute_output
from hpc.rundir import log
from hpc.rundir.directory import RunDirectory
from hpc.rundir.events import Events
from hpc.rundir.lock import alone
from hpc.rundir.progress import duration
from hpc.slurm.allocation import Allocation

LOGGER = logging.getLogger(__name__)


@dataclass(frozen=True)
class Attempt:
    """One attempt at a run, as rank 0 holds it."""

    job: Job
    crew: Crew
    places: tuple[Binding, ...]
    """Cores and GPU of each rank."""
    loader: Loader
    directory: RunDirectory
    number: int
    files: tuple[Path, ...]
    model: Model
    bound: dict[str, str]
    events: Events
    began: float
    """In seconds of the monotonic clock."""
    seconds_left: float | None
    """From the beginning until Slurm's signal to stop may come; None where there is no time limit."""
    engine_asked: str = ""
    """The engine that the job named, once `job.engine` is the chosen one."""
    engine_reason: str = ""
    """Why the chosen engine generates, where the job did not name it."""

    @property
    def place(self) -> Binding:
        """Cores and GPU of rank 0."""
        return self.places[0]

    @property
    def inputs(self) -> Inputs:
        """Everything that the token store depends on."""
        return Inputs(self.job, self.files, self.model)

    @functools.cached_property
    def target(self) -> Target:
        """Where the output goes; raises `Refusal` where that cannot be."""
        return target_of(self.job, self.directory.path, is_batch(self.inputs.corpus))

    def write_job(self) -> None:
        """Write job.json."""
        self.directory.write_job(self.job, self.files, self.bound, self.model.path)

    def run_values(self) -> dict[str, Any]:
        """Return the values that the other ranks need."""
        return {
            "job": asdict(self.job),
            "run": str(self.directory.path),
            "attempt": self.number,
            "model_path": str(self.model.path),
            "seconds_left": self.seconds_left,
        }

    def deadline(self) -> Deadline:
        """Return the deadline of this attempt, counted from now."""
        gone = time.monotonic() - self.began
        return Deadline(None if self.seconds_left is None else self.seconds_left - gone)


@dataclass
class Timings:
    """Times of an attempt, measured and predicted, in seconds; filled in as they become known."""

    seconds: dict[str, float] = field(default_factory=dict)
    """Of each stage, by its name in the summary."""
    imports_s: float = 0.0
    """Seconds spent importing libraries before loading; predictions count them as part of loading."""
    predicted_s: float | None = None
    """Predicted seconds of loading, generating and merging; None without a calibration."""
    padding: float = 0.0
    """Share of padding in the prompts of full buckets."""

    @contextlib.contextmanager
    def importing(self, events: Events) -> Iterator[None]:
        """Count the time spent within as time to import libraries."""
        began, clock = time.monotonic(), time.time()
        yield
        took = time.monotonic() - began
        self.imports_s += took
        events.within([("import", clock, clock + took)])


def begin(
    job: Job,
    directory: RunDirectory,
    files: tuple[Path, ...],
    crew: Crew,
    loader: Loader,
    allocation: Allocation | None = None,
) -> Attempt:
    """Resolve the job, write job.json and tell the other ranks; raise `Refusal` for a job that cannot run."""
    began, clock = time.monotonic(), time.time()
    places = crew.place_ranks(job)
    place = places[0]
    bind_process(place)  # before the model's type is looked for, which needs torch
    moments = [time.time()]
    model = with_template(loader.resolve(job.model), job.chat_template)
    moments.append(time.time())
    with contextlib.ExitStack() as stack:
        if directory.share:  # the first of the jobs decides for all of them
            stack.enter_context(alone(directory.path, "begin", lambda: bool(crew.stop.reason)))
        earlier = directory.binding_job()
        if job.dtype == "auto":
            known: Any = earlier["bound"].get("dtype") if earlier else None
            resolved: Any = known or loader.dtype(job)
            job = replace(job, dtype=resolved)
        moments.append(time.time())
        loader.check(job, model.path, place)
        job, date = with_absolute_output(job), chat_date(job, directory)
        job = replace(job, name=directory.path.name, runs=str(directory.path.parent), chat_date=date)
        bound = bind_run(directory, job, model)
        if earlier is None:  # else only when the corpus has not been refused
            directory.write_job(job, files, bound, model.path)
        else:
            directory.bind("chat_date", job.chat_date)
    number = directory.next_attempt()
    directory.set_state("running")
    directory.cancelled.unlink(missing_ok=True)
    log.configure(0, crew.world.size, directory.log(number, 0))
    LOGGER.debug("%s", place)
    events = Events(directory.events(number, 0))
    slurm = {"slurm_job": allocation.job_id, "restarts": allocation.restarts} if allocation else {}
    events.write("begin", {"ranks": crew.world.size, **slurm})
    # What knows models is imported by whoever asks first: to convert one, or for the dtype.
    events.span("other", clock)
    events.within(zip(("convert", "import"), moments, moments[1:], strict=False))
    left = None
    if allocation is not None:
        directory.note_slurm_job(allocation.submitted_id)
        if allocation.ends_at is not None:
            left = allocation.ends_at - time.time() - job.slurm.signal_delay_s - EARLY_SIGNAL_S
    attempt = Attempt(job, crew, places, loader, directory, number, files, model, bound, events, began, left)
    crew.introduce(attempt.run_values(), places)
    if left is not None:
        LOGGER.info("Slurm may say stop in %s: what would not end by then is not begun", duration(max(0, left)))
    if job.trust_remote_code:
        LOGGER.info("code that comes with the model is run, if there is any (--trust-remote-code)")
    LOGGER.info(
        "%s, attempt %d: %s in %s on %d rank%s",
        directory.path, number, model.path.name, job.dtype, crew.world.size, "s" * (crew.world.size > 1),
    )  # fmt: skip
    return attempt


def chat_date(job: Job, directory: RunDirectory) -> str:
    """Return date and time for chat templates: those of the job, else those at which the run was begun."""
    earlier = directory.binding_job()
    if job.chat_date or earlier is None:
        return job.chat_date or datetime.now().isoformat(timespec="seconds")
    moment = datetime.now()
    if directory.next_attempt() > 1:  # begun before the date was written down: the prompts are as old as their file
        with contextlib.suppress(FileNotFoundError):
            moment = datetime.fromtimestamp((directory.path / "store.json").stat().st_mtime)
    return str(earlier["bound"].get("chat_date") or moment.isoformat(timespec="seconds"))
