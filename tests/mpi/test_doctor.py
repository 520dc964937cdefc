"""The doctor on the ranks that mpirun starts."""

import signal
from collections.abc import Callable
from pathlib import Path

import pytest

from hpc.doctor.diagnose import CHECKS
from tests.conftest import ROOT, Ended, finish, start, start_echo, write_corpus
from tests.mpi.test_faults import wait_until

PROGRAM = """
import sys

sys.path.insert(0, {root!r})

from hpc import main
from tests.fakes import EchoLoader

if __name__ == "__main__":
    main(loader=EchoLoader(model={model!r}))
"""

SILENT = """
import sys

sys.path.insert(0, {root!r})

from hpc.mpi.comm import wait_for
from hpc.mpi.world import connect
from hpc.doctor.examine import Examination, answer_doctor
from hpc.job import Job
from tests.fakes import EchoLoader

world = connect()
if world.rank == 1:
    wait_for(lambda: bool(world.poll()) and False)
job = Job(model="echo", corpus=({corpus!r},), runs={runs!r})
if world.rank == 2:
    answer_doctor(job, world)
Examination(job, world, 3.0, 4.0).lead(EchoLoader(model={model!r}))
"""

Doctor = Callable[..., Ended]


@pytest.fixture
def model(tmp_path: Path) -> Path:
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    (folder / "model.safetensors").write_bytes(b"weights")
    return folder


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    return write_corpus(tmp_path / "c.jsonl", [{"prompt": f"{n} " + "x" * 50} for n in range(50)])


@pytest.fixture
def doctor(tmp_path: Path, model: Path, corpus: Path) -> Doctor:
    """Run the doctor on a job in `tmp_path / "runs"`: doctor("--flag", ranks=2, SLURM_…=…)."""
    program = tmp_path / "program.py"
    program.write_text(PROGRAM.format(root=str(ROOT), model=str(model)))

    def run(*flags: str, ranks: int = 2, **environment: str) -> Ended:
        job = ["doctor", "--model", "echo", "--corpus", str(corpus), "--runs", str(tmp_path / "runs"), *flags]
        return finish(start([str(program), *job], ranks, **{"CUDA_VISIBLE_DEVICES": "", **environment}), timeout_s=60)

    return run


def lines(ended: Ended, beginning: str) -> list[str]:
    return [line for line in ended.out.splitlines() if line.startswith(beginning)]


@pytest.mark.parametrize("ranks", [0, 1, 2, 3])
def test_where_all_is_well_every_check_says_ok_and_the_code_is_0(doctor: Doctor, ranks: int) -> None:
    ended = doctor(ranks=ranks)
    assert [line.split(": ")[0] for line in ended.out.splitlines()] == [f"ok    {check}" for check in CHECKS]
    assert (ended.code, ended.err) == (0, "")


def test_nothing_is_left_of_a_run_directory_that_was_not_there(doctor: Doctor, tmp_path: Path) -> None:
    doctor()
    assert not (tmp_path / "runs").exists()


def test_a_wrong_number_of_ranks_is_to_be_fixed_and_the_code_is_1(doctor: Doctor) -> None:
    ended = doctor(SLURM_NTASKS="3", SLURM_STEP_NUM_TASKS="3")
    assert ended.code == 1
    [line] = lines(ended, "FIX")
    assert line.startswith("FIX   ranks: 2 in MPI's world, but Slurm speaks of 3 tasks; ")


def test_two_ranks_that_see_one_gpu_are_to_be_fixed(doctor: Doctor) -> None:
    ended = doctor(CUDA_VISIBLE_DEVICES="GPU-none")
    assert ended.code == 1
    assert any("ranks 0 and 1" in line and "would share GPU GPU-none" in line for line in lines(ended, "FIX   GPUs"))


def test_gpus_that_torch_cannot_use_are_to_be_fixed(doctor: Doctor) -> None:
    ended = doctor(CUDA_VISIBLE_DEVICES="GPU-none,GPU-other")
    assert ended.code == 1
    [line] = lines(ended, "FIX")
    assert "torch cannot use CUDA: " in line


def test_gpus_that_the_job_does_not_use_are_not_asked_for(doctor: Doctor) -> None:
    assert doctor("--device", "cpu", CUDA_VISIBLE_DEVICES="GPU-none").code == 0


def test_a_cache_that_cannot_be_written_is_to_be_fixed(doctor: Doctor, corpus: Path) -> None:
    [line] = lines(doctor(TRITON_CACHE_DIR=str(corpus / "cache")), "FIX")
    assert f"TRITON_CACHE_DIR={corpus}/cache cannot be written" in line


def test_a_model_that_cannot_be_read_is_to_be_fixed(doctor: Doctor, model: Path) -> None:
    (model / "config.json").unlink()
    [line] = lines(doctor(), "FIX")
    assert line.startswith("FIX   model: on ")


def test_a_run_directory_that_cannot_be_made_is_to_be_fixed(doctor: Doctor, tmp_path: Path) -> None:
    (tmp_path / "runs").write_text("a file")
    ended = doctor()
    assert ended.code == 1
    [line] = lines(ended, "FIX")
    assert line.startswith(f"FIX   run directory: {tmp_path}/runs/c cannot be written: ")


def test_a_corpus_that_is_not_there_is_to_be_fixed(doctor: Doctor, corpus: Path) -> None:
    corpus.unlink()
    [line] = lines(doctor(), "FIX")
    assert line.startswith("FIX   corpus: ")


def test_a_run_that_is_under_way_is_said_and_goes_on(doctor: Doctor, corpus: Path, tmp_path: Path) -> None:
    run = tmp_path / "runs/c"
    process = start_echo(tmp_path, corpus, "--sampling.max-new-tokens", "40", ECHO_STEPS_PER_S="50")
    wait_until(run, at_least=1)
    before = {path.name for path in run.iterdir()}
    ended = doctor()
    after = {path.name for path in run.iterdir()}
    process.send_signal(signal.SIGTERM)
    assert (ended.code, finish(process).code) == (0, 75)
    assert "; a run is under way there, and keeps its lock" in ended.out
    assert before == after


def test_a_rank_that_never_answers_is_named_and_ended(tmp_path: Path, model: Path, corpus: Path) -> None:
    program = tmp_path / "silent.py"
    names = {"root": str(ROOT), "corpus": str(corpus), "runs": str(tmp_path / "runs"), "model": str(model)}
    program.write_text(SILENT.format(**names))
    ended = finish(start([str(program)], ranks=3), timeout_s=30)
    assert ended.code == 1
    assert "FIX   ranks: no answer in time of rank 1; " in ended.out
    assert "ended without waiting for what did not answer in time" in ended.err
    assert not (tmp_path / "runs").exists()
