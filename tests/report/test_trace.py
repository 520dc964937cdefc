"""The trace of a run: what Chrome's trace format asks for, and every second of every rank."""

import json
from collections import defaultdict
from pathlib import Path
from typing import Any

import pytest

from hpc.report.read_events import read
from hpc.report.report import report
from hpc.report.trace import trace
from tests.report.test_timeline import DONE, write_run

Trace = list[dict[str, Any]]


@pytest.fixture
def events(tmp_path: Path) -> Trace:
    written: Trace = json.loads(trace(read(write_run(tmp_path / "run", DONE))))["traceEvents"]
    return written


def spans_of(events: Trace) -> dict[tuple[int, int], list[tuple[int, int]]]:
    """Return beginning and end of the spans of each thread, in their order."""
    found = defaultdict(list)
    for event in events:
        if event["ph"] == "X":
            found[event["pid"], event["tid"]].append((event["ts"], event["ts"] + event["dur"]))
    return found


def test_every_event_has_what_the_format_asks_for(events: Trace) -> None:
    wanted = {"M": {"name", "ph", "pid", "args"}, "C": {"name", "ph", "ts", "pid", "args"},
              "X": {"name", "ph", "ts", "dur", "pid", "tid"}}  # fmt: skip
    assert {event["ph"] for event in events} == set(wanted)
    for event in events:
        assert wanted[event["ph"]] <= set(event), event
        assert all(isinstance(event[name], int) for name in ("ts", "dur", "pid", "tid") if name in event), event


def test_a_rank_is_a_thread_with_its_name_in_the_process_of_its_attempt(events: Trace) -> None:
    names = {(e["name"], e["pid"], e["tid"]): e["args"]["name"] for e in events if "name" in e["args"]}
    assert names == {
        ("process_name", 1, 0): "attempt 1, done", ("thread_name", 1, 1): "rank 0", ("thread_name", 1, 2): "rank 1"
    }  # fmt: skip


def test_the_spans_of_a_thread_touch_and_do_not_overlap(events: Trace) -> None:
    found = spans_of(events)
    assert set(found) == {(1, 1), (1, 2)}
    for spans in found.values():
        assert [ended for _, ended in spans[:-1]] == [began for began, _ in spans[1:]]
        assert (spans[0][0], spans[-1][1]) == (0, 110_000_000)


def test_the_rates_are_those_of_all_ranks(events: Trace) -> None:
    rates = [event["args"]["all ranks"] for event in events if event["ph"] == "C"]
    assert sum(rates) * 110 / 240 == pytest.approx(1800, rel=0.01)


def test_a_report_writes_the_trace_beside_the_page(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = write_run(tmp_path / "run", DONE)
    assert report([run]) == 0
    assert json.loads((run / "trace.json").read_text())["traceEvents"]
    assert f"{run / 'trace.json'}" in capsys.readouterr().out
