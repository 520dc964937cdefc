"""Every condition that would cost hours makes a line that says FIX, where it is and what to do."""

import errno
import os
import re
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, NoReturn

import pytest

from hpc.doctor.diagnose import CHECKS, Findings, diagnose
from hpc.doctor.examine import Examination, answer_doctor, look, resolve, trial, wants_vllm
from hpc.doctor.probes import clock_offset, file_system, leave_file, read_ends, try_cache
from hpc.job import Job
from hpc.mpi.comm import Buffer, Message, Single, Tag, pack
from hpc.rundir.lock import RunLock, is_held
from hpc.slurm.allocation import Allocation
from tests.conftest import write_corpus
from tests.fakes import EchoLoader

JOB = Job(model="m", corpus=("c.jsonl",))
GIB = 2**30


def greeting(host: str, *gpus: str) -> Buffer:
    seen = {"gpus": list(gpus), "tokens": list(gpus), "variables": ["CUDA_VISIBLE_DEVICES"]}
    return pack({"host": host, "cores": [0], "threads": 1, **seen})


def of_rank(host: str = "node1", **changes: Any) -> dict[str, Any]:
    facts = {
        "host": host,
        "library": "MPICH 4.3",
        "cuda": None,
        "unshared": "",
        "seen": True,
        "locked": True,
        "caches": [{"name": "TMPDIR", "path": "/tmp", "type": "ext4", "error": ""}],
        "model": {"files": 2, "bytes": 3 * GIB, "error": ""},
        "temp": "/tmp",
        "temp_free": 5 * GIB,
        "clock": (0.0, 0.001),
    }
    return {**facts, **changes}


def findings(*facts: dict[str, Any], gpus: tuple[str, ...] = (), **changes: Any) -> Findings:
    """What is found where all is well, on ranks with these facts."""
    given = facts or (of_rank("node1"), of_rank("node2"))
    tried = {"folder": "/runs/c/doctor-1", "run": "/runs/c", "files": 1, "busy": False, "free": 9 * GIB}
    found = Findings(
        job=JOB,
        size=len(given),
        environment={},
        hellos={rank: greeting(one["host"], *gpus) for rank, one in enumerate(given)},
        facts=dict(enumerate(given)),
        trial={**tried, "corpus": "", "error": "", "lock": ""},
        model={"path": "/models/m", "error": ""},
        allocation=None,
        now=0.0,
    )
    return replace(found, **changes)


def tried(**changes: Any) -> dict[str, Any]:
    return {**(findings().trial or {}), **changes}


def wrong(found: Findings) -> list[str]:
    return [str(line) for line in diagnose(found) if not line.ok]


def to_fix(found: Findings, check: str, *names: str) -> None:
    """Assert that one line alone says FIX, of this check, and that it names value, node and way out."""
    [line] = [line for line in diagnose(found) if not line.ok]
    assert line.what == check
    assert [name for name in names if name not in str(line)] == [], str(line)


def well(found: Findings, check: str, *names: str) -> None:
    """Assert that the line of a check says ok, and that it names what was found."""
    [line] = [line for line in diagnose(found) if line.what == check]
    assert line.ok
    assert [name for name in names if name not in str(line)] == [], str(line)


def test_where_all_is_well_every_check_has_one_line_that_says_ok() -> None:
    lines = [str(line) for line in diagnose(findings())]
    assert [line.split(": ")[0] for line in lines] == [f"ok    {check}" for check in CHECKS]


def test_ranks_are_counted_for_each_node() -> None:
    found = findings(of_rank("a"), of_rank("b"), of_rank("a"))
    well(found, "ranks", "3 on 2 nodes", "2 on a", "1 on b")


def test_of_many_nodes_eight_are_listed() -> None:
    found = findings(*[of_rank(f"node{number}") for number in range(20)])
    well(found, "ranks", "node7", "12 more")
    assert "node8" not in "".join(str(line) for line in diagnose(found))


