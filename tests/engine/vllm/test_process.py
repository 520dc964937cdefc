"""What a library says while it starts is in the rank's log, and the signals that say stop are the rank's alone."""

import logging
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from hpc.engine.vllm.process import log_to_rank, terminal_to_log, workers_deaf
from hpc.mpi.signals import SIGNALS
from hpc.rundir import log


@pytest.fixture
def rank_log(tmp_path: Path) -> Iterator[Path]:
    """The log file of a rank, in place as during a run."""
    path = tmp_path / "rank.log"
    log.configure(1, 2, path)
    yield path
    log.configure(0, 1)


def test_what_is_written_to_the_terminal_meanwhile_is_in_the_log(
    rank_log: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    with terminal_to_log():
        os.write(1, b"from C\n")
        subprocess.run(["sh", "-c", "echo from a child >&2"], check=True)
    print("after")
    assert rank_log.read_text() == "from C\nfrom a child\n"
    assert capfd.readouterr() == ("after\n", "")


def test_after_an_exception_the_terminal_is_there_again(rank_log: Path, capfd: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(ValueError, match="no start"), terminal_to_log():
        raise ValueError("no start")
    os.write(2, b"after\n")
    assert capfd.readouterr().err == "after\n"


def test_the_lines_of_a_library_are_in_the_log_alone(rank_log: Path, capfd: pytest.CaptureFixture[str]) -> None:
    log_to_rank("a_library")
    logging.getLogger("a_library.part").warning("loud")
    assert rank_log.read_text().endswith("[1/2] loud\n")
    assert capfd.readouterr() == ("", "")


def blocked(workers: bool) -> set[int]:
    """Return which signals a process is deaf to that is begun meanwhile."""
    with workers_deaf(workers):
        shown = subprocess.run(
            [sys.executable, "-c", "import signal; print(*map(int, signal.pthread_sigmask(signal.SIG_BLOCK, ())))"],
            capture_output=True, text=True, check=True,
        )  # fmt: skip
    return set(map(int, shown.stdout.split()))


def test_workers_are_deaf_to_the_signals_that_say_stop() -> None:
    assert blocked(True) >= set(map(int, SIGNALS))


def test_without_workers_nothing_is_deaf() -> None:
    assert blocked(False) & set(map(int, SIGNALS)) == set()


def test_a_signal_that_comes_meanwhile_comes_afterwards() -> None:
    heard: list[int] = []
    before = signal.signal(signal.SIGUSR2, lambda number, frame: heard.append(number))
    try:
        with workers_deaf(True):
            signal.raise_signal(signal.SIGUSR2)  # at this thread: another of the process may be listening
            assert heard == []
        assert heard == [signal.SIGUSR2]
    finally:
        signal.signal(signal.SIGUSR2, before)
