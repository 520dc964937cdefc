"""What happens when something breaks or is told to stop: nothing finished is lost, nothing hangs."""

import os
import random
import shutil
import signal
import subprocess
import time
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.conftest import Ended, Scattergen, finish, read_rows, scattergen, start_echo, write_corpus

STEPS_PER_S = {"ECHO_STEPS_PER_S": "100"}
LONG = {"ECHO_STEPS_PER_S": "25"}
"""A run that is stopped, however long what is tried beside it takes."""
FLAGS = ("--name", "run", "--sampling.max-new-tokens", "40")


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    rows = [{"id": f"row-{n}", "prompt": f"{n} " + "x" * (n * 7 % 90)} for n in range(200)]
    return write_corpus(tmp_path_factory.mktemp("corpus") / "rows.jsonl", rows)


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory, corpus: Path) -> Path:
    """The folder of a run that nothing has disturbed."""
    folder = tmp_path_factory.mktemp("finished")
    assert finish(start_echo(folder, corpus, *FLAGS)).code == 0
    return folder


@pytest.fixture(scope="module")
def expected(finished: Path) -> bytes:
    return (finished / "runs/run/completions.jsonl").read_bytes()


def copy_runs(folder: Path, to: Path) -> None:
    """Copy the run directories of a folder that tests share, for one that goes on with them."""
    shutil.copytree(folder / "runs", to / "runs")


@pytest.fixture(scope="module")
def failed(tmp_path_factory: pytest.TempPathFactory, corpus: Path) -> tuple[Ended, Path]:
    """A run whose engine breaks on one of three ranks, and its folder."""
    folder = tmp_path_factory.mktemp("failed")
    return finish(start_echo(folder, corpus, *FLAGS, ranks=3, ECHO_RAISE_AT="row-5")), folder


@pytest.fixture(scope="module")
def filled(tmp_path_factory: pytest.TempPathFactory, corpus: Path) -> tuple[Ended, Path]:
    """A run on two ranks whose disk is full after 8 kB, and its folder."""
    folder = tmp_path_factory.mktemp("filled")
    return finish(start_echo(folder, corpus, *FLAGS, ranks=2, ECHO_FILE_BYTES="8000")), folder


@pytest.fixture(scope="module")
def drained(tmp_path_factory: pytest.TempPathFactory, corpus: Path) -> Path:
    """The folder of a run that was told to stop once some rows were done."""
    folder = tmp_path_factory.mktemp("drained")
    process = start_echo(folder, corpus, *FLAGS, ranks=2, **STEPS_PER_S)
    wait_until(run=folder / "runs/run", at_least=10)
    process.send_signal(signal.SIGTERM)
    finish(process, timeout_s=30)
    return folder


def records(run: Path) -> int:
    """Count the whole records in the journals of a run."""
    return sum(path.read_bytes().count(b"\n") for path in (run / "journal").glob("*.jsonl"))


def wait_until(run: Path, at_least: int, seconds: float = 60) -> None:
    """Wait until the journals have so many records."""
    deadline = time.monotonic() + seconds
    while records(run) < at_least:
        assert time.monotonic() < deadline, f"{run} has {records(run)} records after {seconds} s"
        time.sleep(0.01)


def ranks_of(folder: Path) -> dict[int, int]:
    """Return the process id of each rank of the run in `folder`; mpirun gives them a session of their own."""
    found = {}
    for process in Path("/proc").iterdir():
        try:
            ours = process.name.isdigit() and bytes(folder / "runs") in (process / "cmdline").read_bytes().split(b"\0")
            names = (
                dict(e.partition(b"=")[::2] for e in (process / "environ").read_bytes().split(b"\0")) if ours else {}
            )
        except OSError:  # it has ended since
            continue
        if b"PMI_RANK" in names:
            found[int(names[b"PMI_RANK"])] = int(process.name)
    return found


def is_gone(pid: int) -> bool:
    """Say whether a process has ended, be it as a zombie that nobody has asked for."""
    try:
        return "State:\tZ" in Path(f"/proc/{pid}/status").read_text()
    except OSError:
        return True


def test_an_exception_on_one_rank_ends_all_with_one_message_naming_rank_request_and_cause(
    failed: tuple[Ended, Path],
) -> None:
    ended, _ = failed
    said = [line for line in ended.err.splitlines() if line.startswith("scattergen: ")]
    assert ended.code == 1
    assert len(said) == 1
    assert "of 3 failed: RuntimeError: the engine broke on request 'row-5'" in said[0]


