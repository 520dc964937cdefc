"""A corpus of 300 rows with 20 bad ones of 10 kinds: exactly those are error rows, on any number of ranks."""

from pathlib import Path
from typing import Any

import pytest

from tests.conftest import Scattergen, read_rows, run_here, run_jobs, scattergen, write_corpus

BAD: dict[int, Any] = {
    7: "not JSON",
    19: '["a list"]',
    31: {"id": "no prompt"},
    43: {"prompt": "a", "prompt_token_ids": [5, 6]},
    57: {"prompt": ""},
    70: {"prompt": 17},
    83: {"messages": [{"role": "user", "content": 7}]},
    99: {"prompt": "x", "sampling": {"temprature": 1}},
    111: {"prompt": "x", "sampling": {"max_new_tokens": -3}},
    128: {"id": "row-5", "prompt": "a second row-5"},
    140: {"prompt": "too long " * 1000},
    152: b'{"prompt": "\xff\xfe"}',
    166: {"prompt_token_ids": [1, 2, 100_000]},
    179: "{",
    190: {"messages": []},
    205: {"id": 1.5, "prompt": "x"},
    222: {"prompt": "x", "sampling": {"top_p": 2}},
    240: {"prompt_token_ids": ["a"]},
    260: {"messages": [{"role": "user", "content": "x"}, {"role": "system", "content": "late"}]},
    299: 'NaN',
}  # fmt: skip


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    rows: list[Any] = [{"id": f"row-{n}", "prompt": f"{n} " + "word " * (n % 13)} for n in range(300)]
    for index, bad in BAD.items():
        rows[index] = bad
    return write_corpus(tmp_path_factory.mktemp("bad") / "corpus.jsonl", rows)


def job(corpus: Path, model: str = "echo") -> dict[str, Any]:
    return {"model": model, "corpus": [str(corpus)], "dtype": "float32", "sampling": {"max_new_tokens": 12}}


@pytest.fixture(scope="module")
def outputs(tmp_path_factory: pytest.TempPathFactory, corpus: Path) -> dict[int, Path]:
    found = {1: run_here(tmp_path_factory.mktemp("run"), **job(corpus))}
    for ranks in (2, 3):
        [found[ranks]] = run_jobs(tmp_path_factory.mktemp("runs"), [{**job(corpus), "name": "run"}], ranks).values()
    return found


def bad_rows(output: Path) -> list[int]:
    return [n for n, row in enumerate(read_rows(output)) if row["error"] is not None]


def test_exactly_the_bad_rows_are_error_rows(outputs: dict[int, Path]) -> None:
    assert bad_rows(outputs[1]) == sorted(BAD)


def test_exactly_the_bad_rows_are_error_rows_with_a_model_and_its_tokenizer(
    tmp_path: Path, corpus: Path, tiny_model: Path
) -> None:
    assert bad_rows(run_here(tmp_path, **job(corpus, str(tiny_model)))) == sorted(BAD)


def test_every_error_names_its_line(outputs: dict[int, Path]) -> None:
    rows = read_rows(outputs[1])
    assert all(rows[n]["error"]["message"].startswith(f"corpus.jsonl:{n + 1}: ") for n in BAD)


@pytest.mark.parametrize("ranks", [2, 3])
def test_the_output_is_the_same_bytes_on_more_ranks(outputs: dict[int, Path], ranks: int) -> None:
    assert outputs[ranks].read_bytes() == outputs[1].read_bytes()


def test_verify_finds_the_run_right(outputs: dict[int, Path]) -> None:
    assert scattergen("verify", str(outputs[3].parent)).code == 0


def test_too_many_error_rows_are_a_fault(tmp_path: Path, echo: Scattergen, corpus: Path) -> None:
    ended = echo(corpus, "--limit", "8", "--sampling.max-new-tokens", "2", "--max-error-rate", "0.1")
    assert (ended.code, (tmp_path / "runs/corpus/state").read_text()) == (1, "failed\n")
