"""Where the time of ranks went, from event files with known figures and from real runs."""

import json
import os
import signal
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from hpc.exit import Refusal
from hpc.report.read_events import read
from hpc.report.timeline import History
from tests.conftest import Scattergen, finish, start_echo, write_corpus

T = 1_700_000_000.0
"""When hand-written attempts begin."""

COUNTS = {
    "rows": 0, "errors": 0, "requests": 0, "prompt_tokens": 0, "generated_tokens": 0, "guessed_tokens": 0,
    "accepted_tokens": 0, "load_s": 0.0, "busy_s": 0.0, "waited_s": 0.0, "began": 0.0, "ended": 0.0,
}  # fmt: skip

Event = dict[str, Any]


def event(at: float, phase: str, **values: Any) -> Event:
    return {"time": T + at, "phase": phase, **values}


def counts(at: float, phase: str, began: float, ended: float, **values: Any) -> Event:
    return event(at, phase, **{**COUNTS, "began": T + began, "ended": T + ended, **values})


def plan(at: float, requests: int = 10) -> Event:
    return event(at, "plan", rows=12, refused=1, done=0, requests=requests, duplicates=1)


def write_run(path: Path, files: dict[str, list[Event]], state: str = "done", **summary: Any) -> Path:
    """Write a run directory with event files: {"0001-00000": [event, …]}."""
    (path / "events").mkdir(parents=True)
    for name, events in files.items():
        (path / "events" / f"{name}.jsonl").write_text("".join(json.dumps(e) + "\n" for e in events))
    job = {"model": "m", "engine": "native", "dtype": "auto"}
    (path / "job.json").write_text(json.dumps({"job": job, "bound": {"dtype": "float32"}}))
    (path / "state").write_text(state + "\n")
    if summary:
        (path / "summary.json").write_text(json.dumps(summary))
    return path


def begun(at: float, *kinds: tuple[str, float]) -> list[Event]:
    """Return the events, written at a time, of spans that began at times."""
    return [event(at, "span", kind=kind, began=T + began) for kind, began in kinds]


DONE = {
    "0001-00000": [
        event(0, "begin", slurm_job="77", restarts=0),
        *begun(0, ("other", 0)),
        event(2, "read"),
        *begun(2, ("read", 2)),
        *begun(10, ("other", 10)),
        plan(10),
        *begun(12, ("load", 12)),
        *begun(16, ("generate", 16)),
        counts(16, "generate", 16, 16, load_s=4.0),
        *begun(19, ("wait", 16), ("generate", 19)),
        *begun(50, ("wait", 48), ("generate", 50)),
        counts(50, "generate", 16, 48, load_s=4.0, waited_s=3.0, generated_tokens=640, requests=2, rows=2),
        *begun(90, ("idle", 90)),
        counts(101, "generated", 16, 90, load_s=4.0, waited_s=5.0, generated_tokens=1000, requests=5, rows=6),
        *begun(100, ("other", 100)),
        event(102, "merge"),
        *begun(102, ("merge", 102)),
        event(110, "done"),
    ],
    "0001-00001": [
        *begun(1, ("follow", -1)),
        *begun(12, ("load", 12)),
        *begun(20, ("generate", 20)),
        counts(20, "generate", 20, 20, load_s=8.0),
        *begun(100, ("follow", 100)),
        counts(101, "generated", 20, 100, load_s=8.0, waited_s=1.0, generated_tokens=800, requests=5, rows=5),
    ],
}  # fmt: skip
"""Two ranks: of 220 rank-seconds each second is known. Rank 1's waits are too short for spans."""


@pytest.fixture
def done(tmp_path: Path) -> History:
    return read(write_run(tmp_path / "run", DONE))


@pytest.mark.parametrize(
    ("kind", "seconds"),
    [("read", 16), ("load", 12), ("generate", 148), ("wait", 6), ("idle", 10), ("merge", 16), ("other", 12)],
)
def test_rank_seconds_go_to_what_the_events_say(done: History, kind: str, seconds: float) -> None:
    assert done.seconds[kind] == seconds


def test_importing_and_building_within_another_span_are_told_apart_from_it(tmp_path: Path) -> None:
    events = [
        *begun(0, ("load", 0)), *begun(9, ("import", 1), ("load", 3), ("build", 5), ("load", 8)), plan(9),
        *begun(10, ("generate", 10)), event(12, "drained"),
    ]  # fmt: skip
    seconds = read(write_run(tmp_path / "run", {"0001-00000": events}, "drained")).seconds
    assert [seconds[kind] for kind in ("load", "import", "build", "generate")] == [5, 2, 3, 2]


