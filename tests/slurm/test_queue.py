"""Slurm is asked with a limit, not too often, and what it says is told in words. Its clients are scripts here."""

import time
from pathlib import Path

import pytest

from hpc.rundir.directory import RunDirectory
from hpc.slurm.queue import Answer, ask_slurm, ask_slurm_now_and_then, describe_answer, has_slurm


class Clients:
    """Slurm's commands as this test wants them, first on PATH; what they are called with is counted."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        folder.mkdir()

    def say(self, name: str, *lines: str, code: int = 0) -> None:
        script = "".join(f"echo '{line}'\n" for line in lines)
        path = self.folder / name
        path.write_text(f'#!/bin/sh\necho "{name} $*" >> "{self.folder}/calls"\n{script}exit {code}\n')
        path.chmod(0o755)

    @property
    def calls(self) -> list[str]:
        path = self.folder / "calls"
        return path.read_text().splitlines() if path.exists() else []


@pytest.fixture
def clients(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Clients:
    made = Clients(tmp_path / "bin")
    monkeypatch.setenv("PATH", f"{made.folder}:/usr/bin:/bin")
    made.say("squeue", code=1)
    made.say("sacct", code=1)
    return made


@pytest.fixture
def directory(tmp_path: Path) -> RunDirectory:
    made = RunDirectory(tmp_path / "run")
    made.create()
    return made


def test_the_queue_tells_the_state_of_a_job(clients: Clients) -> None:
    clients.say("squeue", "PENDING|Resources")
    assert ask_slurm("7") == Answer("7", {"PENDING": 1}, "Resources")


def test_the_elements_of_an_array_are_counted(clients: Clients) -> None:
    clients.say("squeue", "RUNNING|None", "PENDING|Priority", "RUNNING|None")
    assert ask_slurm("7") == Answer("7", {"PENDING": 1, "RUNNING": 2}, "Priority")


def test_the_accounting_tells_what_the_queue_has_forgotten(clients: Clients) -> None:
    clients.say("sacct", "CANCELLED by 1000|None")
    assert ask_slurm("7") == Answer("7", {"CANCELLED": 1})


def test_a_job_that_neither_knows_has_no_answer(clients: Clients) -> None:
    assert ask_slurm("7") is None


def test_without_slurm_there_is_no_answer(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    assert ask_slurm("7") is None


def test_slurm_is_asked_once_in_ten_seconds(clients: Clients, tmp_path: Path) -> None:
    clients.say("squeue", "RUNNING|None")
    answers = [ask_slurm_now_and_then("7", tmp_path / "memory") for _ in range(3)]
    assert (answers[0], len(set(map(str, answers))), len(clients.calls)) == (Answer("7", {"RUNNING": 1}), 1, 1)


def test_that_slurm_knows_nothing_is_remembered_too(clients: Clients, tmp_path: Path) -> None:
    assert [ask_slurm_now_and_then("7", tmp_path / "memory") for _ in range(2)] == [None, None]
    assert len(clients.calls) == 2  # squeue and sacct, once


def test_another_job_is_asked_for_at_once(clients: Clients, tmp_path: Path) -> None:
    clients.say("squeue", "RUNNING|None")
    for job_id in ("7", "8"):
        ask_slurm_now_and_then(job_id, tmp_path / "memory")
    assert len(clients.calls) == 2


@pytest.mark.parametrize(
    ("line", "state", "words"),
    [
        ("RUNNING|None", "running", "runs"),
        ("PENDING|Priority", "new", "waits (Priority)"),
        ("PENDING|BeginTime", "drained", "requeued, waits (BeginTime)"),
        ("FAILED|NonZeroExitCode", "drained", "failed"),
        ("TIMEOUT|TimeLimit", "running", "ended at its time limit"),
        ("CANCELLED|None", "drained", "cancelled"),
        ("OUT_OF_MEMORY|OutOfMemory", "running", "out of memory"),
        ("NODE_FAIL|NodeDown", "running", "a node failed"),
        ("PREEMPTED|None", "running", "preempted"),
        ("COMPLETED|None", "done", "completed"),
    ],
)
def test_a_state_is_told_in_words(clients: Clients, directory: RunDirectory, line: str, state: str, words: str) -> None:
    clients.say("squeue", line)
    directory.set_state(state)  # type: ignore[arg-type]
    assert describe_answer("7", directory).startswith(f"Slurm job 7: {words}")


@pytest.mark.parametrize(("said", "left_s"), [("1-02:03:04", 93784), ("59:30", 3570), ("12", 12)])
def test_the_end_is_asked_for_where_no_variable_tells_it(
    clients: Clients, monkeypatch: pytest.MonkeyPatch, said: str, left_s: int
) -> None:
    clients.say("squeue", said)
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    monkeypatch.delenv("SLURM_JOB_END_TIME", raising=False)
    before = time.time()
    here = has_slurm()
    assert here is not None
    assert here.ends_at is not None
    assert before <= here.ends_at - left_s <= time.time()


@pytest.mark.parametrize("said", ["UNLIMITED", "NOT_SET", "INVALID", ""])
def test_a_job_without_a_limit_has_no_end(clients: Clients, monkeypatch: pytest.MonkeyPatch, said: str) -> None:
    clients.say("squeue", said)
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    monkeypatch.delenv("SLURM_JOB_END_TIME", raising=False)
    here = has_slurm()
    assert here is not None
    assert here.ends_at is None


def test_a_variable_that_tells_the_end_is_believed(clients: Clients, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    monkeypatch.setenv("SLURM_JOB_END_TIME", "1234567890")
    here = has_slurm()
    assert here is not None
    assert (here.ends_at, clients.calls) == (1234567890.0, [])


def test_outside_of_slurm_there_is_no_allocation(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("SLURM_JOB_ID", raising=False)
    assert has_slurm() is None