def test_a_rank_that_has_not_answered_is_named_with_its_node() -> None:
    found = findings()
    to_fix(replace(found, facts={0: found.facts[0]}), "ranks", "rank 1", "node2", "--slurm.exclude")


def test_where_no_rank_has_answered_there_still_are_lines() -> None:
    found = replace(findings(), facts={}, hellos={}, trial=None, model=None)
    assert [line.split(":")[0] for line in wrong(found)] == ["FIX   ranks", "FIX   run directory", "FIX   model"]


@pytest.mark.parametrize(
    "environment",
    [{"SLURM_NTASKS": "4"}, {"SLURM_NTASKS": "1"}, {"SLURM_STEP_NUM_TASKS": "4"}],
    ids=str,
)
def test_another_number_of_ranks_than_slurm_has_tasks_is_to_be_fixed(environment: dict[str, str]) -> None:
    tasks = next(iter(environment.values()))
    to_fix(findings(environment=environment), "ranks", "2 in MPI's world", f"{tasks} tasks", "--mpi=pmi2")


@pytest.mark.parametrize(
    "environment",
    [
        {"SLURM_NTASKS": "2", "SLURM_STEP_NUM_TASKS": "2"},
        {"SLURM_NTASKS": "2", "SLURM_STEP_NUM_TASKS": "1"},
        {"SLURM_STEP_NUM_TASKS": "1"},
        {"SLURM_NTASKS": "1", "SLURM_STEP_NUM_TASKS": "1"},
    ],
    ids=str,
)
def test_the_step_in_which_mpirun_starts_its_proxies_is_not_taken_for_that_of_the_ranks(
    environment: dict[str, str],
) -> None:
    assert wrong(findings(environment=environment)) == []


def test_different_mpi_libraries_are_to_be_fixed() -> None:
    to_fix(findings(of_rank("a"), of_rank("b", library="Open MPI v5")), "MPI", "MPICH 4.3 on a", "Open MPI v5 on b")


def test_the_mpi_type_is_said() -> None:
    found = findings(environment={"SLURM_MPI_TYPE": "pmi2"})
    well(found, "MPI", "MPICH 4.3", "--mpi=pmi2")


def test_two_ranks_on_one_gpu_are_to_be_fixed() -> None:
    found = findings(of_rank("a", cuda=""), of_rank("a", cuda=""), gpus=("GPU-1",))
    to_fix(found, "GPUs", "ranks 0 and 1 on a", "GPU-1", "one rank for")


def test_a_gpu_for_each_rank_is_well() -> None:
    found = findings(of_rank("a", cuda=""), of_rank("a", cuda=""), gpus=("GPU-1", "GPU-2"))
    well(found, "GPUs", "one for each rank", "2 of 2 ranks")


def test_several_gpus_for_each_rank_are_well() -> None:
    gpus = ("GPU-1", "GPU-2", "GPU-3", "GPU-4")
    found = findings(of_rank("a", cuda=""), of_rank("a", cuda=""), gpus=gpus, job=replace(JOB, replica_gpus=2))
    well(found, "GPUs", "2 for each rank")


def test_fewer_gpus_than_a_model_is_to_be_on_are_to_be_fixed() -> None:
    found = findings(of_rank("a", cuda=""), gpus=("GPU-1",), job=replace(JOB, replica_gpus=2))
    to_fix(found, "GPUs", "rank 0 on a sees 1 GPUs", "--replica-gpus wants 2 for each rank")


def test_a_torch_that_cannot_use_cuda_is_to_be_fixed() -> None:
    found = findings(of_rank("a", cuda="driver too old"), gpus=("GPU-1",))
    to_fix(found, "GPUs", "on a", "driver too old", "install a torch")


def test_a_node_without_gpus_among_others_is_to_be_fixed() -> None:
    hellos = {0: greeting("a", "GPU-1"), 1: greeting("b")}
    found = findings(of_rank("a", cuda=""), of_rank("b"), hellos=hellos)
    to_fix(found, "GPUs", "none visible on b", "--slurm.gpus-per-node")


