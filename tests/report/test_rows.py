"""Rows of a run, input beside output, from its run directory alone."""

import json
from pathlib import Path

import pytest

from hpc.exit import Refusal
from hpc.report.rows import Condition, RunRows, prompt_of
from tests.report.echo_run import ROWS, make_run, unfinish


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_run(tmp_path_factory.mktemp("rows"))


@pytest.fixture(scope="module")
def rows(finished: Path) -> RunRows:
    return RunRows(finished)


@pytest.fixture
def unfinished(tmp_path: Path) -> Path:
    run = make_run(tmp_path)
    unfinish(run)
    return run


def selected(rows: RunRows, *conditions: str) -> list[int]:
    return list(rows.select(rows.answered, [Condition.of(text) for text in conditions]))


def test_input_and_output_are_those_of_the_corpus_and_the_output_file(finished: Path, rows: RunRows) -> None:
    lines = [json.loads(line) for line in (finished / "completions.jsonl").read_text().splitlines()]
    found = rows.read(range(6))
    assert [answered.given for answered in found] == ROWS
    assert [answered.id for answered in found] == [line["id"] for line in lines]
    assert [answered.value("text") for answered in found] == [line["text"] for line in lines]
    assert [answered.error for answered in found] == [line["error"] for line in lines]
    assert [answered.prompt_tokens for answered in found] == [line["usage"]["prompt_tokens"] for line in lines]


def test_a_row_has_its_place_in_the_corpus(rows: RunRows) -> None:
    [answered] = rows.read([4])
    assert answered.place == "c.jsonl:5"


@pytest.mark.parametrize(
    ("condition", "found"),
    [
        ("finish_reason=length", [0, 1, 3, 4, 5]), ("finish_reason=error", [2]), ("error=empty", [2]),
        ("error=null", [0, 1, 3, 4, 5]), ("id=17", [1]), ("completion_tokens=6", [3]), ("prompt_tokens=2040", [5]),
        ("text=x", [5]), ("meta.lang=de", [0, 2, 4]), ("meta.score=1.5", [0]), ("meta.score=null", [3]),
        ("meta.sampling=null", []),
    ],
)  # fmt: skip
def test_a_condition_selects_the_rows_that_fulfil_it(rows: RunRows, condition: str, found: list[int]) -> None:
    assert selected(rows, condition) == found


def test_all_of_several_conditions_must_hold(rows: RunRows) -> None:
    assert selected(rows, "meta.lang=de", "finish_reason=length") == [0, 4]


@pytest.mark.parametrize("text", ["finish_reason", "reason=stop", "usage.prompt_tokens=3"])
def test_a_condition_that_is_none_is_refused_naming_the_fields(text: str) -> None:
    with pytest.raises(Refusal, match=rf"--where {text}.*FIELD=VALUE.*finish_reason.*meta\.KEY"):
        Condition.of(text)


def test_an_id_finds_strings_and_integers(rows: RunRows) -> None:
    assert rows.named(["17", "a", "3"]).tolist() == [0, 1, 3]


def test_an_id_that_no_row_has_is_refused_by_its_name(rows: RunRows) -> None:
    with pytest.raises(Refusal, match=r"no row of .* has the id nobody"):
        rows.named(["a", "nobody"])


def test_a_sample_has_as_many_different_rows_as_it_is_asked_for(rows: RunRows) -> None:
    found = rows.sample([0, 1, 3, 4], 3)
    assert found == sorted(set(found))
    assert len(found) == 3
    assert set(found) <= {0, 1, 3, 4}


def test_of_a_run_that_is_going_on_the_rows_in_the_journals_are_there(unfinished: Path) -> None:
    rows = RunRows(unfinished)
    last = set(range(6)) - set(rows.answered.tolist())
    assert len(last) == 1
    assert rows.read(sorted(last))[0].finish_reason == "pending"


def test_where_the_corpus_is_gone_the_outputs_are_left(tmp_path: Path) -> None:
    run = make_run(tmp_path)
    (tmp_path / "c.jsonl").rename(tmp_path / "elsewhere.jsonl")
    rows = RunRows(run)
    [answered] = rows.read([0])
    assert (answered.given, answered.value("completion_tokens")) == (None, 8)
    with pytest.raises(Refusal, match=r"--where meta\.lang: .*c\.jsonl cannot be read"):
        selected(rows, "meta.lang=de")


def test_a_folder_that_is_no_run_directory_is_refused(tmp_path: Path) -> None:
    with pytest.raises(Refusal, match=r"no run directory"):
        RunRows(tmp_path)


def test_a_column_that_is_the_prompt_is_shown_as_the_prompt(tmp_path: Path) -> None:
    [answered] = RunRows(make_run(tmp_path, [{"question": "Why?"}], column=("prompt=question",))).read([0])
    assert answered.read_as is not None
    assert list(prompt_of(answered.read_as)) == [("", "Why?")]


def test_the_parts_of_a_turn_are_shown_as_lines() -> None:
    parts = [{"type": "text", "text": "one"}, {"type": "text", "text": "two"}]
    assert [*prompt_of({"messages": [{"role": "user", "content": parts}]})] == [("user", "one\ntwo")]