def test_a_failed_run_says_so_in_its_state(failed: tuple[Ended, Path]) -> None:
    assert (failed[1] / "runs/run/state").read_text() == "failed\n"


def test_the_traceback_is_in_the_log_of_the_rank_that_failed(failed: tuple[Ended, Path]) -> None:
    logs = [path.read_text() for path in (failed[1] / "runs/run/log").iterdir()]
    assert sum("Traceback" in log for log in logs) == 1


def test_after_a_fault_the_same_command_goes_on(
    failed: tuple[Ended, Path], echo: Scattergen, corpus: Path, tmp_path: Path, expected: bytes
) -> None:
    copy_runs(failed[1], tmp_path)
    assert echo(corpus, *FLAGS, ranks=2).code == 0
    assert (tmp_path / "runs/run/completions.jsonl").read_bytes() == expected


@dataclass(frozen=True)
class Killed:
    """A run of three ranks of which one was killed by SIGKILL once some rows were done."""

    folder: Path
    ended: Ended
    seconds: float
    """From the kill to the end of mpirun."""
    left: list[int]
    """Process ids of ranks that were there five seconds later."""


@pytest.fixture(params=[0, 1], scope="module")
def killed(request: pytest.FixtureRequest, corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Killed:
    folder = tmp_path_factory.mktemp("killed")
    process = start_echo(folder, corpus, *FLAGS, ranks=3, **STEPS_PER_S)
    wait_until(run=folder / "runs/run", at_least=20)
    ranks = ranks_of(folder)
    began = time.monotonic()
    os.kill(ranks[request.param], signal.SIGKILL)
    ended = finish(process, timeout_s=30)
    seconds = time.monotonic() - began
    deadline = time.monotonic() + 5
    while (left := [pid for pid in ranks.values() if not is_gone(pid)]) and time.monotonic() < deadline:
        time.sleep(0.05)
    return Killed(folder, ended, seconds, left)


def test_kill_9_of_a_rank_ends_the_run_within_5_s(killed: Killed) -> None:
    assert killed.ended.code != 0
    assert killed.seconds < 5


def test_kill_9_of_a_rank_leaves_no_rank_behind(killed: Killed) -> None:
    assert killed.left == []


def test_after_kill_9_the_rows_in_the_journal_are_not_generated_again(
    killed: Killed, echo: Scattergen, corpus: Path, tmp_path: Path, expected: bytes
) -> None:
    copy_runs(killed.folder, tmp_path)
    before = records(tmp_path / "runs/run")
    assert echo(corpus, *FLAGS, ranks=2).code == 0
    assert records(tmp_path / "runs/run") == len(set(read_rows_text(tmp_path))) >= before
    assert (tmp_path / "runs/run/completions.jsonl").read_bytes() == expected


def read_rows_text(folder: Path) -> list[str]:
    """Return the keys of all journal records of the run."""
    return [row["key"] for path in (folder / "runs/run/journal").iterdir() for row in read_rows(path)]


def test_a_run_whose_process_is_gone_is_shown_as_interrupted(killed: Killed) -> None:
    assert "interrupted" in scattergen("status", str(killed.folder / "runs/run")).out


@pytest.mark.parametrize("name", ["SIGTERM", "SIGINT", "SIGUSR1"])
def test_a_signal_to_mpirun_drains_the_run_with_exit_code_75(corpus: Path, tmp_path: Path, name: str) -> None:
    process = start_echo(tmp_path, corpus, *FLAGS, ranks=2, **STEPS_PER_S)
    wait_until(run=tmp_path / "runs/run", at_least=10)
    process.send_signal(signal.Signals[name])
    assert finish(process, timeout_s=30).code == 75
    assert (tmp_path / "runs/run/state").read_text() == "drained\n"


def test_usr2_to_a_single_rank_stops_all_ranks(corpus: Path, tmp_path: Path) -> None:
    process = start_echo(tmp_path, corpus, *FLAGS, ranks=3, **STEPS_PER_S)
    wait_until(run=tmp_path / "runs/run", at_least=10)
    os.kill(ranks_of(tmp_path)[2], signal.SIGUSR2)
    assert finish(process, timeout_s=30).code == 75


@pytest.mark.parametrize("ranks", [0, 1, 3])
def test_a_drained_run_goes_on_with_any_number_of_ranks(
    drained: Path, corpus: Path, tmp_path: Path, echo: Scattergen, expected: bytes, ranks: int
) -> None:
    copy_runs(drained, tmp_path)
    assert echo(corpus, *FLAGS, ranks=ranks).code == 0
    assert (tmp_path / "runs/run/completions.jsonl").read_bytes() == expected


def test_a_second_interrupt_leaves_at_once(corpus: Path, tmp_path: Path) -> None:
    process = start_echo(tmp_path, corpus, *FLAGS, ECHO_STEPS_PER_S="0.2")
    while not (tmp_path / "runs/run/events").exists() or b'"phase": "generate"' not in b"".join(
        path.read_bytes() for path in (tmp_path / "runs/run/events").iterdir()
    ):
        assert process.poll() is None
        time.sleep(0.01)
    process.send_signal(signal.SIGINT)
    time.sleep(0.2)  # two signals of one kind that are not handled between become one
    process.send_signal(signal.SIGINT)
    assert finish(process, timeout_s=10).code == 130


def test_a_second_run_in_the_same_directory_is_refused_naming_the_first(
    echo: Scattergen, corpus: Path, tmp_path: Path
) -> None:
    first = start_echo(tmp_path, corpus, *FLAGS, ranks=2, **LONG)
    wait_until(run=tmp_path / "runs/run", at_least=1)
    second = echo(corpus, *FLAGS, ranks=2)
    first.send_signal(signal.SIGTERM)
    finish(first)
    assert second.code == 2
    assert "is in use by host" in second.err


def test_a_refused_second_run_leaves_the_state_of_the_first(echo: Scattergen, corpus: Path, tmp_path: Path) -> None:
    first = start_echo(tmp_path, corpus, *FLAGS, **LONG)
    wait_until(run=tmp_path / "runs/run", at_least=1)
    echo(corpus, *FLAGS)
    state = (tmp_path / "runs/run/state").read_text()
    first.send_signal(signal.SIGTERM)
    finish(first)
    assert state == "running\n"


def test_a_full_disk_is_a_clear_fault(filled: tuple[Ended, Path]) -> None:
    assert filled[0].code == 1
    assert "cannot write the journal" in filled[0].err


def test_after_a_full_disk_the_journal_is_valid_and_the_run_goes_on(
    filled: tuple[Ended, Path], echo: Scattergen, corpus: Path, tmp_path: Path, expected: bytes
) -> None:
    copy_runs(filled[1], tmp_path)
    assert echo(corpus, *FLAGS, ranks=2).code == 0
    assert (tmp_path / "runs/run/completions.jsonl").read_bytes() == expected


def test_an_output_that_does_not_fit_on_the_disk_leaves_the_journals_for_the_next_run(
    echo: Scattergen, tmp_path: Path
) -> None:
    rows = [{"prompt": f"{n}", "kept": "meta " * 1000} for n in range(50)]  # the output is larger than the journal
    corpus = write_corpus(tmp_path / "rows.jsonl", rows)
    full = echo(corpus, ECHO_FILE_BYTES="100000")
    assert (full.code, "every completion is in the journals" in full.err) == (1, True)
    again = echo(corpus)
    assert (again.code, "nothing to generate" in again.out) == (0, True)


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can mount a read-only folder")
def test_a_read_only_run_directory_is_refused(echo: Scattergen, corpus: Path, tmp_path: Path) -> None:
    folder = tmp_path / "runs"
    folder.mkdir()
    subprocess.run(["mount", "--bind", folder, folder], check=True)
    try:
        subprocess.run(["mount", "-o", "remount,ro,bind", folder], check=True)
        ended = echo(corpus, *FLAGS)
    finally:
        subprocess.run(["umount", folder], check=True)
    assert ended.code == 2
    assert "Read-only file system" in ended.err


def test_without_an_mpi_library_one_process_works(echo: Scattergen, corpus: Path, tmp_path: Path) -> None:
    ended = echo(corpus, *FLAGS, MPI4PY_LIBMPI="/nonexistent/libmpi.so")
    assert ended.code == 0, ended.err


@pytest.mark.parametrize("variable", ["PMI_SIZE", "OMPI_COMM_WORLD_SIZE", "SLURM_STEP_NUM_TASKS"])
def test_processes_that_are_each_alone_are_refused_with_the_fix(echo: Scattergen, corpus: Path, variable: str) -> None:
    environment = {variable: "3", "MPI4PY_LIBMPI": "/nonexistent/libmpi.so"}
    ended = echo(corpus, *FLAGS, **environment)
    assert ended.code == 2
    assert "--mpi=pmi2" in ended.err


def test_a_bad_flag_is_said_once_however_many_ranks(echo: Scattergen, corpus: Path) -> None:
    ended = echo(corpus, "--nam", "run", ranks=3)
    assert ended.err.count("Unrecognized options: --nam") == 1


def test_a_refusal_is_said_once_however_many_ranks(echo: Scattergen, tmp_path: Path) -> None:
    ended = echo(tmp_path / "none.jsonl", ranks=3)
    assert ended.code == 2
    assert ended.err.count("no such file") == 1


def test_a_corpus_that_shares_no_row_with_the_journal_is_refused(
    finished: Path, echo: Scattergen, tmp_path: Path
) -> None:
    copy_runs(finished, tmp_path)
    other = write_corpus(tmp_path / "other.jsonl", [{"prompt": "quite another"}])
    ended = echo(other, *FLAGS, ranks=2)
    assert ended.code == 2
    assert "none of them is for a row of this corpus" in ended.err


def test_another_dtype_in_the_same_directory_is_refused_naming_it(
    finished: Path, echo: Scattergen, corpus: Path, tmp_path: Path
) -> None:
    copy_runs(finished, tmp_path)
    ended = echo(corpus, *FLAGS, "--dtype", "float16")
    assert ended.code == 2
    assert "dtype float32" in ended.err


def test_a_damaged_record_is_reported_and_its_row_generated_again(
    finished: Path, echo: Scattergen, corpus: Path, tmp_path: Path, expected: bytes
) -> None:
    copy_runs(finished, tmp_path)
    [journal] = (tmp_path / "runs/run/journal").iterdir()
    lines = journal.read_bytes().splitlines(keepends=True)
    lines[3] = lines[3].replace(b'"row":', b'"rov":')
    journal.write_bytes(b"".join(lines))
    ended = echo(corpus, *FLAGS)
    assert f"{journal}:4: the record's checksum is wrong" in ended.err
    assert len(list((tmp_path / "runs/run/journal").iterdir())) == 2
    assert (tmp_path / "runs/run/completions.jsonl").read_bytes() == expected


def test_merge_writes_what_is_there_while_rows_are_missing(drained: Path, tmp_path: Path) -> None:
    copy_runs(drained, tmp_path)
    done = records(tmp_path / "runs/run")
    assert scattergen("merge", str(tmp_path / "runs/run")).code == 75
    assert len(read_rows(tmp_path / "runs/run/completions.partial.jsonl")) == done


def test_merge_gives_the_same_bytes_as_the_run(echo: Scattergen, corpus: Path, tmp_path: Path, expected: bytes) -> None:
    echo(corpus, *FLAGS, ranks=2)
    (tmp_path / "runs/run/completions.jsonl").unlink()
    assert scattergen("merge", str(tmp_path / "runs/run")).code == 0
    assert (tmp_path / "runs/run/completions.jsonl").read_bytes() == expected


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_killed_at_random_20_times_and_resumed_on_other_ranks_the_output_is_the_same(
    corpus: Path, tmp_path: Path, expected: bytes
) -> None:
    chance = random.Random(3)
    for round_ in range(20):
        folder = tmp_path / str(round_)
        for _ in range(3):
            process = start_echo(folder, corpus, *FLAGS, ranks=chance.choice([1, 2, 3]), **STEPS_PER_S)
            try:
                process.wait(chance.uniform(0.3, 2.5))
            except subprocess.TimeoutExpired:
                victims = ranks_of(folder)
                os.kill(chance.choice(list(victims.values()) or [process.pid]), signal.SIGKILL)
            finish(process, timeout_s=30)
        ended = finish(start_echo(folder, corpus, *FLAGS, ranks=chance.choice([1, 2, 3])))
        assert ended.code == 0, ended.err
        assert (folder / "runs/run/completions.jsonl").read_bytes() == expected
        keys = read_rows_text(folder)
        assert len(keys) == len(set(keys)), "something finished was generated twice"
        assert scattergen("verify", str(folder / "runs/run")).code == 0
