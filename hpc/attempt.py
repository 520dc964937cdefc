"""One try at a run, as rank 0 sees it: what runs, where, and who takes part."""

import logging
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from hpc import log
from hpc.job import Job
from hpc.leader import Leader
from hpc.loader import Loader
from hpc.model import Model
from hpc.place import Place
from hpc.progress import Events
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
        }


def begin(job: Job, directory: RunDirectory, files: tuple[Path, ...], leader: Leader, loader: Loader) -> Attempt:
    """Resolve the job, or refuse; record what runs; tell the other ranks."""
    began = time.monotonic()
    model = loader.resolve(job.model)
    earlier = directory.read_job()
    if job.dtype == "auto":
        dtype: Any = earlier["bound"]["dtype"] if earlier else loader.dtype(job)
        job = replace(job, dtype=dtype)
    bound = {"model": model.revision, "tokenizer": model.tokenizer, "template": model.template, "dtype": job.dtype}
    directory.check_bound(bound)
    number = directory.next_attempt()
    job = replace(job, name=directory.path.name, runs=str(directory.path.parent))
    directory.set_state("running")
    log.configure(0, leader.world.size, directory.log(number, 0))
    events = Events(directory.events(number, 0))
    place = leader.place_ranks(job.device)
    attempt = Attempt(job, leader, loader, directory, number, files, model, bound, place, events, began, {})
    if earlier is None:  # else only when the corpus has not been refused
        attempt.write_job()
    leader.introduce(attempt.run_values())
    LOGGER.info(
        "%s, attempt %d: %s in %s on %d rank%s",
        directory.path, number, model.path.name, job.dtype, leader.world.size, "s" * (leader.world.size > 1),
    )  # fmt: skip
    return attempt


def run_path(job: Job, files: tuple[Path, ...]) -> Path:
    """Return the run directory of a job."""
    return Path(job.runs).expanduser().absolute() / (job.name or files[0].stem)