def test_rank_seconds_add_up_to_ranks_times_wall_time(done: History) -> None:
    (attempt,) = done.attempts
    assert sum(done.seconds.values()) == 2 * (attempt.ended - attempt.began) == 220


def test_the_spans_of_a_rank_follow_one_another_without_a_gap(done: History) -> None:
    (attempt,) = done.attempts
    for rank in attempt.ranks:
        times = [time for span in rank.spans for time in (span.began, span.ended)]
        assert times[1:-1:2] == times[2::2]
        assert (times[0], times[-1]) == (attempt.began, attempt.ended)


def test_waits_are_where_their_spans_are(done: History) -> None:
    waits = [(s.began - T, s.ended - T) for s in done.attempts[0].ranks[0].spans if s.kind == "wait"]
    assert waits == [(16, 19), (48, 50)]


def test_waits_too_short_for_a_span_are_waiting_all_the_same(done: History) -> None:
    assert done.attempts[0].ranks[1].seconds["wait"] == 1


def test_a_rank_that_follows_does_what_rank_0_does_and_is_idle_while_that_generates(tmp_path: Path) -> None:
    events = {
        "0001-00000": [
            event(0, "begin", ranks=2), *begun(0, ("convert", 0), ("read", 1), ("load", 3), ("generate", 6)),
            *begun(10, ("idle", 10), ("other", 11), ("gather", 12), ("merge", 14)), event(20, "done"),
        ],
        "0001-00001": begun(0, ("follow", 0)),
    }  # fmt: skip
    seconds = read(write_run(tmp_path / "run", events)).attempts[0].ranks[1].seconds
    assert {kind: value for kind, value in seconds.items() if value} == {
        "convert": 1, "read": 2, "idle": 8, "other": 1, "gather": 2, "merge": 6,
    }  # fmt: skip


def test_what_a_killed_rank_was_doing_goes_on_to_the_latest_event(tmp_path: Path) -> None:
    events = {"0001-00000": [*begun(0, ("read", 0)), plan(5), *begun(6, ("load", 6)), event(30, "generate", began=0)]}
    seconds = read(write_run(tmp_path / "run", events, "running")).seconds
    assert (seconds["read"], seconds["load"]) == (6, 24)


def test_of_an_earlier_version_without_spans_loading_generating_and_waiting_are_known(tmp_path: Path) -> None:
    files = {name: [e for e in events if e["phase"] != "span"] for name, events in DONE.items()}
    (attempt,) = read(write_run(tmp_path / "run", files)).attempts
    assert [attempt.seconds[kind] for kind in ("load", "generate", "wait")] == [12, 148, 6]
    assert (sum(attempt.seconds.values()), attempt.told) == (220, False)


def test_tokens_per_second_add_up_to_the_tokens(done: History) -> None:
    edges = np.linspace(0, 110, 12)
    assert np.sum(done.attempts[0].rates(edges) * 10) == pytest.approx(1800)


def test_a_rate_is_what_the_ranks_counted_between_two_events(done: History) -> None:
    rate = done.attempts[0].rates(np.array([20.0, 48.0]))[0]
    assert rate == pytest.approx(640 / 32 + 10)


def test_an_attempt_knows_its_slurm_job(done: History) -> None:
    assert done.attempts[0].slurm_job == "77"


def test_an_attempt_began_with_rank_0s_first_span(tmp_path: Path) -> None:
    earlier = {**DONE, "0001-00000": [*begun(0, ("other", -5)), *DONE["0001-00000"]]}
    run = read(write_run(tmp_path / "run", earlier))
    assert (run.attempts[0].began, sum(run.seconds.values())) == (T - 5, 230)


def test_ranks_that_had_nothing_to_generate_count_as_ranks(tmp_path: Path) -> None:
    events = {"0001-00000": [event(0, "begin", ranks=4), plan(1, 0), *begun(2, ("merge", 2)), event(3, "done")]}
    run = read(write_run(tmp_path / "run", events))
    assert (len(run.attempts[0].ranks), sum(run.seconds.values()), run.seconds["merge"]) == (4, 12, 4)


