"""Outputs of whole runs: written, merged again, verified, in every format."""

import gzip
import json
import os
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

from hpc.exit import FAULT, OK, UNFINISHED, Refusal
from hpc.job import Output
from hpc.output.verify import merge_run, verify_run
from tests.conftest import read_rows
from tests.fakes import EchoLoader
from tests.test_pipeline import FailingEngine, run

BATCH: list[object] = [
    {"custom_id": "a", "method": "POST", "url": "/v1/chat/completions",
     "body": {"messages": [{"role": "user", "content": "hi"}], "max_tokens": 4}},
    {"custom_id": "b", "url": "/v1/completions", "body": {"prompt": "xyz", "max_tokens": 2}},
    {"custom_id": "a", "body": {"messages": [{"role": "user", "content": "again"}]}},
    "no JSON",
    {"custom_id": "c", "body": {"messages": [{"role": "user", "content": "hi"}], "temperature": "hot"}},
    {"custom_id": "d", "url": "/v1/embeddings", "body": {"input": "hi"}},
]  # fmt: skip
ROWS: list[object] = [
    {"prompt": "abc", "x": 1},
    {"id": "é", "prompt": "abc", "sampling": {"n": 2, "temperature": 1, "logprobs": 1}},
    "no JSON",
    {"prompt": "d"},
    {"prompt": ""},
]
NAMES = ["a.jsonl", "a.jsonl.gz", "a.jsonl.zst", "a.csv", "a.parquet"]
DIRECTORY = Path("runs/rows")


