"""One try at a run, as rank 0 sees it: what runs, where, and who takes part."""

import logging
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from hpc import log
from hpc.allocation import EARLY_SIGNAL_S, Allocation
from hpc.deadline import Deadline
from hpc.job import Job
from hpc.leader import Leader
from hpc.loader import Loader
from hpc.model import Model
from hpc.place import Place, bind
from hpc.progress import Events, duration
from hpc.rundir import RunDirectory

LOGGER = logging.getLogger(__name__)


@dataclass
class Attempt:
    """One try at a run, as rank 0 sees it."""

    job: Job
    leader: Leader
    loader: Loader
    directory: RunDirectory
    number: int
    files: tuple[Path, ...]
    model: Model
    bound: dict[str, str]
    place: Place
    events: Events
    began: float
    seconds: dict[str, float]
    seconds_left: float | None
    """From the beginning until Slurm's signal to stop may come; None where there is no time limit."""
    imports_s: float = 0.0
    """What reading took to get its libraries, which loading the model would have taken without it."""
    predicted_s: float | None = None
    """What loading, generating and merging should take; None where nothing is known of it."""
    padding: float = 0.0
    """Share of padding in the prompts of full buckets."""

    @property
    def file_names(self) -> tuple[str, ...]:
        """What the corpus files are called in messages: their names, or paths where names repeat."""
        names = [file.name for file in self.files]
        return tuple(names) if len(set(names)) == len(names) else tuple(str(file) for file in self.files)

    def write_job(self) -> None:
        """Record what runs."""
        self.directory.write_job(self.job, self.files, self.bound, self.model.path)

    def run_values(self) -> dict[str, Any]:
        """Return what the other ranks must know."""
        return {
            "job": asdict(self.job),
            "run": str(self.directory.path),
            "attempt": self.number,
            "model_path": str(self.model.path),
            "file_names": self.file_names,
            "seconds_left": self.seconds_left,
        }

    def deadline(self) -> Deadline:
        """Return the deadline of this attempt, as of now."""
        gone = time.monotonic() - self.began
        return Deadline(None if self.seconds_left is None else self.seconds_left - gone)


def begin(
    job: Job,
    directory: RunDirectory,
    files: tuple[Path, ...],
    leader: Leader,
    loader: Loader,
    allocation: Allocation | None = None,
) -> Attempt:
    """Resolve the job, or refuse; record what runs; tell the other ranks."""
    began = time.monotonic()
    place = leader.place_ranks(job.device)
    bind(place)  # before the model's type is looked for, which needs torch
    model = loader.resolve(job.model)
    earlier = directory.read_job()
    if job.dtype == "auto":
        known: Any = earlier["bound"].get("dtype") if earlier else None
        resolved: Any = known or loader.dtype(job)
        job = replace(job, dtype=resolved)
    bound = {"model": model.revision, "tokenizer": model.tokenizer, "template": model.template, "dtype": job.dtype}
    directory.check_bound(bound)
    number = directory.next_attempt()
    job = replace(job, name=directory.path.name, runs=str(directory.path.parent))
    directory.set_state("running")
    directory.cancelled.unlink(missing_ok=True)
    log.configure(0, leader.world.size, directory.log(number, 0))
    LOGGER.debug("%s", place)
    events = Events(directory.events(number, 0))
    slurm = {"slurm_job": allocation.job_id, "restarts": allocation.restarts} if allocation else {}
    events.write("begin", {"ranks": leader.world.size, **slurm})
    left = None
    if allocation is not None:
        directory.note_slurm_job(allocation.submitted_id)
        if allocation.ends_at is not None:
            left = allocation.ends_at - time.time() - job.slurm.signal_delay_s - EARLY_SIGNAL_S
    attempt = Attempt(job, leader, loader, directory, number, files, model, bound, place, events, began, {}, left)
    if earlier is None:  # else only when the corpus has not been refused
        attempt.write_job()
    leader.introduce(attempt.run_values())
    if left is not None:
        LOGGER.info("Slurm may say stop in %s: what would not end by then is not begun", duration(max(0, left)))
    LOGGER.info(
        "%s, attempt %d: %s in %s on %d rank%s",
        directory.path, number, model.path.name, job.dtype, leader.world.size, "s" * (leader.world.size > 1),
    )  # fmt: skip
    return attempt


def run_path(job: Job, files: tuple[Path, ...]) -> Path:
    """Return the run directory of a job."""
    return Path(job.runs).expanduser().absolute() / (job.name or files[0].stem)