def test_no_gpu_where_the_job_wants_one_is_to_be_fixed() -> None:
    to_fix(findings(job=replace(JOB, device="cuda")), "GPUs", "node1", "node2", "--slurm.gpus-per-node")


def test_gpus_that_the_job_does_not_use_may_be_shared() -> None:
    found = findings(of_rank("a"), of_rank("a"), gpus=("GPU-1",), job=replace(JOB, device="cpu"))
    well(found, "GPUs", "none in use", "--device cpu")


def test_a_corpus_that_is_not_there_is_to_be_fixed() -> None:
    found = findings(trial=tried(corpus='corpus "c": no such file'))
    to_fix(found, "corpus", 'corpus "c": no such file', "as the compute nodes see it")


def test_a_run_directory_that_cannot_be_written_is_to_be_fixed() -> None:
    found = findings(of_rank(unshared=None, locked=None), trial=tried(folder=None, error="Permission denied"))
    to_fix(found, "run directory", "/runs/c", "Permission denied", "--runs")


def test_a_run_directory_that_a_node_does_not_share_is_to_be_fixed() -> None:
    found = findings(of_rank("a"), of_rank("b", unshared="it is not there", locked=None))
    to_fix(found, "run directory", "on b", "it is not there", "--runs")


def test_a_rank_whose_file_rank_0_does_not_see_is_to_be_fixed() -> None:
    to_fix(findings(of_rank("a"), of_rank("b", seen=False)), "run directory", "on b", "rank 0 does not see", "--runs")


def test_a_file_system_that_does_not_answer_is_to_be_fixed() -> None:
    found = findings(of_rank(unshared=None, locked=None), trial=None)
    to_fix(found, "run directory", "in time", "--runs")


def test_a_run_that_is_under_way_is_said_and_is_well() -> None:
    well(findings(trial=tried(busy=True)), "run directory", "/runs/c", "a run is under way")


def test_a_lock_that_a_node_does_not_see_is_to_be_fixed() -> None:
    to_fix(findings(of_rank("a"), of_rank("b", locked=False)), "locks", "on b", "not seen", "second run")


def test_a_lock_that_cannot_be_taken_is_to_be_fixed_once() -> None:
    found = findings(of_rank("a", locked=False), trial=tried(lock="no locks here; add --force"))
    to_fix(found, "locks", "no locks here; add --force", "--runs")


def test_locks_that_were_not_tried_everywhere_are_not_said_to_be_well() -> None:
    found = findings(of_rank("a"), of_rank("b", unshared="not there", locked=None))
    assert [line for line in diagnose(found) if line.what == "locks"] == []


def cache(**changes: str) -> dict[str, Any]:
    return {"caches": [{"name": "TRITON_CACHE_DIR", "path": "/c", "type": "ext4", "error": "", **changes}]}


def test_a_cache_that_cannot_be_written_is_to_be_fixed() -> None:
    found = findings(of_rank("a", **cache(error="Read-only file system")))
    to_fix(found, "caches", "on a", "TRITON_CACHE_DIR=/c", "Read-only file system", "setup.sh")


@pytest.mark.parametrize("kind", ["nfs", "nfs4", "lustre", "gpfs", "beegfs", "ceph", "cifs", "fuse.sshfs", "fuse.any"])
def test_a_cache_on_a_shared_file_system_is_to_be_fixed(kind: str) -> None:
    to_fix(
        findings(of_rank("a", **cache(type=kind))), "caches", "on a", f"TRITON_CACHE_DIR=/c is on {kind}", "setup.sh"
    )


@pytest.mark.parametrize("kind", ["ext4", "xfs", "tmpfs", "overlay", "btrfs", "zfs", "fuse.fuse-overlayfs"])
def test_a_cache_on_a_file_system_of_the_node_is_well(kind: str) -> None:
    well(findings(of_rank("a", **cache(type=kind))), "caches", "TRITON_CACHE_DIR=/c", kind)