def files(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("rows", [ROWS, BATCH], ids=["rows", "batch"])
def test_an_output_of_any_format_is_verified(tmp_path: Path, name: str, rows: list[object]) -> None:
    assert run(tmp_path, rows, output=str(tmp_path / "out" / name)) == OK
    assert files(tmp_path / "out") == [name]
    assert not (tmp_path / DIRECTORY / "completions.jsonl").exists()
    assert verify_run(tmp_path / DIRECTORY) == OK


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("rows", [ROWS, BATCH], ids=["rows", "batch"])
def test_an_output_is_verified_but_for_what_it_carries_where_the_corpus_is_gone(
    tmp_path: Path, name: str, rows: list[object]
) -> None:
    run(tmp_path, rows, output=str(tmp_path / name))
    (tmp_path / "rows.jsonl").unlink()
    assert verify_run(tmp_path / DIRECTORY) == OK


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("rows", [ROWS, BATCH], ids=["rows", "batch"])
def test_merge_writes_the_same_again(tmp_path: Path, name: str, rows: list[object]) -> None:
    path = tmp_path / name
    run(tmp_path, rows, output=str(path))
    before = path.read_bytes()
    path.unlink()
    assert (verify_run(tmp_path / DIRECTORY), merge_run(tmp_path / DIRECTORY), path.read_bytes()) == (FAULT, OK, before)


@pytest.mark.parametrize("name", ["a.jsonl", "a.csv", "a.parquet"])
def test_a_row_that_another_run_would_give_is_named(
    tmp_path: Path, name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    run(tmp_path, [{"prompt": "abc"}, {"prompt": "xyz"}], output=str(tmp_path / name))
    right = (tmp_path / name).read_bytes()
    (tmp_path / name).unlink()
    run(tmp_path, [{"prompt": "abc"}, {"prompt": "uvw"}], output=str(tmp_path / name), name="other")
    assert (tmp_path / name).read_bytes() != right
    (tmp_path / "rows.jsonl").write_text('{"prompt": "abc"}\n{"prompt": "xyz"}\n')
    assert (verify_run(tmp_path / DIRECTORY), "row 1" in capsys.readouterr().out) == (FAULT, True)


def test_several_files_have_so_many_rows_each(tmp_path: Path) -> None:
    run(tmp_path, [{"prompt": f"p{row}"} for row in range(7)], output=f"{tmp_path}/out", output_rows_per_file=3)
    folder = tmp_path / "out"
    names = [f"completions-0000{index}-of-00003.jsonl" for index in range(3)]
    assert files(folder) == names
    assert [[row["id"] for row in read_rows(folder / name)] for name in names] == [[0, 1, 2], [3, 4, 5], [6]]
    assert verify_run(tmp_path / DIRECTORY) == OK


@pytest.mark.parametrize("name", ["a.csv", "a.parquet"])
def test_each_of_several_files_is_whole(tmp_path: Path, name: str) -> None:
    rows: list[object] = [{"prompt": f"p{row}"} for row in range(5)]
    run(tmp_path, rows, output=str(tmp_path / "out" / name), output_rows_per_file=2)
    assert len(files(tmp_path / "out")) == 3
    assert verify_run(tmp_path / DIRECTORY) == OK


def test_a_missing_one_of_several_files_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run(tmp_path, [{"prompt": f"p{row}"} for row in range(5)], output=str(tmp_path / "a.jsonl"), output_rows_per_file=2)
    (tmp_path / "a-00001-of-00003.jsonl").unlink()
    assert verify_run(tmp_path / DIRECTORY) == FAULT
    printed = capsys.readouterr().out
    assert all(row in printed for row in ("row 2", "row 3"))


def test_another_number_of_files_takes_the_place_of_the_first(tmp_path: Path) -> None:
    rows: list[object] = [{"prompt": f"p{row}"} for row in range(5)]
    for count in (2, 3):
        run(tmp_path, rows, output=str(tmp_path / "out/a.jsonl"), output_rows_per_file=count)
    assert files(tmp_path / "out") == ["a-00000-of-00002.jsonl", "a-00001-of-00002.jsonl"]


def test_a_batch_is_answered_line_by_line_in_the_apis_shape(tmp_path: Path) -> None:
    run(tmp_path, BATCH)
    lines = read_rows(tmp_path / DIRECTORY / "completions.jsonl")
    found: Any = [(line["custom_id"], line["response"]) for line in lines]
    assert [(name, response["status_code"]) for name, response in found] == [
        ("a", 200), ("b", 200), ("a", 400), (None, 400), ("c", 400), ("d", 400),
    ]  # fmt: skip
    assert [found[row][1]["body"]["object"] for row in (0, 1)] == ["chat.completion", "text_completion"]


def test_an_error_file_takes_the_lines_without_a_completion(tmp_path: Path) -> None:
    errors = tmp_path / "errors.jsonl"
    run(tmp_path, BATCH, output=str(tmp_path / "good.jsonl"), error_file=str(errors))
    assert [line["custom_id"] for line in read_rows(tmp_path / "good.jsonl")] == ["a", "b"]
    assert [line["custom_id"] for line in read_rows(errors)] == ["a", None, "c", "d"]
    assert verify_run(tmp_path / DIRECTORY) == OK
    errors.write_bytes(errors.read_bytes().replace(b'"d"', b'"e"'))
    assert verify_run(tmp_path / DIRECTORY) == FAULT


def test_the_api_says_the_same_time_after_a_resume(tmp_path: Path) -> None:
    run(tmp_path, BATCH)
    path = tmp_path / DIRECTORY / "completions.jsonl"
    before = path.read_bytes()
    job = tmp_path / DIRECTORY / "job.json"
    values = json.loads(job.read_text())
    job.write_text(json.dumps({**values, "created": values["created"] - 9}))
    run(tmp_path, BATCH)
    first, again = (json.loads(lines.splitlines()[0])["response"]["body"] for lines in (before, path.read_bytes()))
    assert {**again, "created": again["created"] + 9} == first


def unfinished(tmp_path: Path, rows: list[object], **knobs: object) -> Path:
    """A finished run whose journal lost its last record, as one that goes on has it."""
    run(tmp_path, rows, **knobs)
    [journal] = (tmp_path / DIRECTORY / "journal").iterdir()
    journal.write_bytes(b"".join(journal.read_bytes().splitlines(keepends=True)[:-1]))
    (tmp_path / DIRECTORY / "state").write_text("running\n")
    return tmp_path / DIRECTORY


@pytest.mark.parametrize(
    ("name", "partial"), [("a.jsonl.gz", "a.partial.jsonl.gz"), ("a.parquet", "a.partial.parquet")]
)
def test_merge_of_a_run_that_goes_on_writes_what_is_finished_beside_the_output(
    tmp_path: Path, name: str, partial: str
) -> None:
    path = tmp_path / name
    directory = unfinished(tmp_path, [{"prompt": "a"}, {"prompt": "b"}], output=str(path))
    before = {file: file.read_bytes() for file in directory.rglob("*") if file.is_file() and file.name != "outputs"}
    path.unlink()
    assert merge_run(directory) == UNFINISHED
    assert {file: file.read_bytes() for file in before} == before
    assert (path.exists(), (tmp_path / partial).exists()) == (False, True)
    assert merge_run(directory) == UNFINISHED


def test_a_partial_output_has_the_finished_rows_in_their_order(tmp_path: Path) -> None:
    directory = unfinished(tmp_path, [{"id": name, "prompt": "x" * 9} for name in "ab"] + [{"id": "c", "prompt": ""}])
    merge_run(directory, output=Output(str(tmp_path / "p.parquet")))
    assert pq.read_table(tmp_path / "p.partial.parquet")["id"].to_pylist() == ["c"]


def test_a_partial_answer_to_a_batch_names_the_lines_that_have_not_been_run(tmp_path: Path) -> None:
    directory = unfinished(tmp_path, BATCH)
    merge_run(directory)
    lines: Any = read_rows(directory / "completions.partial.jsonl")
    assert len(lines) == len(BATCH)
    assert [line["error"]["code"] for line in lines if line["response"] is None] == ["not_run"]


def test_lines_that_have_not_been_run_are_in_the_error_file(tmp_path: Path) -> None:
    directory = unfinished(tmp_path, BATCH, output=str(tmp_path / "a.jsonl"), error_file=str(tmp_path / "e.jsonl"))
    merge_run(directory)
    found = [len(read_rows(tmp_path / name)) for name in ("a.partial.jsonl", "e.partial.jsonl")]
    assert (found, len(read_rows(tmp_path / "e.jsonl"))) == ([1, 5], 4)
    run(tmp_path, BATCH, output=str(tmp_path / "a.jsonl"), error_file=str(tmp_path / "e.jsonl"))
    assert [path.name for path in tmp_path.glob("*.partial.*")] == []


def test_the_end_of_a_run_takes_its_partial_output_away(tmp_path: Path) -> None:
    rows: list[object] = [{"prompt": "a"}, {"prompt": "b"}]
    merge_run(unfinished(tmp_path, rows))
    assert (tmp_path / DIRECTORY / "completions.partial.jsonl").exists()
    run(tmp_path, rows)
    assert not (tmp_path / DIRECTORY / "completions.partial.jsonl").exists()


def test_a_merge_that_cannot_write_names_the_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run(tmp_path, ROWS)
    output = tmp_path / f"{'a' * 248}.jsonl"  # what is written aside has a longer name, which no file system takes
    assert merge_run(tmp_path / DIRECTORY, output=Output(str(output))) == FAULT
    assert f"cannot write {output}" in capsys.readouterr().err


@pytest.mark.parametrize("name", NAMES)
def test_merge_writes_a_run_in_another_format_too(tmp_path: Path, name: str) -> None:
    run(tmp_path, ROWS)
    output = Output(str(tmp_path / name))
    assert merge_run(tmp_path / DIRECTORY, output=output) == OK
    assert verify_run(tmp_path / DIRECTORY, output=output) == OK
    assert verify_run(tmp_path / DIRECTORY) == OK


def test_verify_says_that_merge_takes_the_same_flags(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run(tmp_path, ROWS)
    assert verify_run(tmp_path / DIRECTORY, output=Output(str(tmp_path / "other.csv"))) == FAULT
    assert "merge" in (said := capsys.readouterr().out)
    assert "with these flags" in said


def test_nothing_of_a_writer_is_left_behind_where_writing_fails(tmp_path: Path) -> None:
    run(tmp_path, ROWS)
    os.mkdir(tmp_path / "full")
    os.mkdir(tmp_path / "full/a.jsonl")
    (tmp_path / "full/a.jsonl/x").touch()
    with pytest.raises(Refusal):
        merge_run(tmp_path / DIRECTORY, output=Output(str(tmp_path / "full/a.jsonl/x.txt")))
    assert files(tmp_path / "full") == ["a.jsonl"]


def test_an_existing_file_is_refused_before_anything_is_generated(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text("precious")
    loader = EchoLoader(FailingEngine())
    with pytest.raises(Refusal, match="this run has not written it"):
        run(tmp_path, ROWS, loader, output=str(path))
    assert path.read_text() == "precious"
    assert not [*(tmp_path / DIRECTORY / "journal").iterdir()]


def test_the_same_command_again_writes_over_its_own_output(tmp_path: Path) -> None:
    for _ in range(2):
        assert run(tmp_path, ROWS, output=str(tmp_path / "a.jsonl.gz")) == OK
    assert len(gzip.decompress((tmp_path / "a.jsonl.gz").read_bytes()).splitlines()) == len(ROWS)


def test_examples_are_shown_whatever_the_format(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run(tmp_path, [{"prompt": "abc"}], output=str(tmp_path / "a.parquet"), show=1)
    assert "> abc\nabca" in capsys.readouterr().out