def test_an_attempt_without_an_end_is_interrupted_and_its_ranks_generated_until_its_latest_event(
    tmp_path: Path,
) -> None:
    files = {
        "0001-00000": [e for e in DONE["0001-00000"] if e["time"] <= T + 50],
        "0001-00001": DONE["0001-00001"][:4],
    }
    (attempt,) = read(write_run(tmp_path / "run", files, "running")).attempts
    assert (attempt.ending, attempt.ended, attempt.seconds["idle"]) == ("interrupted", T + 50, 0)
    assert attempt.seconds["generate"] == (50 - 16 - 5) + (50 - 20)


STEPS = {"steps": 100, "step_tokens": 5000, "step_prompt": 4000, "step_chosen": 1000, "step_kv": 20_000}
PREDICTED = {
    "low_s": 70.0, "seconds": 80.0, "high_s": 95.0, "token_bytes": 1000,
    "size": {"weight_bytes": 10**9, "token_flops": 2e8, "choice_flops": 1e7, "memory_bytes": 10**10},
    "speed": {"bytes_per_s": 1e10, "flops_per_s": 1e11},
}  # fmt: skip


def attempt_with_steps(path: Path, **values: Any) -> History:
    events = [
        plan(0),
        *begun(0, ("other", 0), ("generate", 1)),
        event(1, "load", **PREDICTED),
        counts(61, "generated", 1, 61, requests=10, prompt_tokens=4500, **STEPS, **values),
        *begun(61, ("other", 61)),
        event(62, "merge"),
        *begun(70, ("merge", 62), ("gather", 62), ("merge", 65)),
        event(70, "done"),
    ]
    return read(write_run(path / "run", {"0001-00000": events}))


def test_prefill_and_decode_are_told_apart_where_the_engine_does(tmp_path: Path) -> None:
    run = attempt_with_steps(tmp_path, prefill_s=30.0, decode_s=25.0)
    assert [run.seconds[kind] for kind in ("prefill", "decode", "generate")] == [30, 25, 5]


def test_prefill_and_decode_are_no_more_than_what_was_generated(tmp_path: Path) -> None:
    run = attempt_with_steps(tmp_path, prefill_s=40.0, decode_s=40.0)
    assert [run.seconds[kind] for kind in ("prefill", "decode", "generate")] == [30, 30, 0]


def test_waiting_for_the_records_of_other_ranks_is_gathering(tmp_path: Path) -> None:
    run = attempt_with_steps(tmp_path)
    assert (run.seconds["gather"], run.seconds["merge"]) == (3, 5)


def test_the_share_of_the_limit_is_the_longer_of_computing_and_reading(tmp_path: Path) -> None:
    # 5,000 tokens x 2e8 and 1,000 x 1e7 operations at 1e11/s; 100 x 1e9 and 20,000 x 1,000 bytes at 1e10/s
    run = attempt_with_steps(tmp_path, prefill_s=20.0, decode_s=20.0)
    assert run.attempts[0].limit_share == pytest.approx(max(10.1, 10.002) / 40)


def test_without_a_calibration_there_is_no_share_of_the_limit(done: History) -> None:
    assert done.attempts[0].limit_share is None


def test_the_attempts_of_a_run_are_one_history(tmp_path: Path) -> None:
    later = {
        name.replace("0001", "0002"): [{**e, "time": e["time"] + 500} for e in es[:3]] for name, es in DONE.items()
    }
    run = read(write_run(tmp_path / "run", {**DONE, **later}, "failed"))
    assert [(attempt.number, attempt.ending) for attempt in run.attempts] == [(1, "done"), (2, "failed")]


def test_the_shares_of_an_array_are_ranks_of_an_attempt_with_times_of_their_own(tmp_path: Path) -> None:
    def share(begin: float, job: str) -> list[Event]:
        return [
            event(begin, "begin", slurm_job=job, restarts=0),
            plan(begin + 2),
            *begun(begin, ("other", begin), ("load", begin + 3), ("generate", begin + 4)),
            counts(begin + 9, "generated", begin + 4, begin + 9, load_s=1.0, requests=10, generated_tokens=50),
        ]

    (attempt,) = read(write_run(tmp_path / "run", {"0001-00001": share(0, "8"), "0001-00002": share(99, "9")})).attempts
    assert (attempt.ending, attempt.slurm_job, attempt.total.generated_tokens) == ("done", "8, 9", 100)
    assert (sum(attempt.seconds.values()), attempt.seconds["idle"]) == (18, 0)


def test_a_half_written_line_is_left_out_and_counted(tmp_path: Path) -> None:
    path = write_run(tmp_path / "run", DONE)
    with open(path / "events" / "0001-00001.jsonl", "a") as file:
        file.write('{"time": 17000')
    run = read(path)
    assert (run.damaged, sum(run.seconds.values())) == (1, 220)


