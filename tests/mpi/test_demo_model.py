"""The real model, at length: killed and resumed it gives what it gives undisturbed."""

import os
import random
import signal
import time
from pathlib import Path

import pytest

from tests.conftest import DEMO_MODEL, ROOT, finish, read_rows, scattergen, start
from tests.mpi.test_faults import ranks_of, wait_until

pytestmark = pytest.mark.slow


def arguments(folder: Path) -> list[str]:
    return [
        "-m", "hpc", "run", "--model", str(DEMO_MODEL), "--corpus", str(ROOT / "jobs/demo.jsonl"), "--limit", "24",
        "--runs", str(folder / "runs"), "--name", "run", "--dtype", "float32", "--batch-tokens", "2048",
        "--sampling.max-new-tokens", "16",
    ]  # fmt: skip


@pytest.mark.timeout(1800)
def test_killed_3_times_and_resumed_on_other_ranks_the_output_is_the_same(tmp_path: Path, demo_model: Path) -> None:
    undisturbed = tmp_path / "undisturbed"
    assert finish(start(arguments(undisturbed)), timeout_s=600).code == 0
    folder, chance = tmp_path / "killed", random.Random(4)
    for ranks, done in ((2, 1), (3, 6), (1, 12)):
        process = start(arguments(folder), ranks)
        wait_until(folder / "runs/run", at_least=done, seconds=300)
        time.sleep(chance.uniform(0, 2))  # anywhere in the batches that follow
        os.kill(chance.choice(list(ranks_of(folder).values())), signal.SIGKILL)
        finish(process, timeout_s=60)
    ended = finish(start(arguments(folder), 2), timeout_s=600)
    assert ended.code == 0, ended.err
    output = "runs/run/completions.jsonl"
    assert (folder / output).read_bytes() == (undisturbed / output).read_bytes()
    keys = [row["key"] for path in (folder / "runs/run/journal").iterdir() for row in read_rows(path)]
    assert len(keys) == len(set(keys))
    assert scattergen("verify", str(folder / "runs/run")).code == 0


@pytest.mark.timeout(600)
def test_a_second_demo_generates_nothing(tmp_path: Path, demo_model: Path) -> None:
    flags = [str(ROOT / "jobs/demo.py"), "--runs", str(tmp_path), "--limit", "3", "--sampling.max-new-tokens", "4"]
    first, second = finish(start(flags, 2)), finish(start(flags, 2))
    assert (first.code, second.code) == (0, 0)
    assert "all rows were finished by earlier attempts" in second.out
