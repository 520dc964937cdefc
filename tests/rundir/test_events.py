"""A rank's events: spans of what it does, few and soon on the disk."""

import contextlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from hpc.rundir.events import MIN_SPAN_S, Events

T = 1_700_000_000.0


class Written:
    """Events, and what stands in their file while they are open."""

    def __init__(self, path: Path) -> None:
        self.events, self._path = Events(path), path

    @property
    def spans(self) -> list[tuple[str, float]]:
        """Kind and beginning of each span, from `T`."""
        lines: list[dict[str, Any]] = [json.loads(line) for line in self._path.read_text().splitlines()]
        return [(line["kind"], round(line["began"] - T, 3)) for line in lines if line["phase"] == "span"]


@pytest.fixture
def written(tmp_path: Path) -> Iterator[Written]:
    made = Written(tmp_path / "events")
    with contextlib.closing(made.events):
        yield made


def pull(written: Written, *pulls: tuple[float, bool]) -> None:
    """Have the engine ask at times, where it must wait or not."""
    for at, waiting in pulls:
        written.events.wait(waiting, T + at)


def test_a_span_is_on_the_disk_when_it_begins(written: Written) -> None:
    written.events.span("load", T + 3)
    assert written.spans == [("load", 3)]


def test_what_was_done_within_a_span_is_followed_by_the_rest_of_it(written: Written) -> None:
    written.events.span("load", T)
    written.events.within([("import", T + 1, T + 2), ("build", T + 4, T + 6)])
    assert written.spans == [("load", 0), ("import", 1), ("load", 2), ("build", 4), ("load", 6)]


def test_what_took_next_to_nothing_is_no_span(written: Written) -> None:
    written.events.span("load", T)
    written.events.within([("import", T + 1, T + 1 + MIN_SPAN_S / 2)])
    assert written.spans == [("load", 0)]


def test_a_wait_begins_when_the_engine_first_asked_in_vain(written: Written) -> None:
    written.events.span("generate", T)
    pull(written, (1, True), (1.04, True), (1.2, True), (3, False))
    assert written.spans == [("generate", 0), ("wait", 1), ("generate", 3)]


def test_a_wait_that_goes_on_is_on_the_disk_before_it_ends(written: Written) -> None:
    written.events.span("generate", T)
    pull(written, (1, True), (2, True))
    assert written.spans[-1] == ("wait", 1)


def test_a_short_wait_is_no_span(written: Written) -> None:
    written.events.span("generate", T)
    pull(written, (1, True), (1.01, True), (1.02, False), (5, True), (5.01, False))
    assert written.spans == [("generate", 0)]


def test_waits_without_number_make_a_bounded_number_of_spans(written: Written) -> None:
    written.events.span("generate", T)
    for turn in range(20_000):  # 0.1 s of waiting each 0.2 s, for more than an hour
        pull(written, (0.2 * turn, True), (0.2 * turn + 0.1, True), (0.2 * turn + 0.11, False))
    assert 100 < len(written.spans) < 2 * 256


def test_who_is_idle_at_the_end_does_not_wait(written: Written) -> None:
    written.events.span("generate", T)
    pull(written, (1, True))
    written.events.span("follow", T + 2)
    pull(written, (3, True), (9, True))
    assert written.spans == [("generate", 0), ("follow", 2)]
