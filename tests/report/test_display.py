"""What is shown while a run generates."""

import logging
from logging.handlers import QueueHandler
from queue import SimpleQueue
from types import SimpleNamespace
from typing import Any

import pytest

from hpc.report import display
from hpc.rundir.progress import Progress, Work

WORK = Work(rows=10, refused=0, done=0, requests=10, duplicates=0)
RANKS = {0: Progress(rows=2), 1: Progress(rows=3)}


@pytest.mark.parametrize(("pause_s", "lines"), [(0.0, ["5 of 10 rows (50%)"]), (3600.0, [])])
def test_a_line_says_how_far_all_ranks_are_when_its_time_has_come(
    pause_s: float, lines: list[str], request: pytest.FixtureRequest
) -> None:
    said: SimpleQueue[Any] = SimpleQueue()
    handler, before = QueueHandler(said), display.LOGGER.level
    display.LOGGER.addHandler(handler)
    display.LOGGER.setLevel(logging.INFO)
    request.addfinalizer(lambda: (display.LOGGER.removeHandler(handler), display.LOGGER.setLevel(before)))
    display.Lines(pause_s).update(WORK, RANKS, None)
    assert [said.get().getMessage() for _ in range(said.qsize())] == lines


class ZMQInteractiveShell:
    """Called as Jupyter's is."""


class TerminalInteractiveShell:
    """Called as that of ipython on a terminal is."""


@pytest.mark.parametrize(
    ("shell", "is_one"), [(ZMQInteractiveShell(), True), (TerminalInteractiveShell(), False), (None, False)]
)
def test_a_notebook_is_known_by_its_shell(shell: object, is_one: bool) -> None:
    assert display.in_notebook({"IPython": SimpleNamespace(get_ipython=lambda: shell)}) is is_one


def test_a_process_without_ipython_is_no_notebook() -> None:
    assert not display.in_notebook({})


def test_nothing_is_shown_of_generating_where_nobody_looks(capsys: pytest.CaptureFixture[str]) -> None:
    shown = display.open_bar()
    shown.update(WORK, RANKS, None)
    shown.close()
    assert capsys.readouterr() == ("", "")
