"""What a killed process leaves behind is removed by the next one, and nothing else is."""

import os
import signal
import subprocess
import sys
import tempfile
import uuid
from collections.abc import Iterator
from pathlib import Path

import pytest

from hpc.engine.vllm.scratch import LIST, PREFIX, SHARED, Scratch, remove_shared_memory, shared_memory, sweep

HOLD = """
import mmap, os, sys
from pathlib import Path
from hpc.engine.vllm.scratch import Scratch

scratch = Scratch(Path(sys.argv[1]))
(scratch.path / "store").write_text("x")
file = os.open(sys.argv[2], os.O_RDWR | os.O_CREAT)
os.ftruncate(file, 4096)
held = mmap.mmap(file, 4096)
scratch.note()
print(scratch.path, flush=True)
sys.stdin.read()
"""


@pytest.fixture(params=["psm_test_{}", "vllm_dist_{}-tp:0-[0-1]-cpushm_0"])
def shared(request: pytest.FixtureRequest) -> Iterator[Path]:
    """A name in the shared memory of this machine, which is free afterwards."""
    path = SHARED / request.param.format(uuid.uuid4().hex[:12])
    yield path
    path.unlink(missing_ok=True)


@pytest.fixture
def tmp_path() -> Iterator[Path]:
    """A folder with a short name."""
    with tempfile.TemporaryDirectory(prefix="sg-") as name:
        yield Path(name)


@pytest.fixture
def holder(tmp_path: Path, shared: Path) -> Iterator["subprocess.Popen[str]"]:
    """A process with a folder in `tmp_path` and shared memory."""
    command = [sys.executable, "-c", HOLD, str(tmp_path), str(shared)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline()
        yield process
        process.kill()


def test_what_a_living_process_holds_stays(holder: "subprocess.Popen[str]", tmp_path: Path, shared: Path) -> None:
    assert sweep(tmp_path) == []
    assert shared.exists()
    assert len(list(tmp_path.glob(f"{PREFIX}*/store"))) == 1


def test_what_a_killed_process_left_is_removed_by_the_next(
    holder: "subprocess.Popen[str]", tmp_path: Path, shared: Path
) -> None:
    os.kill(holder.pid, signal.SIGKILL)
    holder.wait()
    scratch = Scratch(tmp_path)
    assert not shared.exists()
    assert list(tmp_path.glob(f"{PREFIX}*")) == [scratch.path]
    scratch.remove()
    assert list(tmp_path.iterdir()) == []


def test_a_folder_has_a_name_that_leaves_room_for_that_of_a_socket(tmp_path: Path) -> None:
    scratch = Scratch(tmp_path / ("x" * 60))
    assert len(str(scratch.path)) + len("/9dc13b6f-b292-4d52-8143-18e595cb0495") <= 107
    scratch.remove()


def test_other_folders_and_other_shared_memory_stay(tmp_path: Path, shared: Path) -> None:
    shared.touch()
    (tmp_path / "other").mkdir()
    Scratch(tmp_path).remove()
    assert shared.exists()
    assert [path.name for path in tmp_path.iterdir()] == ["other"]


def test_a_list_that_names_a_file_elsewhere_removes_nothing(tmp_path: Path) -> None:
    precious = tmp_path / "precious"
    precious.touch()
    (tmp_path / LIST).write_text(f"{precious}\n{SHARED}/../{precious}\n")
    remove_shared_memory(tmp_path)
    assert precious.exists()


def test_the_shared_memory_of_children_is_found(holder: "subprocess.Popen[str]", shared: Path) -> None:
    assert shared in shared_memory(os.getpid())


def test_what_openmp_made_for_a_process_is_found() -> None:
    made = SHARED / f"__KMP_REGISTERED_LIB_{os.getpid()}_{os.getuid()}"
    there = made.exists()
    made.touch()
    try:
        assert made in shared_memory(os.getpid())
    finally:
        if not there:
            made.unlink()


def test_what_is_held_while_the_body_runs_is_noted(
    tmp_path: Path, holder: "subprocess.Popen[str]", shared: Path
) -> None:
    scratch = Scratch(tmp_path / "own")
    with scratch.noting():
        pass
    assert str(shared) in (scratch.path / LIST).read_text().splitlines()
    scratch.remove()
