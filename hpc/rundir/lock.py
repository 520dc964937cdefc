"""Lock a run directory: for one process, or for one process per share."""

import contextlib
import errno
import fcntl
import os
import socket
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from hpc.exit import Refusal
from hpc.job import Share

LOCK_PATIENCE_S = 2.0
"""Seconds to try again: `is_held` takes the lock for a moment."""


class RunLock:
    """The lock of a run directory, or of a `share`. A process holds it from `acquire` until it ends or is killed."""

    def __init__(self, path: Path, share: Share | None = None) -> None:
        self._path, self._share = path, share
        self._files: list[int] = []

    def acquire(
        self,
        force: bool = False,
        flock: Callable[[int, int], None] = fcntl.flock,
        patience_s: float = LOCK_PATIENCE_S,
    ) -> None:
        """Take the lock.

        Raises `Refusal` if another process holds it for `patience_s`, and, without `force`, if the file system has no
        locks.
        """
        if self._share is None:
            self._take("lock", fcntl.LOCK_EX, force, flock, patience_s)
        else:
            self._take("lock", fcntl.LOCK_SH, force, flock, patience_s)  # keeps a run of the whole out
            self._take(f"lock-{self._share.index}", fcntl.LOCK_EX, force, flock, patience_s)

    def release(self) -> None:
        """Release the lock."""
        while self._files:
            os.close(self._files.pop())

    def _take(self, name: str, kind: int, force: bool, flock: Callable[[int, int], None], patience_s: float) -> None:
        try:
            lock = os.open(self._path / name, os.O_RDWR | os.O_CREAT, 0o644)
        except OSError as error:
            raise cannot_write(self._path, error) from error
        give_up = time.monotonic() + patience_s
        while True:
            try:
                flock(lock, kind | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() < give_up:
                    time.sleep(LOCK_PATIENCE_S / 20)
                    continue
                owner = os.pread(lock, 1000, 0).decode(errors="replace").strip()
                os.close(lock)
                raise Refusal(
                    f"{self._path} is in use by {owner or 'another process'}; wait for it or stop it "
                    f"(scattergen cancel {self._path}), or choose another --name"
                ) from None
            except OSError as error:
                if force:
                    break
                os.close(lock)
                raise Refusal(
                    f"{self._path / name} cannot be locked ({error.strerror}), so a second run in this directory would "
                    "go unseen. If you are sure that there is none, add --force"
                ) from error
        job = os.environ.get("SLURM_JOB_ID")
        owner = f"host {socket.gethostname()}, pid {os.getpid()}" + (f", Slurm job {job}" if job else "")
        os.ftruncate(lock, 0)
        os.pwrite(lock, f"{owner}, since {time.strftime('%Y-%m-%d %H:%M:%S')}\n".encode(), 0)
        self._files.append(lock)


def is_held(path: Path, name: str = "lock") -> bool:
    """Return whether a live process holds the lock (False where the file system has no locks)."""
    try:
        try:
            lock, kind = os.open(path / name, os.O_RDWR), fcntl.LOCK_EX
        except PermissionError:  # somebody else's run: a reader's lock shows at least who has the whole of it
            lock, kind = os.open(path / name, os.O_RDONLY), fcntl.LOCK_SH
    except OSError:
        return False
    try:
        fcntl.flock(lock, kind | fcntl.LOCK_NB)
    except OSError as error:
        return error.errno in (errno.EAGAIN, errno.EACCES)
    finally:
        os.close(lock)
    return False


@contextlib.contextmanager
def alone(path: Path, what: str, give_up: Callable[[], bool]) -> Iterator[bool]:
    """Hold the lock `what` of a run; wait for other jobs to release it, and yield False if `give_up` says so first."""
    lock = os.open(path / f"{what}.lock", os.O_RDWR | os.O_CREAT, 0o644)
    try:
        taken = False
        while not (taken or give_up()):
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                taken = True
            except BlockingIOError:
                time.sleep(LOCK_PATIENCE_S / 20)
            except OSError:  # a file system without locks: `acquire` was told to go on
                taken = True
        yield taken
    finally:
        os.close(lock)


def cannot_write(path: Path, error: OSError) -> Refusal:
    """Return the refusal for a run directory that cannot be written."""
    return Refusal(f"cannot write to the run directory {path}: {error.strerror}; choose another --runs or --name")
