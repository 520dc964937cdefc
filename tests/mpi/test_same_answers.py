"""The number of ranks, the tail and the order of the rows change nothing in the output."""

import json
import random
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import DEMO_MODEL, Scattergen, read_rows, scattergen, write_corpus

LENGTHS = [1, 3, 7, 20, 50, 120, 300]


def some_rows(count: int) -> list[dict[str, Any]]:
    """Rows of very different lengths; some are sampled, some are the same greedy request."""
    chance = random.Random(1)
    rows: list[dict[str, Any]] = []
    for index in range(count):
        text = "".join(chance.choice("abcdefgh ") for _ in range(chance.choice(LENGTHS)))
        row: dict[str, Any] = {"id": f"row-{index}", "prompt": text, "number": index}
        if index % 3 == 1:
            row["sampling"] = {"temperature": 1.0, "top_p": 0.9, "seed": index % 2, "max_new_tokens": 5 + index % 20}
        if index % 5 == 4:
            row["prompt"], row["sampling"] = "the same", {}
        rows.append(row)
    return rows


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_corpus(tmp_path_factory.mktemp("corpus") / "rows.jsonl", some_rows(60))


FEW_AT_ONCE = ("--max-num-seqs", "2")
"""What all ranks can begin with at once is not kept back."""


@pytest.mark.parametrize("tail", ["0", "0.15", "1"])
@pytest.mark.parametrize("ranks", [1, 2, 3])
def test_echoes_are_the_same_bytes_on_any_number_of_ranks_with_any_tail(
    echo: Scattergen, tmp_path: Path, corpus: Path, ranks: int, tail: str
) -> None:
    alone = echo(corpus, "--name", "alone")
    spread = echo(corpus, "--name", "spread", "--tail", tail, *FEW_AT_ONCE, ranks=ranks)
    assert (alone.code, spread.code) == (0, 0), spread.err
    assert (tmp_path / "runs/spread/completions.jsonl").read_bytes() == (
        tmp_path / "runs/alone/completions.jsonl"
    ).read_bytes()


@pytest.fixture(scope="module")
def tiny_alone(tmp_path_factory: pytest.TempPathFactory, tiny_model: Path, corpus: Path) -> bytes:
    return complete(tmp_path_factory.mktemp("alone"), tiny_model, corpus)


def complete(folder: Path, model: Path, corpus: Path, *flags: str, ranks: int = 0) -> bytes:
    """Run a model over a corpus in float32 and return the bytes of the output."""
    ended = scattergen(
        "run", "--model", str(model), "--corpus", str(corpus), "--runs", str(folder), "--name", "run",
        "--dtype", "float32", "--sampling.max-new-tokens", "20", *flags, ranks=ranks,
    )  # fmt: skip
    assert ended.code == 0, ended.err
    return (folder / "run" / "completions.jsonl").read_bytes()


@pytest.mark.parametrize(("ranks", "tail"), [(1, "0.15"), (2, "0.15"), (3, "0"), (3, "1")])
def test_a_models_completions_are_the_same_bytes_on_any_number_of_ranks(
    tmp_path: Path, tiny_model: Path, corpus: Path, tiny_alone: bytes, ranks: int, tail: str
) -> None:
    assert complete(tmp_path, tiny_model, corpus, "--tail", tail, *FEW_AT_ONCE, ranks=ranks) == tiny_alone


def test_a_shuffled_corpus_gives_every_id_the_same_completion(
    tmp_path: Path, tiny_model: Path, tiny_alone: bytes
) -> None:
    rows = some_rows(60)
    random.Random(2).shuffle(rows)
    shuffled = complete(tmp_path, tiny_model, write_corpus(tmp_path / "shuffled.jsonl", rows), ranks=2)
    by_id = sorted(shuffled.splitlines(), key=lambda line: str(json.loads(line)["id"]))
    assert by_id == sorted(tiny_alone.splitlines(), key=lambda line: str(json.loads(line)["id"]))


def test_the_batch_size_changes_nothing(tmp_path: Path, tiny_model: Path, corpus: Path, tiny_alone: bytes) -> None:
    assert complete(tmp_path, tiny_model, corpus, "--batch-tokens", "700", "--buckets", "2") == tiny_alone


@pytest.mark.timeout(600)
def test_the_demo_models_completions_are_the_same_bytes_on_1_2_and_3_ranks(tmp_path: Path, demo_model: Path) -> None:
    rows = [{"prompt": f"Question {n}: " + "why is the sky blue? " * n} for n in (1, 2, 5, 9)]
    rows += [{"id": "drawn", "prompt": "Once upon a time", "sampling": {"temperature": 0.8, "top_k": 40}}]
    corpus = write_corpus(tmp_path / "rows.jsonl", rows)
    outputs = {
        complete(tmp_path / str(ranks), DEMO_MODEL, corpus, "--sampling.max-new-tokens", "8", ranks=ranks)
        for ranks in (1, 2, 3)
    }
    assert len(outputs) == 1


@pytest.mark.slow
def test_echoes_are_the_same_bytes_on_5_ranks(echo: Scattergen, tmp_path: Path, corpus: Path) -> None:
    echo(corpus, "--name", "alone")
    echo(corpus, "--name", "spread", ranks=5)
    assert (tmp_path / "runs/spread/completions.jsonl").read_bytes() == (
        tmp_path / "runs/alone/completions.jsonl"
    ).read_bytes()


def test_a_larger_limit_completes_the_rows_that_are_missing(echo: Scattergen, tmp_path: Path, corpus: Path) -> None:
    echo(corpus, "--limit", "10", "--name", "some")
    assert len(read_rows(tmp_path / "runs/some/completions.jsonl")) == 10
    echo(corpus, "--name", "some", ranks=2)
    assert len(read_rows(tmp_path / "runs/some/completions.jsonl")) == 60