def test_what_is_wrong_on_several_nodes_is_one_line_that_names_them() -> None:
    bad = cache(type="nfs")
    to_fix(findings(of_rank("a", **bad), of_rank("b", **bad), of_rank("b", **bad), of_rank("c")), "caches", "on a, b:")


def test_a_model_that_is_refused_is_to_be_fixed() -> None:
    found = findings(of_rank(model=None), model={"path": None, "error": "no such model"})
    to_fix(found, "model", "no such model", "scattergen fetch m")


def test_a_model_that_is_not_found_in_time_is_to_be_fixed() -> None:
    to_fix(findings(of_rank(model=None), model=None), "model", "m was not found in time", "scattergen fetch m")


def test_a_model_that_a_node_cannot_read_is_to_be_fixed() -> None:
    bad = {"files": 0, "bytes": 0, "error": "No such file or directory: /models/m"}
    found = findings(of_rank("a"), of_rank("b", model=bad))
    to_fix(found, "model", "on b", "No such file or directory: /models/m", "where every node can read it")


def test_a_model_without_weights_is_to_be_fixed() -> None:
    found = findings(of_rank("a", model={"files": 0, "bytes": 0, "error": ""}))
    to_fix(found, "model", "on a", "no .safetensors or .bin file", "the folder that has the weights")


def test_a_model_that_differs_from_that_of_rank_0_is_to_be_fixed() -> None:
    found = findings(of_rank("a"), of_rank("b", model={"files": 1, "bytes": 7, "error": ""}))
    to_fix(found, "model", "on b", "1 weight files of 7 bytes", "where every node reads the same")


def test_too_little_space_in_the_run_directory_is_to_be_fixed() -> None:
    to_fix(findings(trial=tried(free=GIB - 1)), "space", "1.0 GiB", "/runs/c", "--runs")


def test_too_little_space_for_temporary_files_is_to_be_fixed() -> None:
    to_fix(findings(of_rank("a"), of_rank("b", temp_free=2**28 - 1)), "space", "on b", "0.2 GiB", "/tmp", "clean it")


@pytest.mark.parametrize("sign", [1, -1])
def test_clocks_that_differ_by_more_than_2_s_are_to_be_fixed(sign: int) -> None:
    found = findings(of_rank("a", clock=(0.0, 0.0)), of_rank("b", clock=(sign * 2.2, 0.1)))
    first, last = ("b", "a") if sign > 0 else ("a", "b")
    to_fix(found, "clocks", f"of {first} is 2.1 s ahead of that of {last}")


def test_clocks_are_not_said_to_differ_by_what_the_measurement_may_be_wrong() -> None:
    found = findings(of_rank("a", clock=(0.0, 0.0)), of_rank("b", clock=(2.2, 0.3)))
    well(found, "clocks", "2.50 s")


def test_the_end_of_the_allocation_is_said() -> None:
    found = findings(allocation=Allocation("7", 0, ends_at=1000 + 3540), now=1000.0)
    well(found, "time limit", "59 min 00 s")


def test_the_difference_of_two_clocks_is_found_though_the_answer_took_long() -> None:
    assert clock_offset(asked=100, received=161, sent=191, answered=132) == (60, 1)


MOUNTS = """\
/dev/sda / ext4 rw 0 0
server:/home /home nfs4 rw 0 0
systemd-1 /scratch autofs rw 0 0
mds:/fs /scratch lustre rw 0 0
/dev/sdb /home/my\\040disk xfs rw 0 0
"""


@pytest.mark.parametrize(
    ("path", "kind"),
    [
        ("/tmp/x", "ext4"),
        ("/home/me", "nfs4"),
        ("/homeless", "ext4"),
        ("/scratch", "lustre"),
        ("/home/my disk/a", "xfs"),
    ],
)
def test_a_path_is_on_the_file_system_that_is_mounted_nearest_above_it(path: str, kind: str) -> None:
    assert file_system(Path(path), MOUNTS) == kind