@pytest.mark.parametrize(
    "line", ["no JSON", "3", '{"time": 1}', '{"time": null, "phase": "read"}', '{"phase": "read"}']
)
def test_a_line_that_is_no_event_is_left_out_and_counted(tmp_path: Path, line: str) -> None:
    path = write_run(tmp_path / "run", DONE)
    file = path / "events" / "0001-00000.jsonl"
    file.write_text(line + "\n" + file.read_text())
    assert (read(path).damaged, sum(read(path).seconds.values())) == (1, 220)


def test_clocks_that_disagree_leave_the_sums_right(tmp_path: Path) -> None:
    skewed = [
        {**e, **{name: e[name] + 30 for name in ("time", "began", "ended") if name in e}} for e in DONE["0001-00001"]
    ]
    run = read(write_run(tmp_path / "run", {**DONE, "0001-00001": skewed}))
    assert sum(run.seconds.values()) == 220


def test_a_lost_event_file_of_rank_0_leaves_the_rest_readable(tmp_path: Path) -> None:
    run = read(write_run(tmp_path / "run", {"0001-00001": DONE["0001-00001"]}))
    assert run.total.generated_tokens == 800


def test_a_folder_without_job_json_is_refused(tmp_path: Path) -> None:
    with pytest.raises(Refusal, match=r"is no run directory: it has no job\.json"):
        read(tmp_path)


def test_a_run_of_two_ranks_has_every_token_and_every_second(tmp_path: Path, echo: Scattergen) -> None:
    corpus = write_corpus(tmp_path / "c.jsonl", [{"prompt": f"row {i}"} for i in range(30)])
    assert echo(corpus, ranks=2).code == 0
    run = read(tmp_path / "runs" / "c")
    (attempt,) = run.attempts
    assert (attempt.ending, len(attempt.ranks), attempt.total.rows) == ("done", 2, 30)
    assert attempt.total.generated_tokens == run.summary["generated_tokens"]
    assert sum(attempt.seconds.values()) == pytest.approx(2 * (attempt.ended - attempt.began), abs=1e-4)


def test_a_run_that_was_killed_and_gone_on_with_has_two_attempts(tmp_path: Path, echo: Scattergen) -> None:
    corpus = write_corpus(tmp_path / "c.jsonl", [{"prompt": f"row {i}"} for i in range(40)])
    process = start_echo(tmp_path, corpus, ECHO_STEPS_PER_S="200")
    wait_for_tokens(tmp_path / "runs" / "c")
    assert [attempt.ending for attempt in read(tmp_path / "runs" / "c").attempts] == ["running"]
    os.killpg(process.pid, signal.SIGKILL)
    finish(process)
    assert [attempt.ending for attempt in read(tmp_path / "runs" / "c").attempts] == ["interrupted"]
    assert echo(corpus).code == 0
    assert [attempt.ending for attempt in read(tmp_path / "runs" / "c").attempts] == ["interrupted", "done"]


def test_a_run_that_was_stopped_is_drained(tmp_path: Path) -> None:
    corpus = write_corpus(tmp_path / "c.jsonl", [{"prompt": f"row {i}"} for i in range(40)])
    process = start_echo(tmp_path, corpus, ECHO_STEPS_PER_S="200")
    wait_for_tokens(tmp_path / "runs" / "c")
    process.send_signal(signal.SIGTERM)
    assert finish(process).code == 75
    assert [attempt.ending for attempt in read(tmp_path / "runs" / "c").attempts] == ["drained"]


def test_shares_of_a_real_run_are_all_done(tmp_path: Path, echo: Scattergen) -> None:
    corpus = write_corpus(tmp_path / "c.jsonl", [{"prompt": f"row {i}"} for i in range(12)])
    assert [echo(corpus, "--share", f"{index}/3").code for index in (2, 0, 1)] == [0, 0, 0]
    (attempt,) = read(tmp_path / "runs" / "c").attempts
    assert (attempt.ending, len(attempt.ranks), attempt.total.rows) == ("done", 3, 12)


def wait_for_tokens(run: Path, timeout_s: float = 60) -> None:
    """Wait until an attempt has told of tokens."""
    end = time.monotonic() + timeout_s
    while time.monotonic() < end:
        if (run / "job.json").exists() and read(run).total.generated_tokens:
            return
        time.sleep(0.1)
    pytest.fail(f"no tokens after {timeout_s} s")
