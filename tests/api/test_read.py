"""`hpc.read_run` gives the rows of a run, finished or not, one by one and as tables."""

import shutil
import sys
from pathlib import Path
from typing import Any

import pytest

import hpc
from tests.conftest import read_rows, write_corpus
from tests.fakes import EchoLoader
from tests.report.echo_run import make_run

ROWS = [
    {"id": "a", "prompt": "ab", "page": 3, "sampling": {"temperature": 1, "n": 2, "logprobs": 1}},
    {"id": 7, "prompt": "c", "page": "x"},
    {"prompt": ""},
]


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run of three rows, one of them wrong."""
    folder = tmp_path_factory.mktemp("read")
    corpus = write_corpus(folder / "rows.jsonl", ROWS)
    sampling = hpc.SamplingParams(max_new_tokens=2)
    hpc.run(hpc.Job(model="echo", corpus=(str(corpus),), runs=str(folder), sampling=sampling), loader=EchoLoader())
    return folder / "rows"


def test_the_rows_of_a_finished_run_are_those_of_its_output(finished: Path) -> None:
    assert list(hpc.read_run(finished)) == read_rows(finished / "completions.jsonl")


def test_rows_can_be_read_again(finished: Path) -> None:
    rows = hpc.read_run(finished)
    assert list(rows) == list(rows)


def test_of_a_running_run_the_rows_are_read_that_have_ended(finished: Path, tmp_path: Path) -> None:
    run = Path(shutil.copytree(finished, tmp_path / "running"))
    (run / "completions.jsonl").unlink()
    (run / "state").write_text("running\n")
    [journal] = (run / "journal").iterdir()
    journal.write_bytes(b"".join(journal.read_bytes().splitlines(keepends=True)[:1])[:-1] + b"\n{torn")
    assert len(list(hpc.read_run(run))) == 2  # one completion, and the error


def test_rows_whose_corpus_is_gone_come_without_meta(tmp_path: Path) -> None:
    corpus = write_corpus(tmp_path / "rows.jsonl", [{"prompt": "a", "page": 1}])
    hpc.run(hpc.Job(model="echo", corpus=(str(corpus),), runs=str(tmp_path)), loader=EchoLoader())
    corpus.unlink()
    [row] = hpc.read_run(tmp_path / "rows")
    assert ("meta" in row, row["id"]) == (False, 0)


def test_what_is_no_run_directory_is_refused(tmp_path: Path) -> None:
    with pytest.raises(hpc.Refusal, match="no run directory"):
        hpc.read_run(tmp_path)


def test_a_data_frame_has_a_column_for_each_key_of_the_output(finished: Path) -> None:
    frame = hpc.read_run(finished).to_pandas()
    assert list(frame["text"].iloc[:2]) == [row["text"] for row in read_rows(finished / "completions.jsonl")[:2]]
    assert set(frame.columns) == {"id", "text", "finish_reason", "usage", "error", "meta", "samples", "logprobs"}


def test_an_arrow_table_keeps_what_is_nested(finished: Path) -> None:
    table = hpc.read_run(finished).to_arrow()
    assert [usage["completion_tokens"] for usage in table["usage"].to_pylist()] == [4, 2, 0]


def test_in_an_arrow_table_a_column_without_a_common_type_is_json(finished: Path) -> None:
    table = hpc.read_run(finished).to_arrow()
    assert table["id"].to_pylist() == ['"a"', "7", "2"]


def test_half_a_surrogate_pair_is_a_question_mark_in_an_arrow_table(tmp_path: Path) -> None:
    run = make_run(tmp_path, [{"id": "\ud800", "prompt": "a"}, {"id": 1, "prompt": "b", "x": {"y": "\udc00"}}])
    table = hpc.read_run(run).to_arrow()
    assert [table[name].to_pylist()[at] for name, at in (("id", 0), ("meta", 1))] == ['"?"', {"x": {"y": "?"}}]


def test_a_dataset_has_the_rows_of_the_run(finished: Path) -> None:
    dataset = hpc.read_run(finished).to_dataset()
    assert dataset["finish_reason"][:] == [row["finish_reason"] for row in read_rows(finished / "completions.jsonl")]


class Missing:
    """Finds that a library is not installed."""

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> None:
        if name == "pandas":
            raise ModuleNotFoundError("No module named 'pandas'")


def test_a_library_that_is_not_installed_is_named_with_the_command(
    finished: Path, request: pytest.FixtureRequest
) -> None:
    loaded = {name: sys.modules.pop(name) for name in list(sys.modules) if name.split(".")[0] == "pandas"}
    request.addfinalizer(lambda: sys.modules.update(loaded))
    missing: Any = Missing()
    sys.meta_path.insert(0, missing)
    request.addfinalizer(lambda: sys.meta_path.remove(missing))
    with pytest.raises(ImportError, match="pip install pandas"):
        hpc.read_run(finished).to_pandas()
