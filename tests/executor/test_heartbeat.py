"""What every rank does between two steps of its engine."""

import contextlib
import json
from pathlib import Path

from hpc.executor.heartbeat import Every, Heartbeat
from hpc.mpi.signals import Stop
from hpc.output.journal import JournalWriter
from hpc.rundir.events import Events
from hpc.rundir.progress import Progress


def beat(tmp_path: Path) -> tuple[bool, list[str]]:
    """Make one step at which a message says stop; return whether the rank is to stop, and what was done in turn."""
    stop, calls = Stop(), list[str]()

    def serve() -> None:
        calls.append("serve")
        stop.request("a message said so")

    with contextlib.closing(Events(tmp_path / "events")) as events:
        journal = JournalWriter(tmp_path / "journal")
        return Heartbeat(stop, serve, journal, events, Progress(rows=3), lambda: calls.append("report"))(), calls


def test_messages_are_dealt_with_before_a_rank_says_how_far_it_is(tmp_path: Path) -> None:
    assert beat(tmp_path)[1] == ["serve", "report"]


def test_a_stop_that_a_message_brings_holds_at_this_step(tmp_path: Path) -> None:
    assert beat(tmp_path)[0]


def test_the_progress_of_a_rank_gets_into_its_events(tmp_path: Path) -> None:
    beat(tmp_path)
    [event] = (tmp_path / "events").read_text().splitlines()
    assert (json.loads(event)["phase"], json.loads(event)["rows"]) == ("generate", 3)


def test_what_is_done_once_in_a_while_is_done_at_first_and_not_again_at_once() -> None:
    calls: list[str] = []
    now_and_then = Every(3600.0, lambda: calls.append("done"))
    for _ in range(5):
        now_and_then()
    assert calls == ["done"]
