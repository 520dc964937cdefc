"""The terminal is a convenience: whatever becomes of it, a run goes on, and no command ends in a traceback."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import ROOT, write_corpus

ECHO = f'"{sys.executable}" "{ROOT / "tests/echo_job.py"}" --corpus c.jsonl'
HPC = f'"{sys.executable}" -m hpc'


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a corpus, and a finished run of it."""
    made = tmp_path_factory.mktemp("terminal")
    write_corpus(
        made / "c.jsonl", [{"prompt": f"row {index} \N{GRINNING FACE}", "id": f"é{index}"} for index in range(40)]
    )
    assert shell(made, f"{ECHO} --name done").returncode == 0
    return made


def shell(folder: Path, command: str, **environment: str) -> "subprocess.CompletedProcess[str]":
    """Run a line of bash in a folder."""
    names = {**os.environ, "PYTHONPATH": str(ROOT), **environment}
    return subprocess.run(
        ["bash", "-c", command], cwd=folder, env=names, capture_output=True, text=True, timeout=120, check=False
    )


@pytest.mark.parametrize(
    ("name", "streams"),
    [
        ("gone", "2>&1 | head -1; exit ${PIPESTATUS[0]}"),
        ("full", ">/dev/full 2>&1"),
        ("closed", "<&- >&- 2>&-"),
        ("no-error", "2>&-"),
        ("ascii", ""),
    ],
)
def test_a_run_goes_on_whatever_becomes_of_its_terminal(folder: Path, name: str, streams: str) -> None:
    ended = shell(folder, f"{ECHO} --name {name} --show 2 {streams}", PYTHONIOENCODING="ascii" * (name == "ascii"))
    made = [folder / "runs" / run / "completions.jsonl" for run in (name, "done")]
    assert (ended.returncode, "Traceback" in ended.stderr) == (0, False)
    assert made[0].read_bytes() == made[1].read_bytes()


@pytest.mark.parametrize("streams", [">/dev/full 2>&1", "2>&1 | true; exit ${PIPESTATUS[0]}"])
def test_the_log_of_a_run_says_that_its_terminal_is_lost(folder: Path, tmp_path: Path, streams: str) -> None:
    shell(folder, f"{ECHO} --runs {tmp_path} --name lost --sampling.max-new-tokens 4 {streams}")
    assert (tmp_path / "lost/log/0001-00000.log").read_text().count("the terminal, or what reads it") == 1


def test_nothing_that_is_printed_gets_into_a_file_that_took_the_place_of_a_closed_stream(folder: Path) -> None:
    shell(folder, f"{ECHO} --name closed-too --show 3 >&- 2>&-")
    journal = (folder / "runs/closed-too/journal/0001-00000.jsonl").read_text()
    assert all(line.startswith('{"crc"') for line in journal.splitlines())


VERBS = ("status runs/done", "verify runs/done", "merge runs/done", "report --no-html runs/done", "--help", "plan")


@pytest.mark.parametrize("verb", VERBS)
def test_a_reader_that_leaves_early_changes_no_exit_code(folder: Path, verb: str) -> None:
    command = f"{ECHO.replace('--corpus', 'plan --corpus')} --name done" if verb == "plan" else f"{HPC} {verb}"
    ended = shell(folder, f"{command} | true; exit ${{PIPESTATUS[0]}}")
    assert (ended.returncode, ended.stderr) == (0, "")


@pytest.mark.parametrize("verb", VERBS[:4])
def test_what_is_printed_and_cannot_be_written_is_a_fault_in_one_sentence(folder: Path, verb: str) -> None:
    ended = shell(folder, f"{HPC} {verb} >/dev/full")
    assert (ended.returncode, ended.stderr.count("\n")) == (1, 1)
    assert [word for word in ("standard output", "No space left on device") if word not in ended.stderr] == []


@pytest.mark.parametrize("streams", [">&-", "2>&-", ">&- 2>&-", "<&- >&- 2>&-", "2>/dev/full"])
def test_closed_streams_leave_the_exit_code_of_a_command(folder: Path, streams: str) -> None:
    right, wrong = (
        shell(folder, f"{HPC} verify runs/done {streams}"),
        shell(folder, f"{HPC} verify runs/none {streams}"),
    )
    assert (right.returncode, wrong.returncode, "Traceback" in right.stderr + wrong.stderr) == (0, 2, False)


def test_a_terminal_that_takes_ascii_alone_gets_replacement_characters(folder: Path) -> None:
    ended = shell(folder, f"{HPC} status runs/é", PYTHONIOENCODING="ascii")
    assert (ended.returncode, "runs/?" in ended.stderr, "job.json" in ended.stderr) == (2, True, True)


def test_following_a_run_ends_when_nobody_reads(folder: Path) -> None:
    command = (
        f"{ECHO} --name slow --sampling.max-new-tokens 4000 2>log & pid=$!; "
        f"until grep -q generate log; do :; done; timeout 20 {HPC} status --follow runs/slow 2>&1 | true; "
        "code=${PIPESTATUS[0]}; kill $pid; wait $pid; exit $code"
    )
    assert shell(folder, command, ECHO_STEPS_PER_S="5", TTY_COMPATIBLE="1").returncode == 0
