"""Cancel stops what runs on this machine, and loses nothing."""

from pathlib import Path

from tests.conftest import Ended, Scattergen, finish, scattergen, start_echo, write_corpus

ROWS = [{"prompt": f"row {index}", "sampling": {"max_new_tokens": 2 + index}} for index in range(30)]


def cancelled(tmp_path: Path, ranks: int) -> tuple[Ended, Ended]:
    """Cancel a run half-way; return what cancel and the run said."""
    corpus = write_corpus(tmp_path / "c.jsonl", ROWS)
    running = start_echo(tmp_path, corpus, ranks=ranks, ECHO_STEPS_PER_S="10")
    assert running.stderr is not None
    while "requests to generate" not in (line := running.stderr.readline()):
        assert line, "it ended too soon"
    said = scattergen("cancel", str(tmp_path / "runs" / "c"))
    return said, finish(running)


def test_a_run_in_one_process_is_stopped(tmp_path: Path) -> None:
    said, ended = cancelled(tmp_path, 0)
    assert (said.code, said.out, ended.code) == (0, f"{tmp_path}/runs/c: drained\n", 75)


def test_a_run_under_mpirun_is_stopped_on_all_ranks(tmp_path: Path) -> None:
    said, ended = cancelled(tmp_path, 2)
    assert (said.code, said.out, ended.code) == (0, f"{tmp_path}/runs/c: drained\n", 75)


def test_a_cancelled_run_goes_on_when_it_is_run_again(tmp_path: Path, echo: Scattergen) -> None:
    cancelled(tmp_path, 0)
    assert echo(tmp_path / "c.jsonl").code == 0
    assert not (tmp_path / "runs" / "c" / "cancelled").exists()


def test_where_nothing_runs_nothing_is_done(tmp_path: Path, echo: Scattergen) -> None:
    echo(write_corpus(tmp_path / "c.jsonl", ROWS[:1]))
    said = scattergen("cancel", str(tmp_path / "runs" / "c"))
    assert (said.code, "done" in said.out) == (0, True)
    assert not (tmp_path / "runs" / "c" / "cancelled").exists()


def test_what_is_no_run_directory_is_refused(tmp_path: Path) -> None:
    assert scattergen("cancel", str(tmp_path)).code == 2
