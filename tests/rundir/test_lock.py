"""A run directory has one owner at a time."""

import errno
import os
import socket
import subprocess
from pathlib import Path

import pytest

from hpc.exit import Refusal
from hpc.job import Share
from hpc.rundir.lock import RunLock, is_held
from tests.conftest import start


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    made = tmp_path / "run"
    made.mkdir()
    return made


def no_locks(file: int, operation: int) -> None:
    """Answer as a file system without locks does."""
    raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))


def taken(file: int, operation: int) -> None:
    """Answer as a file that is locked does."""
    raise BlockingIOError(errno.EAGAIN, os.strerror(errno.EAGAIN))


HOLD = """
import signal, sys
from pathlib import Path
from hpc.rundir.lock import RunLock

lock = RunLock(Path(sys.argv[1]))
lock.acquire()
print("taken", flush=True)
signal.pause()
"""


def held_by_another_process(folder: Path) -> subprocess.Popen[str]:
    """Start a process that has the run directory until it is killed."""
    process = start(["-c", HOLD, str(folder)])
    assert process.stdout is not None
    assert process.stdout.readline() == "taken\n"
    return process


def kill(process: "subprocess.Popen[str]") -> None:
    process.kill()
    process.communicate()


def test_a_second_owner_is_refused_with_the_name_of_the_first(folder: Path) -> None:
    lock = RunLock(folder)
    process = held_by_another_process(folder)
    with pytest.raises(Refusal) as caught:
        lock.acquire(patience_s=0)
    kill(process)
    assert f"in use by host {socket.gethostname()}, pid {process.pid}, since " in str(caught.value)
    assert "choose another --name" in str(caught.value)


@pytest.mark.parametrize(("first", "second"), [("", "0/2"), ("0/2", ""), ("0/2", "0/2")])
def test_what_would_generate_the_same_rows_at_the_same_time_is_refused(folder: Path, first: str, second: str) -> None:
    lock = RunLock(folder, Share.of(first))
    lock.acquire()
    with pytest.raises(Refusal, match="is in use by host"):
        RunLock(folder, Share.of(second)).acquire(patience_s=0)
    lock.release()


def test_a_lock_that_is_held_for_a_moment_is_waited_for(folder: Path) -> None:
    answers = iter([True, False])
    lock = RunLock(folder)
    lock.acquire(flock=lambda file, kind: taken(file, kind) if next(answers) else None)
    assert f"pid {os.getpid()}" in (folder / "lock").read_text()
    lock.release()


def test_force_does_not_take_what_another_process_has(folder: Path) -> None:
    lock = RunLock(folder)
    with pytest.raises(Refusal, match="is in use by another process"):
        lock.acquire(force=True, flock=taken, patience_s=0)


def test_the_lock_of_a_killed_process_can_be_taken(folder: Path) -> None:
    lock = RunLock(folder)
    kill(held_by_another_process(folder))
    lock.acquire()
    assert (folder / "lock").read_text().startswith(f"host {socket.gethostname()}, pid {os.getpid()}, since ")
    lock.release()


def test_a_lock_is_held_as_long_as_its_process_lives(folder: Path) -> None:
    process = held_by_another_process(folder)
    alive = is_held(folder)
    kill(process)
    assert (alive, is_held(folder)) == (True, False)


def test_a_new_run_directory_is_not_held(folder: Path) -> None:
    assert not is_held(folder)


def test_asking_whether_it_is_held_does_not_take_it(folder: Path) -> None:
    lock = RunLock(folder)
    lock.acquire()
    lock.release()
    is_held(folder)
    lock.acquire()
    lock.release()


def test_what_is_released_can_be_taken(folder: Path) -> None:
    lock = RunLock(folder)
    lock.acquire()
    lock.release()
    other = RunLock(folder)
    other.acquire()
    other.release()


def test_a_file_system_without_locks_is_refused_with_the_way_out(folder: Path) -> None:
    lock = RunLock(folder)
    with pytest.raises(Refusal, match=r"cannot be locked \(No locks available\).* add --force"):
        lock.acquire(flock=no_locks)


def test_force_goes_on_where_the_file_system_has_no_locks(folder: Path) -> None:
    lock = RunLock(folder)
    lock.acquire(force=True, flock=no_locks)
    assert f"pid {os.getpid()}" in (folder / "lock").read_text()
    lock.release()


def test_a_folder_that_is_not_there_cannot_be_taken(tmp_path: Path) -> None:
    with pytest.raises(Refusal, match="cannot write to the run directory"):
        RunLock(tmp_path / "missing").acquire()
