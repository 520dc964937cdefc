"""A Python call leaves the process and the current folder as they were."""

import json
import os
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import ROOT, finish, start

LIGHT = "import hpc, sys; print(sorted(name for name in sys.modules if name.split('.')[0] in sys.argv[1:]))"
CALLS = """
import json, logging, os, signal, sys
sys.path.insert(0, sys.argv[1])
from tests.fakes import EchoLoader
import hpc

def state():
    log = logging.getLogger("hpc")
    return [
        os.getcwd(), sorted(os.listdir()), sorted(os.listdir(os.environ["TMPDIR"])), dict(os.environ),
        [repr(signal.getsignal(number)) for number in signal.valid_signals()],
        [repr(handler) for handler in (*logging.root.handlers, *log.handlers)], log.level, log.propagate,
    ]

logging.getLogger("hpc").addHandler(logging.NullHandler())
before = state()
with hpc.Generator("echo", loader=EchoLoader()) as generator:
    generator.generate(["a", "b"])
    next(generator.stream(["c", "d"]))
job = hpc.Job(model="echo", corpus=(sys.argv[2],), runs=os.path.dirname(sys.argv[2]))
hpc.run(job, loader=EchoLoader())
print(json.dumps(list(zip(before, state()))))
"""


def test_import_hpc_is_light() -> None:
    ended = finish(start(["-c", LIGHT, "hpc", "numpy", "rich", "tyro", "torch", "transformers", "mpi4py"]))
    light = ["engine_args", "exit", "job", "prompts", "sampling_params"]
    assert ended.out.strip() == str(["hpc", *(f"hpc.{name}" for name in light)])


@pytest.fixture(scope="module")
def states(tmp_path_factory: pytest.TempPathFactory) -> tuple[list[Any], str]:
    """The state of a process before and after its calls, part by part, and what generating said."""
    folder = tmp_path_factory.mktemp("calls")
    (folder / "here").mkdir()
    (folder / "tmp").mkdir()
    corpus = folder / "rows.jsonl"
    corpus.write_text('{"prompt": "x"}\n')
    before = Path.cwd()
    os.chdir(folder / "here")
    try:
        ended = finish(start(["-c", CALLS, str(ROOT), str(corpus)], TMPDIR=str(folder / "tmp")))
    finally:
        os.chdir(before)
    return json.loads(ended.out), ended.err


PARTS = ("current folder", "files in it", "temporary files", "environment", "signal handlers", "log handlers", "level")


@pytest.mark.parametrize("part", PARTS)
def test_a_call_leaves_it_as_it_was(part: str, states: tuple[list[Any], str]) -> None:
    before, after = states[0][PARTS.index(part)]
    assert after == before


def test_only_the_whole_job_says_anything_where_nobody_looks(states: tuple[list[Any], str]) -> None:
    assert next(line for line in states[1].splitlines() if line).endswith("echo in float32 on 1 rank")
