"""Read and write the small files of a run directory, and check that its attempts belong together.

docs/run-directory.md describes its files. Only rank 0 takes its lock (`hpc.rundir.lock`) and writes
`job.json`, `state` and the outputs.
"""

import contextlib
import dataclasses
import json
import os
import re
import subprocess
import time
from collections.abc import Mapping
from importlib import metadata
from pathlib import Path
from typing import Any, Literal

from hpc.exit import Refusal
from hpc.job import Job, Share
from hpc.rundir import atomic
from hpc.rundir.lock import cannot_write, is_held


def run_path(job: Job, files: tuple[Path, ...]) -> Path:
    """Return the run directory of a job: by its name, or that of its corpus."""
    given = Path(job.corpus[0]).expanduser()
    stem = given.absolute().name if given.is_dir() else files[0].stem
    if files[0].suffix in (".gz", ".bz2", ".zst", ".xz"):
        stem = Path(stem).stem
    return Path(job.runs).expanduser().absolute() / (job.name or stem)


State = Literal["running", "drained", "done", "failed"]

_FOLDERS = frozenset({"corpus", "events", "journal", "log", "slurm"})
_FILES = frozenset({
    "cancelled", "doctor.sbatch", "errors.jsonl", "job.json", "job.py", "keys.b16", "offsets.i64", "outputs",
    "report.html", "requests.jsonl", "script.sbatch", "slurm_jobs", "store.json", "summary.json", "tokens.i32",
    "trace.json",
})  # fmt: skip
_SHARED = re.compile(r"(lock|state)(-.*)?|[a-z]+\.lock")
"""Files of a run, of which a run of shares has several, and the locks of `hpc.rundir.lock.alone`."""


