"""A run is bound to what is known of its job, wherever that becomes known."""

from pathlib import Path
from typing import Any

import pytest

from hpc.exit import Refusal
from hpc.job import Job
from hpc.model.bind import bind_run
from hpc.model.find import Model
from hpc.rundir.directory import RunDirectory

MODEL = Model(Path("m"), "m1", "t1", "p1")
WHOLE = {"model": "m1", "tokenizer": "t1", "template": "p1", "dtype": "float32", "chat_date": "2026-01-01T00:00:00"}
JOB = Job("m", ("c.jsonl",), dtype="float32", chat_date="2026-01-01T00:00:00")


@pytest.fixture
def directory(tmp_path: Path) -> RunDirectory:
    made = RunDirectory(tmp_path / "run")
    made.create()
    return made


def test_a_resolved_job_binds_its_run_to_model_dtype_and_date(directory: RunDirectory) -> None:
    assert bind_run(directory, JOB, MODEL) == WHOLE


def test_a_job_binds_its_run_to_nothing_that_only_a_node_can_resolve(directory: RunDirectory) -> None:
    assert bind_run(directory, Job("m", ("c.jsonl",)), None) == {}


def test_a_run_of_another_model_is_refused_though_nothing_else_is_known(directory: RunDirectory) -> None:
    directory.write_job(JOB, (), {"model": "m0"}, Path("m"))
    with pytest.raises(Refusal, match="was begun with model m0, and this job has model m1"):
        bind_run(directory, Job("m", ("c.jsonl",)), MODEL)


def with_prompts(**knobs: Any) -> Job:
    return Job("m", ("c.jsonl",), **knobs)


@pytest.mark.parametrize(
    ("first", "second"),
    [({}, {"system": "be brief"}), ({"column": ("prompt=a",)}, {}), ({"system": "a"}, {"system": "b"})],
)
def test_a_run_whose_rows_became_prompts_in_another_way_is_refused(
    directory: RunDirectory, first: dict[str, Any], second: dict[str, Any]
) -> None:
    job = with_prompts(**first)
    directory.write_job(job, (), bind_run(directory, job, MODEL), Path("m"))
    with pytest.raises(Refusal, match="was begun with prompts from"):
        bind_run(directory, with_prompts(**second), MODEL)


def test_a_run_goes_on_where_other_rows_are_refused(directory: RunDirectory) -> None:
    job = with_prompts(system="a")
    directory.write_job(job, (), bind_run(directory, job, MODEL), Path("m"))
    assert bind_run(directory, with_prompts(system="a", unknown_parameters="ignore"), MODEL)["prompts"]