def job_in(folder: Path) -> Job:
    corpus = write_corpus(folder / "c.jsonl", [{"prompt": "a"}])
    return Job(model="m", corpus=(str(corpus),), runs=str(folder / "deep" / "runs"))


def test_a_trial_removes_the_folders_that_it_made(tmp_path: Path) -> None:
    with trial(job_in(tmp_path)) as found:
        assert Path(found["folder"]).parent == tmp_path / "deep/runs/c"
    assert [path.name for path in tmp_path.iterdir()] == ["c.jsonl"]


def test_a_trial_leaves_what_was_there(tmp_path: Path) -> None:
    run = tmp_path / "deep/runs/c"
    run.mkdir(parents=True)
    (run / "job.json").write_text("kept")
    with trial(job_in(tmp_path)):
        pass
    assert [(path.name, path.read_text()) for path in run.iterdir()] == [("job.json", "kept")]


def test_a_trial_needs_no_corpus(tmp_path: Path) -> None:
    with trial(Job(model="m", corpus=("missing.jsonl",), runs=str(tmp_path))) as found:
        assert found["corpus"].startswith('corpus "missing.jsonl": no such file')
        assert found["run"] == str(tmp_path / "missing")


def test_a_trial_where_nothing_can_be_written_says_why(tmp_path: Path) -> None:
    (tmp_path / "deep").write_text("a file")
    with trial(job_in(tmp_path)) as found:
        assert os.strerror(errno.ENOTDIR) in found["error"] or os.strerror(errno.EEXIST) in found["error"]
        assert found["folder"] is None


def test_a_trial_leaves_the_lock_of_a_run_alone(tmp_path: Path) -> None:
    run = tmp_path / "deep/runs/c"
    run.mkdir(parents=True)
    lock = RunLock(run)
    lock.acquire()
    with trial(job_in(tmp_path)) as found:
        assert found["busy"]
        assert not found["lock"]
    assert is_held(run)
    lock.release()


QUESTION = {"folder": None, "model": None}


def test_a_rank_sees_the_lock_and_the_nonce_of_a_trial(tmp_path: Path) -> None:
    with trial(job_in(tmp_path)) as found:
        facts = look(3, {**QUESTION, "folder": found["folder"]}, False, {"TMPDIR": str(tmp_path)})
        assert (facts["unshared"], facts["locked"]) == ("", True)
        assert (Path(found["folder"]) / "3").exists()


def test_a_lock_that_nobody_holds_is_seen_as_such(tmp_path: Path) -> None:
    folder = tmp_path / "doctor-1"
    folder.mkdir()
    (folder / "nonce").write_text(folder.name)
    assert look(1, {**QUESTION, "folder": str(folder)}, False, {})["locked"] is False


@pytest.mark.parametrize("there", ["nothing", "another nonce"])
def test_a_folder_that_is_not_that_of_rank_0_is_not_written_into(tmp_path: Path, there: str) -> None:
    if there != "nothing":
        (tmp_path / "nonce").write_text(there)
    before = list(tmp_path.iterdir())
    said = leave_file(tmp_path, 1, patience_s=0.1)
    assert said is not None
    assert str(tmp_path.parent) in said
    assert list(tmp_path.iterdir()) == before


def test_a_cache_that_is_missing_is_made(tmp_path: Path) -> None:
    found = try_cache("TMPDIR", str(tmp_path / "a/b"))
    assert not found["error"]
    assert found["type"]
    assert list((tmp_path / "a/b").iterdir()) == []


def test_a_cache_that_cannot_be_made_says_why(tmp_path: Path) -> None:
    (tmp_path / "a").write_text("a file")
    assert try_cache("TMPDIR", str(tmp_path / "a/b"))["error"] == os.strerror(errno.ENOTDIR)


def test_the_caches_are_those_that_the_environment_names(tmp_path: Path) -> None:
    names = ("TRITON_CACHE_DIR", "TORCHINDUCTOR_CACHE_DIR", "TMPDIR")
    facts = look(0, QUESTION, False, {name: str(tmp_path / name) for name in names})
    assert [(one["name"], one["path"]) for one in facts["caches"]] == [(name, str(tmp_path / name)) for name in names]


