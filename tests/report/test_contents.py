"""What a run has answered, for its report."""

from pathlib import Path

import numpy as np
import pytest

from hpc.report import contents
from hpc.report.contents import read_contents
from hpc.report.report import report
from hpc.report.tables import endings_table
from tests.report.echo_run import make_run, unfinish
from tests.report.test_report import Page
from tests.report.test_timeline import DONE, write_run

NONE = np.empty(0, dtype=np.int64)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_run(tmp_path_factory.mktemp("contents"))


@pytest.fixture(scope="module")
def page(run: Path) -> str:
    assert report([run]) == 0
    return (run / "report.html").read_text(encoding="utf-8")


def test_rows_are_counted_by_finish_reason_and_error_kind(run: Path) -> None:
    found = read_contents(run)
    assert found is not None
    assert found.endings == {"length": 5, "error: empty": 1}


def test_lengths_are_those_of_the_prompts_and_of_the_outputs(run: Path) -> None:
    found = read_contents(run)
    assert found is not None
    assert sorted(found.prompt_tokens.tolist()) == [5, 17, 18, 27, 2040]
    assert sorted(found.completion_tokens.tolist()) == [1, 6, 8, 8, 8]


def test_errors_are_among_the_rows_to_look_at(tmp_path: Path) -> None:
    rows = [{"prompt": "" if row == 33 else f"row {row}"} for row in range(100)]
    found = read_contents(make_run(tmp_path, rows))
    assert found is not None
    assert len(found.examples) == contents.EXAMPLES + 1
    assert [answered.row for answered in found.examples if answered.error] == [33]


def test_of_a_run_that_is_going_on_the_missing_rows_are_told(tmp_path: Path) -> None:
    run = make_run(tmp_path)
    unfinish(run)
    found = read_contents(run)
    assert found is not None
    assert "1 row of 6 without an answer yet" in endings_table(found).title


def test_of_very_many_rows_some_are_counted_and_the_table_says_so() -> None:
    found = contents.Contents(10**7, 10**7, {"stop": 15_000, "length": 5_000}, NONE, NONE, [])
    assert "20,000 rows spread over 10,000,000" in endings_table(found).title
    assert [row[2] for row in endings_table(found).rows] == ["75.0%", "25.0%"]


def test_a_run_whose_corpus_was_not_read_has_no_contents(tmp_path: Path) -> None:
    assert read_contents(write_run(tmp_path / "run", DONE)) is None


def test_the_page_has_rows_escaped_with_input_and_output(page: str) -> None:
    assert "Say &lt;b&gt;hi&lt;/b&gt; &amp; go" in page
    assert "<b>hi" not in page
    assert Page(page).open == []


def test_the_page_has_histograms_of_lengths(page: str) -> None:
    assert "length of the prompt, up to" in page
    assert "length of the output, up to" in page
    assert Page(page).tags["svg"] == 4


def test_the_page_cuts_long_texts(page: str) -> None:
    assert "x" * 300 + " …" in page
    assert "x" * 301 not in page


def test_the_page_says_how_fast_each_rank_was(page: str) -> None:
    assert "Tokens per second of each rank, attempt 1" in page
    assert "<td>rank 0</td><td>5</td>" in page


def test_a_run_whose_rows_have_half_a_surrogate_pair_has_a_page(tmp_path: Path) -> None:
    run = make_run(tmp_path, [{"id": "half \ud800", "prompt": "a"}])
    assert report([run]) == 0
    assert "half ?" in (run / "report.html").read_text()
