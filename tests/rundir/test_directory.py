"""A run directory has one owner at a time, and binds its attempts to one another."""

import errno
import os
import socket
import subprocess
from pathlib import Path

import pytest

from hpc.exit import Refusal
from hpc.job import Job
from hpc.rundir.directory import RunDirectory
from hpc.sampling_params import SamplingParams
from tests.conftest import start

JOB = Job("m", ("c.jsonl",), sampling=SamplingParams(stop=("é",)))
BINDING = {"model": "m1", "tokenizer": "t1", "template": "p1", "dtype": "float32"}


@pytest.fixture
def directory(tmp_path: Path) -> RunDirectory:
    made = RunDirectory(tmp_path / "run")
    made.create()
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
from hpc.rundir.directory import RunDirectory

directory = RunDirectory(Path(sys.argv[1]))
directory.acquire()
print("taken", flush=True)
signal.pause()
"""


def held_by_another_process(directory: RunDirectory) -> subprocess.Popen[str]:
    """Start a process that has the run directory until it is killed."""
    process = start(["-c", HOLD, str(directory.path)])
    assert process.stdout is not None
    assert process.stdout.readline() == "taken\n"
    return process


def kill(process: "subprocess.Popen[str]") -> None:
    process.kill()
    process.communicate()


def test_a_second_owner_is_refused_with_the_name_of_the_first(directory: RunDirectory) -> None:
    process = held_by_another_process(directory)
    with pytest.raises(Refusal) as caught:
        directory.acquire()
    kill(process)
    assert f"in use by host {socket.gethostname()}, pid {process.pid}, since " in str(caught.value)
    assert "choose another --name" in str(caught.value)


def test_force_does_not_take_what_another_process_has(directory: RunDirectory) -> None:
    with pytest.raises(Refusal, match="is in use by another process"):
        directory.acquire(force=True, flock=taken)


def test_the_lock_of_a_killed_process_can_be_taken(directory: RunDirectory) -> None:
    kill(held_by_another_process(directory))
    directory.acquire()
    assert (directory.path / "lock").read_text().startswith(f"host {socket.gethostname()}, pid {os.getpid()}, since ")
    directory.release()


def test_a_lock_is_held_as_long_as_its_process_lives(directory: RunDirectory) -> None:
    process = held_by_another_process(directory)
    alive = directory.is_held()
    kill(process)
    assert (alive, directory.is_held()) == (True, False)


def test_a_new_run_directory_is_not_held(directory: RunDirectory) -> None:
    assert not directory.is_held()


def test_asking_whether_it_is_held_does_not_take_it(directory: RunDirectory) -> None:
    directory.acquire()
    directory.release()
    directory.is_held()
    directory.acquire()
    directory.release()


def test_what_is_released_can_be_taken(directory: RunDirectory) -> None:
    directory.acquire()
    directory.release()
    other = RunDirectory(directory.path)
    other.acquire()
    other.release()


def test_a_file_system_without_locks_is_refused_with_the_way_out(directory: RunDirectory) -> None:
    with pytest.raises(Refusal, match=r"cannot be locked \(No locks available\).* add --force"):
        directory.acquire(flock=no_locks)


def test_force_goes_on_where_the_file_system_has_no_locks(directory: RunDirectory) -> None:
    directory.acquire(force=True, flock=no_locks)
    assert f"pid {os.getpid()}" in (directory.path / "lock").read_text()
    directory.release()


def test_a_folder_that_cannot_be_made_is_refused_with_the_way_out(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(Refusal, match=r"cannot write to the run directory .*; choose another --runs or --name"):
        RunDirectory(tmp_path / "file" / "run").create()


def test_a_folder_that_is_not_there_cannot_be_taken(tmp_path: Path) -> None:
    with pytest.raises(Refusal, match="cannot write to the run directory"):
        RunDirectory(tmp_path / "missing").acquire()


@pytest.mark.parametrize("name", BINDING)
def test_an_attempt_with_something_else_is_refused_with_the_name_of_the_field(
    directory: RunDirectory, name: str
) -> None:
    directory.write_job(JOB, (), BINDING, Path("m"))
    with pytest.raises(Refusal, match=f"was begun with {name} {BINDING[name]}, and this job has {name} other"):
        directory.check_bound({**BINDING, name: "other"})


def test_an_attempt_with_the_same_is_not_refused(directory: RunDirectory) -> None:
    directory.write_job(JOB, (), BINDING, Path("m"))
    directory.check_bound(BINDING)


def test_a_first_attempt_is_bound_to_nothing(directory: RunDirectory) -> None:
    directory.check_bound(BINDING)


def test_the_first_attempt_is_1(directory: RunDirectory) -> None:
    assert directory.next_attempt() == 1


@pytest.mark.parametrize("kind", ["journal", "events", "log"])
def test_an_attempt_that_left_anything_is_counted(directory: RunDirectory, kind: str) -> None:
    getattr(directory, kind)(7, 3).write_text("")
    directory.journal(2, 0).write_text("")
    assert directory.next_attempt() == 8


def test_files_that_are_of_no_attempt_are_not_counted(directory: RunDirectory) -> None:
    (directory.path / "log" / "notes.txt").write_text("")
    assert directory.next_attempt() == 1


def test_journals_come_by_attempt_and_rank(directory: RunDirectory) -> None:
    expected = [directory.journal(attempt, rank) for attempt in (1, 2, 10) for rank in (0, 1, 10)]
    for path in reversed(expected):
        path.write_text("")
    assert directory.journals() == expected


def test_the_state_of_a_run_that_never_was_is_new(tmp_path: Path) -> None:
    assert RunDirectory(tmp_path / "missing").state == "new"


def test_the_state_is_what_was_set_last(directory: RunDirectory) -> None:
    directory.set_state("running")
    directory.set_state("done")
    assert directory.state == "done"


def test_before_the_first_attempt_there_is_no_job(directory: RunDirectory) -> None:
    assert directory.read_job() is None


def test_the_job_comes_back_as_it_was(directory: RunDirectory) -> None:
    directory.write_job(JOB, (Path("/a/c.jsonl"),), BINDING, Path("/m"))
    found = directory.read_job()
    assert found is not None
    assert Job.from_json(found["job"]) == JOB
    assert (found["files"], found["model_path"], found["bound"]) == (["/a/c.jsonl"], "/m", BINDING)


def test_the_record_of_a_job_has_the_versions_it_ran_with(directory: RunDirectory) -> None:
    directory.write_job(JOB, (), BINDING, Path("m"))
    found = directory.read_job()
    assert found is not None
    assert {"scattergen", "torch", "transformers", "mpi4py", "numpy"} <= set(found["versions"])


def test_what_has_no_job_json_is_refused_as_no_run_directory(tmp_path: Path) -> None:
    with pytest.raises(Refusal, match=f"{tmp_path} is no run directory: it has no job.json"):
        RunDirectory(tmp_path).recorded_job()


def test_a_damaged_job_json_is_refused_by_its_path(tmp_path: Path) -> None:
    (tmp_path / "job.json").write_text('{"job": ')
    with pytest.raises(Refusal, match=r"job\.json cannot be read"):
        RunDirectory(tmp_path).recorded_job()