@pytest.fixture
def model(tmp_path: Path) -> Path:
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    (folder / "model-1.safetensors").write_bytes(b"12345")
    (folder / "model-2.safetensors").write_bytes(b"")
    return folder


def test_a_model_is_read_at_its_ends(model: Path) -> None:
    assert read_ends(model) == {"files": 2, "bytes": 5, "error": ""}


def test_a_model_with_a_broken_link_cannot_be_read(model: Path) -> None:
    (model / "model-3.safetensors").symlink_to(model / "blob")
    assert read_ends(model)["error"] == f"No such file or directory: {model / 'model-3.safetensors'}"


def test_a_model_without_configuration_cannot_be_read(model: Path) -> None:
    (model / "config.json").unlink()
    assert "config.json" in read_ends(model)["error"]


class BrokenLoader(EchoLoader):
    """Fails to resolve in a way that nobody has thought of."""

    def find(self, model: str) -> Path:
        raise ZeroDivisionError("by zero")


def test_whatever_goes_wrong_with_the_model_is_said() -> None:
    assert resolve(JOB, BrokenLoader()) == {"path": None, "error": "ZeroDivisionError: by zero"}


class Aborted(Exception):
    """A world was ended."""


class DeafWorld:
    """A rank of two; the other one says what it is told to, and nothing else."""

    size = 2

    def __init__(self, rank: int, *messages: Message) -> None:
        self.rank = rank
        self.messages = list(messages)
        self.sent: list[int] = []

    def send(self, dest: int, tag: int, array: Buffer) -> None:
        self.sent.append(tag)

    def poll(self) -> list[Message]:
        messages, self.messages = self.messages, []
        return messages

    def abort(self, message: str) -> NoReturn:
        raise Aborted(message)

    def close(self) -> None:
        pass


