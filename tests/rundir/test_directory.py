"""A run directory keeps what is known of a run, and binds its attempts to one another."""

from pathlib import Path

import pytest

from hpc.exit import Refusal
from hpc.job import Job
from hpc.rundir.directory import RunDirectory
from hpc.rundir.lock import alone
from hpc.sampling_params import SamplingParams
from tests.report.echo_run import make_run

JOB = Job("m", ("c.jsonl",), sampling=SamplingParams(stop=("é",)))
BINDING = {"model": "m1", "tokenizer": "t1", "template": "p1", "dtype": "float32"}


@pytest.fixture
def directory(tmp_path: Path) -> RunDirectory:
    made = RunDirectory(tmp_path / "run")
    made.create()
    return made


def test_a_folder_that_cannot_be_made_is_refused_with_the_way_out(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(Refusal, match=r"cannot write to the run directory .*; choose another --runs or --name"):
        RunDirectory(tmp_path / "file" / "run").create()


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


def test_a_folder_of_run_directories_is_refused_with_the_name_of_one(tmp_path: Path, directory: RunDirectory) -> None:
    directory.write_job(JOB, (), BINDING, Path("m"))
    with pytest.raises(Refusal, match=f"one of the 1 in it, such as {directory.path}"):
        RunDirectory(directory.path.parent).recorded_job()


def test_a_failed_run_with_a_finished_row_stays_bound(directory: RunDirectory) -> None:
    directory.write_job(JOB, (), BINDING, Path("m"))
    directory.set_state("failed")
    directory.journal(1, 0).write_bytes(b"a record")
    assert directory.binding_job() == directory.read_job()


def test_a_damaged_job_json_is_refused_by_its_path(tmp_path: Path) -> None:
    (tmp_path / "job.json").write_text('{"job": ')
    with pytest.raises(Refusal, match=r"job\.json cannot be read"):
        RunDirectory(tmp_path).recorded_job()


def test_every_file_of_a_finished_run_but_its_output_is_its_own(tmp_path: Path) -> None:
    run = make_run(tmp_path)
    kept = {path.name: RunDirectory(run).keeps(path) for path in run.rglob("*") if path.is_file()}
    assert [name for name, own in kept.items() if not own] == ["completions.jsonl"]


def test_the_lock_of_a_part_of_the_work_is_the_runs_own(tmp_path: Path) -> None:
    with alone(tmp_path, "submit", lambda: False):
        assert [RunDirectory(tmp_path).keeps(path) for path in tmp_path.iterdir()] == [True]
