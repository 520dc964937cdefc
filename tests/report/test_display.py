"""What is shown while a run generates."""

import logging
from logging.handlers import QueueHandler
from queue import SimpleQueue
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