def test_a_rank_that_never_answers_is_named_and_all_are_ended(
    tmp_path: Path, model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    examination = Examination(job_in(tmp_path), DeafWorld(0, Message(1, Tag.HELLO, greeting("far"))), 3.0, 4.0)
    with pytest.raises(Aborted):
        examination.lead(EchoLoader(model=str(model)))
    assert "FIX   ranks: no answer in time of rank 1 on far; " in capsys.readouterr().out
    assert not (tmp_path / "deep").exists()


class FarWorld(DeafWorld):
    """Rank 0 of two; the other one answers at once, has a clock that is 100 s ahead, and writes into another folder."""

    def __init__(self) -> None:
        super().__init__(0, Message(1, Tag.HELLO, greeting("far")))

    def send(self, dest: int, tag: int, array: Buffer) -> None:
        super().send(dest, tag, array)
        if tag == Tag.QUESTION:
            facts = of_rank("far", model=None, received=time.time() + 100, sent=time.time() + 100)
            self.messages.append(Message(1, Tag.ANSWER, pack(facts)))


def test_rank_0_measures_the_clock_of_a_rank_and_looks_for_its_file(
    tmp_path: Path, model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    world = FarWorld()
    assert Examination(job_in(tmp_path), world).lead(EchoLoader(model=str(model))) == 1
    out = capsys.readouterr().out
    assert re.search(r"FIX   clocks: that of far is (99|100)\.\d s ahead of that of ", out)
    assert "FIX   run directory: on far: rank 0 does not see what is written there; " in out
    assert world.sent == [Tag.QUESTION, Tag.BYE]


class SlowLoader(EchoLoader):
    """Waits for a hub that does not answer."""

    def __init__(self) -> None:
        super().__init__()
        self.answer = threading.Event()

    def find(self, model: str) -> Path:
        self.answer.wait(60)
        return super().find(model)


@pytest.fixture
def slow() -> Iterator[SlowLoader]:
    loader = SlowLoader()
    yield loader
    loader.answer.set()


class LoneWorld(Single):
    """A single process that can be seen to be ended."""

    def abort(self, message: str) -> NoReturn:
        raise Aborted(message)


def test_a_model_that_is_waited_for_in_vain_does_not_keep_the_rest_from_being_checked(
    tmp_path: Path, slow: SlowLoader, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(Aborted):
        Examination(job_in(tmp_path), LoneWorld(), 1.0, 3.0).lead(slow)
    lines = capsys.readouterr().out.splitlines()
    [line] = [line for line in lines if line.startswith("FIX")]
    assert line.startswith("FIX   model: m")
    assert "scattergen fetch m" in line


def test_a_rank_that_hears_nothing_of_rank_0_ends_all() -> None:
    with pytest.raises(Aborted, match=r"rank 1 on .*: no word of rank 0 in 0\.1 s"):
        answer_doctor(JOB, DeafWorld(1), patience_s=0.1)


def test_a_rank_answers_and_leaves_when_it_is_told_to() -> None:
    world = DeafWorld(1, Message(0, Tag.QUESTION, pack(QUESTION)), Message(0, Tag.BYE, pack()))
    assert answer_doctor(JOB, world) == 0
    assert world.sent == [Tag.HELLO, Tag.ANSWER]


VLLM = Job(model="m", corpus=("c.jsonl",), engine="vllm")


def test_the_version_of_vllm_that_is_installed_and_was_tested_is_named() -> None:
    found = replace(findings(of_rank(vllm={"version": "0.32.0", "error": ""})), job=VLLM)
    well(found, "vLLM", "0.32.0", "tested")


def test_a_vllm_that_cannot_be_imported_is_to_be_fixed_where_it_is() -> None:
    found = findings(
        of_rank("a", vllm={"version": "0.32.0", "error": ""}),
        of_rank("b", vllm={"version": "0.32.0", "error": "no libcuda"}),
    )
    to_fix(replace(found, job=VLLM), "vLLM", "on b", "0.32.0", "no libcuda", "the driver", "--engine")


@pytest.mark.parametrize(("version", "said"), [(None, "not installed"), ("0.31.0", "0.31.0 is installed")])
def test_a_vllm_that_is_not_installed_or_was_not_tested_is_to_be_fixed(version: str | None, said: str) -> None:
    found = findings(of_rank(vllm={"version": version, "error": "it is said once"}))
    to_fix(replace(found, job=VLLM), "vLLM", said, "pip install", "--engine")


def test_an_engine_that_keeps_no_model_on_several_devices_is_to_be_fixed() -> None:
    job = replace(JOB, engine="native", device="cpu", replica_cpus=2)
    to_fix(findings(job=job), "vLLM", "--replica-cpus is 2", "native", "--engine vllm")


def test_a_vllm_that_does_not_answer_in_time_is_said_to_be_untried() -> None:
    found = replace(findings(of_rank(vllm={"version": "0.32.0", "error": None})), job=VLLM)
    well(found, "vLLM", "0.32.0", "whether it can be imported")


@pytest.mark.parametrize("values", [{"engine": "vllm"}, {"replica_gpus": 2}, {"replica_cpus": 2, "device": "cpu"}])
def test_a_job_that_only_vllm_can_do_wants_it(values: dict[str, Any]) -> None:
    assert wants_vllm(replace(JOB, **values), gpus=False)


@pytest.mark.parametrize("engine", ["auto", "native", "hf"])
def test_others_do_not_where_there_is_no_gpu(engine: Any) -> None:
    assert not wants_vllm(replace(JOB, engine=engine), gpus=False)


def test_what_a_rank_finds_of_vllm_is_asked_only_where_it_is_to_generate() -> None:
    question = {"folder": None, "model": None}
    assert look(0, question, False, os.environ)["vllm"] is None
    found = look(0, question, False, os.environ, vllm=True)["vllm"]
    assert found["version"] is not None or "vLLM is not installed" in found["error"]
