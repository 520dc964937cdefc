"""A corpus of 300 rows with 20 bad ones of 10 kinds: exactly those are error rows, on any number of ranks."""

from pathlib import Path
from typing import Any

import pytest

from tests.conftest import read_rows, scattergen, write_corpus

BAD: dict[int, Any] = {
    7: "not JSON",
    19: '["a list"]',
    31: {"id": "no prompt"},
    43: {"prompt": "a", "messages": [{"role": "user", "content": "b"}]},
    57: {"prompt": ""},
    70: {"prompt": 17},
    83: {"messages": [{"role": "wizard", "content": "hm"}]},
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


@pytest.fixture(scope="module")
def outputs(tmp_path_factory: pytest.TempPathFactory, corpus: Path, tiny_model: Path) -> dict[int, Path]:
    folder = tmp_path_factory.mktemp("runs")
    for ranks in (1, 2, 3):
        ended = scattergen(
            "run", "--model", str(tiny_model), "--corpus", str(corpus), "--runs", str(folder), "--name", str(ranks),
            "--dtype", "float32", "--sampling.max-new-tokens", "12", ranks=ranks,
        )  # fmt: skip
        assert ended.code == 0, ended.err
    return {ranks: folder / str(ranks) / "completions.jsonl" for ranks in (1, 2, 3)}


def test_exactly_the_bad_rows_are_error_rows(outputs: dict[int, Path]) -> None:
    assert [n for n, row in enumerate(read_rows(outputs[1])) if row["error"] is not None] == sorted(BAD)


def test_every_error_names_its_line(outputs: dict[int, Path]) -> None:
    rows = read_rows(outputs[1])
    assert all(rows[n]["error"]["message"].startswith(f"corpus.jsonl:{n + 1}: ") for n in BAD)


@pytest.mark.parametrize("ranks", [2, 3])
def test_the_output_is_the_same_bytes_on_more_ranks(outputs: dict[int, Path], ranks: int) -> None:
    assert outputs[ranks].read_bytes() == outputs[1].read_bytes()


def test_verify_finds_the_run_right(outputs: dict[int, Path]) -> None:
    assert scattergen("verify", str(outputs[3].parent)).code == 0


def test_too_many_error_rows_are_a_fault(tmp_path: Path, corpus: Path, tiny_model: Path) -> None:
    ended = scattergen(
        "run", "--model", str(tiny_model), "--corpus", str(corpus), "--runs", str(tmp_path), "--limit", "8",
        "--sampling.max-new-tokens", "2", "--max-error-rate", "0.1",
    )  # fmt: skip
    assert (ended.code, (tmp_path / "corpus" / "state").read_text()) == (1, "failed\n")
