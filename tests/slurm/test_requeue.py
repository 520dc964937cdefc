"""A job goes back into the queue while work is left and it gets on with it, and never otherwise."""

import json
from pathlib import Path

import pytest

from hpc.job import Job, Slurm
from hpc.rundir.directory import RunDirectory
from hpc.slurm.allocation import Allocation
from hpc.slurm.requeue import requeue

JOB = Allocation("7", 0)


def job(tmp_path: Path, **slurm: int) -> Job:
    return Job("m", ("c.jsonl",), name="x", runs=str(tmp_path), slurm=Slurm(**slurm))  # type: ignore[arg-type]


def run(tmp_path: Path, state: str, records: str = "{}\n", begun_by: Allocation = JOB) -> RunDirectory:
    """Make the run directory as one attempt leaves it."""
    directory = RunDirectory(tmp_path / "x")
    directory.create()
    directory.set_state(state)  # type: ignore[arg-type]
    event = {"phase": "begin", "slurm_job": begun_by.job_id, "restarts": begun_by.restarts}
    directory.events(1, 0).write_text(json.dumps(event) + "\n")
    directory.journal(1, 1).write_text(records)
    return directory


def test_a_run_that_is_done_is_not_requeued(tmp_path: Path) -> None:
    run(tmp_path, "done")
    assert requeue(job(tmp_path), JOB) == 0


def test_a_job_that_was_refused_is_a_fault_though_an_earlier_attempt_was_done(tmp_path: Path) -> None:
    with run(tmp_path, "done").events(1, 0).open("a") as file:
        file.write('{"phase": "refused"}\n')
    assert requeue(job(tmp_path), JOB) == 1


@pytest.mark.parametrize("state", ["drained", "running"])
def test_a_run_with_work_left_that_got_on_is_requeued(tmp_path: Path, state: str) -> None:
    run(tmp_path, state)
    assert requeue(job(tmp_path), JOB) == 75


def test_a_fault_is_not_requeued(tmp_path: Path) -> None:
    run(tmp_path, "failed")
    assert requeue(job(tmp_path), JOB) == 1


def test_a_run_that_never_began_is_not_requeued(tmp_path: Path) -> None:
    assert requeue(job(tmp_path), JOB) == 1


def test_an_attempt_without_a_completion_is_not_requeued(tmp_path: Path) -> None:
    run(tmp_path, "drained", records="")
    assert requeue(job(tmp_path), JOB) == 1


@pytest.mark.parametrize("other", [Allocation("6", 0), Allocation("7", 1)])
def test_completions_of_another_attempt_do_not_count(tmp_path: Path, other: Allocation) -> None:
    run(tmp_path, "drained", begun_by=other)
    assert requeue(job(tmp_path), JOB) == 1


def test_a_cancelled_run_is_not_requeued(tmp_path: Path) -> None:
    run(tmp_path, "drained").cancelled.touch()
    assert requeue(job(tmp_path), JOB) == 1


@pytest.mark.parametrize(("restarts", "code"), [(2, 75), (3, 1)])
def test_a_job_is_requeued_at_most_so_often(tmp_path: Path, restarts: int, code: int) -> None:
    allocation = Allocation("7", restarts)
    run(tmp_path, "drained", begun_by=allocation)
    assert requeue(job(tmp_path, max_requeues=3), allocation) == code


def test_outside_of_an_allocation_nothing_is_requeued(tmp_path: Path) -> None:
    run(tmp_path, "drained")
    assert requeue(job(tmp_path), None) == 1