class RunDirectory:
    """Paths and small files of a run.

    The job of a share has a state and attempts of its own; file names have the index of the share in
    the place of the rank.
    """

    def __init__(self, path: Path, share: Share | None = None) -> None:
        self.path = path
        self.share = share
        self._suffix = "" if share is None else f"-{share.index}"

    @property
    def completions(self) -> Path:
        """The output, once every row is accounted for, unless the job names another place."""
        return self.path / "completions.jsonl"

    @property
    def summary(self) -> Path:
        """Figures of the run, for programs."""
        return self.path / "summary.json"

    @property
    def cancelled(self) -> Path:
        """Exists from `cancel` until the run begins or is submitted again; the job does not requeue itself."""
        return self.path / "cancelled"

    def keeps(self, path: Path) -> bool:
        """Return whether a path is that of a file of the run itself, where no output may go."""
        try:
            first, *more = path.resolve().relative_to(self.path.resolve()).parts
        except ValueError:
            return False
        return first in _FOLDERS if more else first in _FILES or _SHARED.fullmatch(first) is not None

    def journal(self, attempt: int, rank: int) -> Path:
        """Return the path of the journal of a rank and attempt."""
        return self.path / "journal" / f"{self._of(attempt, rank)}.jsonl"

    def journals(self) -> list[Path]:
        """All journals, the earliest attempt first."""
        return sorted((self.path / "journal").glob("*.jsonl"), key=attempt_and_rank)

    def journals_of(self, attempt: int) -> list[Path]:
        """Return the journals of one attempt, of this share."""
        rank = "*" if self.share is None else f"{self.share.index:05d}"
        return sorted((self.path / "journal").glob(f"{attempt:04d}-{rank}.jsonl"))

    def events(self, attempt: int, rank: int) -> Path:
        """Return the path of the events of a rank and attempt."""
        return self.path / "events" / f"{self._of(attempt, rank)}.jsonl"

    def log(self, attempt: int, rank: int) -> Path:
        """Return the path of the log of a rank and attempt."""
        return self.path / "log" / f"{self._of(attempt, rank)}.log"

    def _of(self, attempt: int, rank: int) -> str:
        return f"{attempt:04d}-{rank + (self.share.index if self.share else 0):05d}"

    def create(self) -> None:
        """Make the folders; raise `Refusal` if they cannot be made."""
        try:
            for name in ("journal", "events", "log"):
                (self.path / name).mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise cannot_write(self.path, error) from error

    @property
    def state(self) -> str:
        """The word in `state`; "new" before the first attempt."""
        try:
            return (self.path / f"state{self._suffix}").read_text().strip()
        except FileNotFoundError:
            return "new"

    def set_state(self, state: State) -> None:
        """Write `state`; for a share its own state, and that of the whole run, which follows from it."""
        atomic.write(self.path / f"state{self._suffix}", state + "\n")
        if self.share is not None:
            others = (f"lock-{index}" for index in range(self.share.count) if index != self.share.index)
            if state == "running" or any(is_held(self.path, name) for name in others):
                self.set_whole_state("running")
            else:  # a share that is done leaves the rows of those that have not run
                self.set_whole_state("drained" if state == "done" else state)

    def set_whole_state(self, state: State) -> None:
        """Write the state of the whole run, whatever the states of its shares."""
        atomic.write(self.path / "state", state + "\n")

    def restore_state(self, state: str, whole: str) -> None:
        """Write the state from before, for a share also that of the `whole`; "new" becomes "failed"."""
        restored: Any = "failed" if state == "new" else state
        self.set_state(restored)
        if self.share is not None and whole == "done":  # else it follows from the shares
            self.set_whole_state("done")

    @property
    def whole_state(self) -> str:
        """The state of the whole run, whatever the states of its shares."""
        return RunDirectory(self.path).state

    def set_failed(self) -> None:
        """Write the state "failed". An error in writing is ignored: the caller reports another one."""
        with contextlib.suppress(OSError):
            self.set_state("failed")

    def next_attempt(self) -> int:
        """Return the number of the next attempt, from 1: above those of all files."""
        paths = [path for folder in ("journal", "events", "log") for path in (self.path / folder).iterdir()]
        found = [attempt_and_rank(path) for path in paths]
        return 1 + max((n for n, rank in found if self.share is None or rank == self.share.index), default=0)

    def keep_completions(self, attempt: int) -> Path | None:
        """Rename the output before that of another corpus replaces it; return the new path, None without output."""
        kept = self.path / f"completions.before-{attempt}.jsonl"
        try:
            os.replace(self.completions, kept)
        except FileNotFoundError:
            return None
        return kept

    def note_output(self, name: str) -> None:
        """Add an output to those of this run, before it is written."""
        if name not in self.outputs():
            with open(self.path / "outputs", "a", encoding="utf-8", errors="surrogateescape") as file:
                file.write(name + "\n")

    def outputs(self) -> list[str]:
        """Return the outputs that this run has, by the names of their files."""
        try:
            text = (self.path / "outputs").read_text(encoding="utf-8", errors="surrogateescape")
        except FileNotFoundError:
            text = ""
        return [str(self.completions), *text.splitlines()]

    def note_slurm_job(self, job_id: str) -> None:
        """Add a Slurm job to those of this run."""
        if self.slurm_jobs()[-1:] != [job_id]:
            with open(self.path / "slurm_jobs", "a") as file:
                file.write(job_id + "\n")

    def slurm_jobs(self) -> list[str]:
        """Return the ids of the Slurm jobs that were submitted for this run or ran in it, the latest last."""
        try:
            return (self.path / "slurm_jobs").read_text().split()
        except FileNotFoundError:
            return []

    def read_job(self) -> dict[str, Any] | None:
        """Return the contents of `job.json`, or None before the first attempt."""
        try:
            value: dict[str, Any] = json.loads((self.path / "job.json").read_text())
        except FileNotFoundError:
            return None
        return value

    def binding_job(self) -> dict[str, Any] | None:
        """Return the contents of `job.json` if the run is bound to them: not if it failed before it finished a row."""
        failed = self.whole_state == "failed" and not any(path.stat().st_size for path in self.journals())
        return None if failed else self.read_job()

    @property
    def created(self) -> int:
        """When the run was begun or submitted, in seconds of the clock."""
        value = self.read_job() or {}
        known: int | None = value.get("created")  # runs of before it was written down are as old as their job.json
        return int((self.path / "job.json").stat().st_mtime) if known is None else known

    def recorded_job(self) -> dict[str, Any]:
        """Return the contents of `job.json`; raise `Refusal` if there is none, or it is damaged."""
        try:
            value = self.read_job()
        except (ValueError, OSError) as error:
            raise Refusal(f"{self.path / 'job.json'} cannot be read: {error}") from error
        if value is None:
            known = sorted(found.parent for found in self.path.glob("*/job.json"))
            like = f"one of the {len(known)} in it, such as {known[0]}" if known else "the one that `run` printed"
            raise Refusal(f"{self.path} is no run directory: it has no job.json; name {like}")
        return value

    def write_job(self, job: Job, files: tuple[Path, ...], bound: Mapping[str, str], model_path: Path) -> None:
        """Write `job.json`: the resolved job, its files and model, and the versions of libraries."""
        earlier = self.read_job() or {}
        value = {
            "created": earlier.get("created", int(time.time())),
            "job": dataclasses.asdict(dataclasses.replace(job, share="")),
            "files": [str(file) for file in files],
            "model_path": str(model_path),
            "bound": dict(bound),
            "versions": _versions(),
            "git_commit": _git_commit(),
        }
        atomic.write(self.path / "job.json", json.dumps(value, indent=2, ensure_ascii=False) + "\n")

    def bind(self, name: str, value: str) -> None:
        """Bind a run that has begun or was submitted to a value, if it has none of that name."""
        earlier = self.read_job()
        if earlier is not None and name not in earlier["bound"]:
            earlier["bound"][name] = value
            atomic.write(self.path / "job.json", json.dumps(earlier, indent=2, ensure_ascii=False) + "\n")

    def check_bound(self, bound: Mapping[str, str]) -> None:
        """Raise `Refusal`, naming the field, if the run is bound to another value.

        A run that was only submitted is not bound to values that a node resolves.
        """
        earlier = self.binding_job()
        for name, value in bound.items():
            if earlier is not None and earlier["bound"].get(name, value) != value:
                raise Refusal(
                    f"{self.path} was begun with {name} {earlier['bound'][name]}, and this job has {name} "
                    f"{value}: its completions would not belong together. Choose another --name, or remove "
                    "the run directory"
                )


def attempt_and_rank(path: Path) -> tuple[int, int]:
    """Return attempt and rank in the name of a journal, log or event file; zeros for any other name."""
    attempt, _, rank = path.stem.partition("-")
    return (int(attempt), int(rank)) if attempt.isdigit() and rank.isdigit() else (0, 0)


def _versions() -> dict[str, str]:
    found = {}
    for name in ("scattergen", "torch", "transformers", "tokenizers", "mpi4py", "numpy"):
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            found[name] = "not installed"
    return found


def _git_commit() -> str | None:
    """Return the commit of the repository of the current folder, which usually has the job file."""
    try:
        asked = subprocess.run(
            ["git", "rev-parse", "HEAD"],
            capture_output=True,
            text=True,
            timeout=5,
            check=True,
            stdin=subprocess.DEVNULL,
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return asked.stdout.strip()
