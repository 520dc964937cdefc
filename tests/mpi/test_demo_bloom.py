"""The demo with a model of BLOOM's shape: its first three prompts, on two ranks, with the flags it has."""

import json
from pathlib import Path

import pytest

from tests.conftest import ROOT, Ended, finish, make_tiny_model, read_rows, start

NEW = 8


@pytest.fixture(scope="module")
def bloom(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_model(tmp_path_factory.mktemp("tiny-bloom"), "bloom")


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("runs")


@pytest.fixture(scope="module")
def ended(bloom: Path, runs: Path) -> Ended:
    flags = ["--model", str(bloom), "--limit", "3", "--runs", str(runs), "--return-token-ids"]
    return finish(start([str(ROOT / "jobs/demo.py"), *flags, "--sampling.max-new-tokens", str(NEW)], 2))


def test_the_native_engine_answers_the_demo_with_bloom(ended: Ended, runs: Path) -> None:
    assert ended.code == 0, ended.err
    assert json.loads((runs / "demo/summary.json").read_text())["engine"] == "native"
    assert "does not support" not in ended.err


def test_the_demos_answers_with_bloom_are_what_plain_generate_gives(ended: Ended, runs: Path, bloom: Path) -> None:
    from transformers import AutoTokenizer

    from tests.engine.oracle import Plain

    assert ended.code == 0, ended.err
    tokenizer, plain = AutoTokenizer.from_pretrained(bloom), Plain(bloom)
    expected = []
    for row in read_rows(ROOT / "jobs/demo.jsonl")[:3]:
        text = tokenizer.apply_chat_template(row["messages"], tokenize=False, add_generation_prompt=True)
        expected.append(plain.generate(tokenizer.encode(text, add_special_tokens=False), NEW))
    assert [row["token_ids"] for row in read_rows(runs / "demo/completions.jsonl")] == expected
