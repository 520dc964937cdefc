"""The run directory: where a run keeps everything, and what binds its attempts to one another.

Its files are described in the README under "The run directory". Only rank 0 takes the lock and
writes `job.json`, `state` and the outputs.
"""

import contextlib
import dataclasses
import errno
import fcntl
import json
import os
import socket
import subprocess
import time
from collections.abc import Callable, Mapping
from importlib import metadata
from pathlib import Path
from typing import Any, Literal

from hpc import atomic
from hpc.job import Job, Refusal

State = Literal["running", "drained", "done", "failed"]

BOUND = ("model", "tokenizer", "template", "dtype")
"""What must stay the same over the attempts of a run; engine, device and ranks may change."""


class RunDirectory:
    """Paths and small files of a run."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._lock: int | None = None

    @property
    def completions(self) -> Path:
        """The output, once every row is accounted for."""
        return self.path / "completions.jsonl"

    @property
    def partial(self) -> Path:
        """The output of `merge` while rows are missing."""
        return self.path / "completions.partial.jsonl"

    @property
    def summary(self) -> Path:
        """Figures of the run, for programs."""
        return self.path / "summary.json"

    def journal(self, attempt: int, rank: int) -> Path:
        """One rank's journal of one attempt."""
        return self.path / "journal" / f"{attempt:04d}-{rank:05d}.jsonl"

    def journals(self) -> list[Path]:
        """All journals, the earliest attempt first."""
        return sorted((self.path / "journal").glob("*.jsonl"), key=attempt_and_rank)

    def events(self, attempt: int, rank: int) -> Path:
        """One rank's progress in one attempt."""
        return self.path / "events" / f"{attempt:04d}-{rank:05d}.jsonl"

    def log(self, attempt: int, rank: int) -> Path:
        """One rank's log of one attempt."""
        return self.path / "log" / f"{attempt:04d}-{rank:05d}.log"

    def create(self) -> None:
        """Make the folders; raise `Refusal` where that cannot be done."""
        try:
            for name in ("journal", "events", "log"):
                (self.path / name).mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise Refusal(_cannot_write(self.path, error)) from error

    def acquire(self, force: bool = False, flock: Callable[[int, int], None] = fcntl.flock) -> None:
        """Take the run directory for this process until it ends, however it ends.

        Raises `Refusal` if another process has it, or if the file system cannot tell (`force` goes on
        then).
        """
        try:
            lock = os.open(self.path / "lock", os.O_RDWR | os.O_CREAT, 0o644)
        except OSError as error:
            raise Refusal(_cannot_write(self.path, error)) from error
        try:
            flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            owner = os.pread(lock, 1000, 0).decode(errors="replace").strip()
            os.close(lock)
            raise Refusal(
                f"{self.path} is in use by {owner or 'another process'}; wait for it or stop it, "
                "or choose another --name"
            ) from None
        except OSError as error:
            if not force:
                os.close(lock)
                raise Refusal(
                    f"{self.path}/lock cannot be locked ({error.strerror}), so a second run in this directory would "
                    "go unseen. If you are sure that there is none, add --force"
                ) from error
        job = os.environ.get("SLURM_JOB_ID")
        owner = f"host {socket.gethostname()}, pid {os.getpid()}" + (f", Slurm job {job}" if job else "")
        os.ftruncate(lock, 0)
        os.pwrite(lock, f"{owner}, since {time.strftime('%Y-%m-%d %H:%M:%S')}\n".encode(), 0)
        self._lock = lock

    def release(self) -> None:
        """Give the run directory back."""
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None

    def is_held(self) -> bool:
        """Say whether a living process has the run directory, as far as the file system can tell."""
        try:
            lock = os.open(self.path / "lock", os.O_RDONLY)
        except OSError:
            return False
        try:
            fcntl.flock(lock, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except OSError as error:
            return error.errno in (errno.EAGAIN, errno.EACCES)
        finally:
            os.close(lock)
        return False

    @property
    def state(self) -> str:
        """What `state` says; "new" before the first attempt."""
        try:
            return (self.path / "state").read_text().strip()
        except FileNotFoundError:
            return "new"

    def set_state(self, state: State) -> None:
        """Write `state`."""
        atomic.write(self.path / "state", state + "\n")

    def restore_state(self, state: str) -> None:
        """Write the state that was there before; a run that had none has failed."""
        atomic.write(self.path / "state", ("failed" if state == "new" else state) + "\n")

    def set_failed(self) -> None:
        """Write that the run has failed, if that can be written at all: there is another error to be told."""
        with contextlib.suppress(OSError):
            self.set_state("failed")

    def next_attempt(self) -> int:
        """Return a number above those of all attempts that left anything, from 1."""
        paths = [path for folder in ("journal", "events", "log") for path in (self.path / folder).iterdir()]
        return 1 + max((attempt_and_rank(path)[0] for path in paths), default=0)

    def read_job(self) -> dict[str, Any] | None:
        """Return what `job.json` holds, or None before the first attempt."""
        try:
            value: dict[str, Any] = json.loads((self.path / "job.json").read_text())
        except FileNotFoundError:
            return None
        return value

    def write_job(self, job: Job, files: tuple[Path, ...], bound: Mapping[str, str], model_path: Path) -> None:
        """Record the resolved job: what runs, on what, with which versions."""
        value = {
            "job": dataclasses.asdict(job),
            "files": [str(file) for file in files],
            "model_path": str(model_path),
            "bound": dict(bound),
            "versions": _versions(),
            "git_commit": _git_commit(),
        }
        atomic.write(self.path / "job.json", json.dumps(value, indent=2, ensure_ascii=False) + "\n")

    def check_bound(self, bound: Mapping[str, str]) -> None:
        """Raise `Refusal`, naming the field, if an earlier attempt was bound to something else."""
        earlier = self.read_job()
        for name in BOUND:
            if earlier is not None and earlier["bound"][name] != bound[name]:
                raise Refusal(
                    f"{self.path} was begun with {name} {earlier['bound'][name]}, and this job has {name} "
                    f"{bound[name]}: its completions would not belong together. Choose another --name, or remove "
                    "the run directory"
                )


def attempt_and_rank(path: Path) -> tuple[int, int]:
    """Return the numbers in the name of a journal, log or event file; zeros for another file's."""
    attempt, _, rank = path.stem.partition("-")
    return (int(attempt), int(rank)) if attempt.isdigit() and rank.isdigit() else (0, 0)


def _cannot_write(path: Path, error: OSError) -> str:
    return f"cannot write to the run directory {path}: {error.strerror}; choose another --runs or --name"


def _versions() -> dict[str, str]:
    found = {}
    for name in ("scattergen", "torch", "transformers", "tokenizers", "mpi4py", "numpy"):
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            found[name] = "not installed"
    return found


def _git_commit() -> str | None:
    """Return the commit of the current folder's repository: the job file is usually in it."""
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
