"""The number of ranks, the tail and the order of the rows change nothing in the output."""

import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import DEMO_MODEL, Scattergen, read_rows, run_here, run_jobs, write_corpus

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


DEMO = [{"prompt": f"Question {n}: " + "why is the sky blue? " * n} for n in (1, 2, 5, 9)]
DEMO += [{"id": "drawn", "prompt": "Once upon a time", "sampling": {"temperature": 0.8, "top_k": 40}}]
TAILS = [0.0, 0.15, 1.0]
RANKS = [1, 2, 3]
DEMO_RANKS = [1, 3]
FEW_AT_ONCE = {"max_num_seqs": 2}
"""What all ranks can begin with at once is not kept back."""


@pytest.fixture(scope="module")
def encoder_decoders(tiny_summarizer: Path, tiny_translator: Path, corpus: Path) -> dict[str, dict[str, Any]]:
    """The jobs with encoder-decoders, by their names."""
    return {
        "summarize": model_job(tiny_summarizer, corpus),
        "translate": {
            **model_job(tiny_translator, corpus), "source_lang": "eng_Latn", "target_lang": "deu_Latn",
            "truncate_prompts": "right",
        },
    }  # fmt: skip


@pytest.fixture(scope="module")
def launched(
    tmp_path_factory: pytest.TempPathFactory,
    tiny_model: Path,
    demo_model: Path,
    encoder_decoders: dict[str, dict[str, Any]],
    corpus: Path,
) -> Callable[[int, str], bytes]:
    """The output of a job by ranks and name: of an echo and a tiny model with each tail, and of other models."""
    demo = write_corpus(corpus.parent / "demo.jsonl", DEMO)
    shuffled = write_corpus(corpus.parent / "shuffled.jsonl", random.Random(2).sample(some_rows(60), 60))
    echo, tiny = {"model": "echo", "corpus": [str(corpus)]}, model_job(tiny_model, corpus)
    jobs = [
        *({**echo, "name": f"echo {tail}", "tail": tail, **FEW_AT_ONCE} for tail in TAILS),
        *({**tiny, "name": f"tiny {tail}", "tail": tail, **FEW_AT_ONCE} for tail in TAILS),
        {**model_job(tiny_model, shuffled), "name": "shuffled"},
        {**model_job(DEMO_MODEL, demo), "name": "demo", "sampling": {"max_new_tokens": 8}},
        *({**values, "name": name, "batch_tokens": 700} for name, values in encoder_decoders.items()),
    ]
    on = [
        {**job, "name": f"{job['name']} on {ranks}", "ranks": ranks}
        for ranks in reversed(RANKS)  # all ranks import torch at the same time
        for job in jobs
        if job["name"] != "demo" or ranks in DEMO_RANKS
    ]
    outputs = run_jobs(tmp_path_factory.mktemp("launched"), on, max(RANKS))
    return lambda ranks, name: outputs[f"{name} on {ranks}"].read_bytes()


def model_job(model: Path, corpus: Path) -> dict[str, Any]:
    return {
        "model": str(model), "corpus": [str(corpus)], "dtype": "float32", "sampling": {"max_new_tokens": 20}
    }  # fmt: skip


@pytest.fixture(scope="module")
def echo_alone(tmp_path_factory: pytest.TempPathFactory, corpus: Path) -> bytes:
    return run_here(tmp_path_factory.mktemp("echo"), model="echo", corpus=[str(corpus)]).read_bytes()


@pytest.fixture(scope="module")
def tiny_alone(tmp_path_factory: pytest.TempPathFactory, tiny_model: Path, corpus: Path) -> bytes:
    return run_here(tmp_path_factory.mktemp("tiny"), **model_job(tiny_model, corpus)).read_bytes()


@pytest.mark.parametrize("tail", TAILS)
@pytest.mark.parametrize("ranks", RANKS)
def test_echoes_are_the_same_bytes_on_any_number_of_ranks_with_any_tail(
    launched: Callable[[int, str], bytes], echo_alone: bytes, ranks: int, tail: float
) -> None:
    assert launched(ranks, f"echo {tail}") == echo_alone


@pytest.mark.parametrize("tail", TAILS)
@pytest.mark.parametrize("ranks", RANKS)
def test_a_models_completions_are_the_same_bytes_on_any_number_of_ranks_with_any_tail(
    launched: Callable[[int, str], bytes], tiny_alone: bytes, ranks: int, tail: float
) -> None:
    assert launched(ranks, f"tiny {tail}") == tiny_alone


@pytest.mark.parametrize("name", ["summarize", "translate"])
@pytest.mark.parametrize("ranks", RANKS)
def test_an_encoder_decoders_completions_are_the_same_bytes_on_any_number_of_ranks(
    launched: Callable[[int, str], bytes],
    encoder_decoders: dict[str, dict[str, Any]],
    tmp_path: Path,
    ranks: int,
    name: str,
) -> None:
    assert launched(ranks, name) == run_here(tmp_path, **encoder_decoders[name]).read_bytes()


def test_a_shuffled_corpus_gives_every_id_the_same_completion(
    launched: Callable[[int, str], bytes], tiny_alone: bytes
) -> None:
    shuffled = launched(2, "shuffled")
    assert shuffled != tiny_alone
    by_id = sorted(shuffled.splitlines(), key=lambda line: str(json.loads(line)["id"]))
    assert by_id == sorted(tiny_alone.splitlines(), key=lambda line: str(json.loads(line)["id"]))


def test_the_batch_size_changes_nothing(tmp_path: Path, tiny_model: Path, corpus: Path, tiny_alone: bytes) -> None:
    job = {**model_job(tiny_model, corpus), "batch_tokens": 700, "buckets": 2}
    assert run_here(tmp_path, **job).read_bytes() == tiny_alone


def test_the_demo_models_completions_are_the_same_bytes_on_1_and_3_ranks(
    launched: Callable[[int, str], bytes],
) -> None:
    assert len({launched(ranks, "demo") for ranks in DEMO_RANKS}) == 1


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
