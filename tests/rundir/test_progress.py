"""How far a run is, in figures for programs and words for people."""

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest

from hpc.engine.steps import StepTotals
from hpc.rundir.events import Events
from hpc.rundir.progress import Progress, Work, describe, duration, left, overall

WORK = Work(rows=1000, refused=10, done=90, requests=900, duplicates=0)


def events(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0, "0 s"),
        (41.4, "41 s"),
        (59.4, "59 s"),
        (59.6, "1 min 00 s"),
        (200, "3 min 20 s"),
        (3599.6, "1 h 00 min"),
        (7500, "2 h 05 min"),
        (360_000, "100 h 00 min"),
    ],
)
def test_a_duration_is_written_for_people(seconds: float, text: str) -> None:
    assert duration(seconds) == text


def test_counts_of_all_ranks_are_added_up() -> None:
    one = Progress(1, 2, 3, 4, 5, guessed_tokens=6, accepted_tokens=7)
    other = Progress(10, 20, 30, 40, 50, guessed_tokens=60, accepted_tokens=70)
    assert overall({0: one, 7: other}) == Progress(11, 22, 33, 44, 55, guessed_tokens=66, accepted_tokens=77)


def test_what_the_steps_of_all_ranks_computed_is_added_up() -> None:
    one = StepTotals(1, 2, 3, 4, 5.5, 6, 7, 8.5, 9.5)
    other = StepTotals(10, 20, 30, 40, 50.5, 60, 70, 80.5, 90.5)
    total = overall({0: Progress(totals=one), 7: Progress(totals=other)})
    assert total.totals == StepTotals(11, 22, 33, 44, 56.0, 66, 77, 89.0, 100.0)


EVENT = {
    "rows": 1, "errors": 2, "requests": 3, "prompt_tokens": 4, "generated_tokens": 5, "guessed_tokens": 6,
    "accepted_tokens": 7, "steps": 8, "step_tokens": 9, "step_prompt": 10, "step_chosen": 11, "step_pairs": 12.5,
    "step_kv": 13, "cached_tokens": 14, "prefill_s": 15.5, "decode_s": 16.5, "load_s": 17.5, "gpu": "GPU-1",
    "busy_s": 18.5, "waited_s": 19.5, "began": 20.5, "ended": 21.5, "engine": "native",
}  # fmt: skip


def test_events_have_their_figures_side_by_side_and_are_read_as_they_were_written() -> None:
    assert list(Progress.from_json(EVENT).as_json().items()) == list(EVENT.items())


def test_an_event_of_before_is_read_with_zeros_for_what_it_lacks() -> None:
    assert Progress.from_json({"phase": "generate", "rows": 3, "steps": 2}) == Progress(rows=3, totals=StepTotals(2))


def test_a_run_began_when_its_first_rank_did() -> None:
    assert overall({0: Progress(), 1: Progress(began=7), 2: Progress(began=5)}).began == 5


@pytest.mark.parametrize(
    ("total", "text"),
    [
        (Progress(), "100 of 1,000 rows (10%)"),
        (Progress(began=50), "100 of 1,000 rows (10%)"),
        (Progress(began=50, generated_tokens=100_000), "100 of 1,000 rows (10%), 2,000 tokens/s"),
        (Progress(began=50, generated_tokens=100_000, rows=44), "144 of 1,000 rows (14%), 2,000 tokens/s"),
        (Progress(began=98, generated_tokens=1_000, rows=100), "200 of 1,000 rows (20%), 500 tokens/s"),
        (
            Progress(began=50, generated_tokens=100_000, rows=100),
            "200 of 1,000 rows (20%), 2,000 tokens/s, about 6 min 40 s left",
        ),
        (Progress(began=50, generated_tokens=500, rows=900), "1,000 of 1,000 rows (100%), 10 tokens/s"),
    ],
)
def test_a_run_is_described_by_its_rows_rate_and_rest(total: Progress, text: str) -> None:
    assert describe(WORK, total, now=100) == text


def test_an_event_has_its_time_phase_and_values(tmp_path: Path) -> None:
    written = Events(tmp_path / "events")
    written.write("plan", asdict(WORK))
    [event] = events(tmp_path / "events")
    written.close()
    assert (event.pop("phase"), event.pop("time") > 0, event) == ("plan", True, asdict(WORK))


def test_the_first_tick_writes_the_progress(tmp_path: Path) -> None:
    written = Events(tmp_path / "events")
    written.tick("generate", Progress(rows=3))
    [event] = events(tmp_path / "events")
    written.close()
    assert (event["phase"], event["rows"]) == ("generate", 3)


def test_ticks_are_not_all_written(tmp_path: Path) -> None:
    written = Events(tmp_path / "events")
    for _ in range(1000):
        written.tick("generate", Progress())
    written.close()
    assert len(events(tmp_path / "events")) < 500


@pytest.mark.parametrize(
    ("total", "text"),
    [
        (Progress(), "100 of 1,000 rows (10%), 5 min 00 s left as predicted"),
        (Progress(began=98, rows=2), "102 of 1,000 rows (10%), 5 min 00 s left as predicted"),
        (Progress(began=50, rows=100), "200 of 1,000 rows (20%), about 6 min 40 s left"),
        (Progress(began=50, rows=900), "1,000 of 1,000 rows (100%)"),
    ],
)
def test_until_its_own_rows_tell_the_rest_of_a_run_is_what_was_predicted(total: Progress, text: str) -> None:
    assert describe(WORK, total, now=100, expected_end=400) == text


def test_a_prediction_that_is_past_is_not_repeated() -> None:
    assert describe(WORK, Progress(began=98, rows=1), now=100, expected_end=99) == "101 of 1,000 rows (10%)"


def test_a_run_that_was_stopped_at_its_first_rows_does_not_say_how_long_the_rest_takes() -> None:
    assert left(WORK, Progress(began=98, rows=5), now=100).endswith("; 895 left")
