"""Which GPU each rank of a node sees, with a driver that only says that there are some."""

import json
import os
from pathlib import Path

import pytest

from tests.conftest import ROOT, Ended, Scattergen, finish, start, write_corpus

PROGRAM = """
import json, os, sys

sys.path.insert(0, {root!r})

from hpc import main
from hpc.mpi.world import launched_rank
from tests.fakes import EchoLoader


class Telling(EchoLoader):
    def tell(self, name):
        seen = {{key: os.environ.get(key) for key in ("CUDA_VISIBLE_DEVICES", "HIP_VISIBLE_DEVICES")}}
        with open({told!r}, "a") as file:
            file.write(json.dumps([launched_rank(), name, "torch" in sys.modules, seen]) + "\\n")

    def resolve(self, model):
        self.tell("resolve")
        return super().resolve(model)

    def dtype(self, job):
        self.tell("dtype")
        return super().dtype(job)

    def checker(self, *given):
        self.tell("checker")
        return super().checker(*given)

    def load(self, *given):
        self.tell("load")
        return super().load(*given)


if __name__ == "__main__":
    main(loader=Telling())
"""
LISTED = """\
GPU 0: NVIDIA A100-SXM4-40GB (UUID: GPU-aaaa)
GPU 1: NVIDIA A100-SXM4-40GB (UUID: GPU-bbbb)
  MIG 3g.20gb     Device  0: (UUID: MIG-cccc)
  MIG 3g.20gb     Device  1: (UUID: MIG-dddd)
"""


@pytest.fixture
def node(tmp_path: Path) -> Path:
    """A folder with a driver's program that lists one GPU, and one that is cut in two."""
    program = tmp_path / "bin" / "nvidia-smi"
    program.parent.mkdir()
    program.write_text(f"#!/bin/sh\ncat <<'END'\n{LISTED}END\n")
    program.chmod(0o755)
    return tmp_path


def run(node: Path, *flags: str, ranks: int = 3, **environment: str) -> tuple[Ended, dict[int, set[str | None]]]:
    """Run a job of three ranks; return how it ended and, by rank, what each call of its loader saw."""
    told, script = node / "told.jsonl", node / "job.py"
    script.write_text(PROGRAM.format(root=str(ROOT), told=str(told)))
    corpus = write_corpus(node / "c.jsonl", [{"prompt": f"row {row} " + "x" * 300} for row in range(3000)])
    given = [str(script), "run", "--model", "echo", "--corpus", str(corpus), "--runs", str(node / "runs")]
    path = f"{node / 'bin'}{os.pathsep}{os.environ['PATH']}"
    limits = ["--sampling.max-new-tokens", "1"]
    ended = finish(start([*given, *limits, *flags], ranks, PATH=path, **environment), timeout_s=60)
    seen: dict[int, set[str | None]] = {}
    for line in told.read_text().splitlines() if told.exists() else ():
        rank, _, has_torch, variables = json.loads(line)
        assert not has_torch
        seen.setdefault(rank, set()).add(variables["CUDA_VISIBLE_DEVICES"])
    return ended, seen


def test_before_anything_needs_torch_each_rank_sees_its_own_gpu_alone(node: Path) -> None:
    ended, seen = run(node)
    assert ended.code == 0, ended.err
    assert seen == {0: {"GPU-aaaa"}, 1: {"MIG-cccc"}, 2: {"MIG-dddd"}}


def test_ranks_that_were_shown_some_gpus_divide_these(node: Path) -> None:
    ended, seen = run(node, ranks=2, CUDA_VISIBLE_DEVICES="MIG-d,0")
    assert ended.code == 0, ended.err
    assert seen == {0: {"MIG-dddd"}, 1: {"0"}}


def test_more_ranks_than_gpus_are_refused(node: Path) -> None:
    ended, seen = run(node, ranks=4)
    assert (ended.code, "ranks 0 and 3" in ended.err, "would share GPU GPU-aaaa" in ended.err) == (2, True, True)
    assert seen == {}


def test_on_cores_the_environment_stays_as_it_is(node: Path) -> None:
    ended, seen = run(node, "--device", "cpu", ranks=2, CUDA_VISIBLE_DEVICES="0")
    assert (ended.code, seen) == (0, {0: {"0"}, 1: {"0"}})


def test_before_anything_needs_torch_each_rank_sees_the_gpus_of_its_replica(node: Path) -> None:
    ended, seen = run(node, "--replica-gpus", "2", ranks=1)
    assert ended.code == 0, ended.err
    assert seen == {0: {"GPU-aaaa,MIG-cccc"}}


def test_ranks_that_want_more_gpus_than_there_are_are_refused(node: Path) -> None:
    ended, seen = run(node, "--replica-gpus", "2", ranks=2)
    assert (ended.code, seen) == (2, {})
    assert "2 ranks on" in ended.err
    assert "want 2 GPUs each (--replica-gpus), 4 in all, and 3 are found" in ended.err


def test_two_ranks_that_compute_on_one_gpu_without_a_name_end_the_run(tmp_path: Path, echo: Scattergen) -> None:
    corpus = write_corpus(tmp_path / "c.jsonl", [{"prompt": "row" * (row + 1)} for row in range(20)])
    ended = echo(corpus, ranks=2, ECHO_GPU="GPU-eeee")
    assert ended.code == 1
    assert "ranks 0 and 1 on" in ended.err
    assert "compute on one GPU, GPU-eeee" in ended.err


def test_two_ranks_that_share_one_of_their_gpus_without_a_name_end_the_run(tmp_path: Path, echo: Scattergen) -> None:
    corpus = write_corpus(tmp_path / "c.jsonl", [{"prompt": "row" * (row + 1)} for row in range(20)])
    ended = echo(corpus, ranks=2, ECHO_GPU="GPU-eeee,GPU-RANK")
    assert (ended.code, "compute on one GPU, GPU-eeee" in ended.err) == (1, True)
