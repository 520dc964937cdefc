"""One corpus of 500 rows in the formats that people have: the same completions."""

import functools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from openai.types import Completion as TextCompletion

from tests.conftest import run_here
from tests.corpus.formats.written import FORMATS, data_set, write

ROWS = [{"id": f"row-{n}", "prompt": f'{n}, é日 "quoted",\nand ' + "word " * (n % 17)} for n in range(500)]
BATCH = [
    {"custom_id": row["id"], "url": "/v1/completions", "body": {"prompt": row["prompt"], "max_tokens": 12}}
    for row in ROWS
]
Completions = dict[str, str]


def lines_of(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text("utf-8").splitlines()]


def run(folder: Path, corpus: Path) -> list[dict[str, Any]]:
    """Answer a corpus with the echo engine; return the lines of its output."""
    job = {"model": "echo", "corpus": [str(corpus)], "sampling": {"max_new_tokens": 12}}
    return lines_of(run_here(folder / "runs", **job))


@pytest.fixture(scope="module")
def of_jsonl(tmp_path_factory: pytest.TempPathFactory) -> Completions:
    folder = tmp_path_factory.mktemp("jsonl")
    lines = run(folder, write(folder / "c.jsonl", FORMATS["c.jsonl"](ROWS)))
    assert all(line["error"] is None for line in lines)
    return {line["id"]: line["text"] for line in lines}


@pytest.fixture(scope="module")
def of_batch(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    folder = tmp_path_factory.mktemp("batch")
    return run(folder, write(folder / "c.jsonl", FORMATS["c.jsonl"](BATCH)))


def as_file(name: str, folder: Path) -> Path:
    return write(folder / name, FORMATS[name](ROWS))


def as_data_set(folder: Path) -> Path:
    return data_set(folder / "set", ROWS)


@pytest.mark.parametrize(
    "write_to",
    [*(functools.partial(as_file, name) for name in ("c.jsonl.zst", "c.parquet", "c.csv")), as_data_set],
    ids=["zst", "parquet", "csv", "data set"],
)
def test_a_corpus_has_the_same_completions_in_every_format(
    write_to: Callable[[Path], Path], tmp_path: Path, of_jsonl: Completions
) -> None:
    assert {line["id"]: line["text"] for line in run(tmp_path, write_to(tmp_path))} == of_jsonl


def test_a_batch_file_has_the_same_completions(of_batch: list[dict[str, Any]], of_jsonl: Completions) -> None:
    found = {line["custom_id"]: line["response"]["body"]["choices"][0]["text"] for line in of_batch}
    assert found == of_jsonl


def test_every_body_of_the_batchs_output_is_of_the_apis_own_type(of_batch: list[dict[str, Any]]) -> None:
    bodies = [TextCompletion.model_validate(line["response"]["body"], strict=True) for line in of_batch]
    assert [body.usage.completion_tokens for body in bodies if body.usage] == [12] * 500
