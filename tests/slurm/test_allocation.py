"""What is asked of Slurm is checked where it is said; what Slurm says of its time and its jobs is read right."""

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hpc.job import EARLY_SIGNAL_S, Share, Slurm, check_time
from hpc.slurm.allocation import Allocation, seconds


@pytest.mark.parametrize("name", ["nodes", "tasks_per_node", "gpus_per_node", "cpus_per_task", "time_min"])
@pytest.mark.parametrize("value", [0, -1])
def test_less_than_one_is_refused(name: str, value: int) -> None:
    values: dict[str, Any] = {name: value}
    with pytest.raises(ValueError, match=rf'^"slurm\.{name}" is {value}; it must be at least 1$'):
        Slurm(**values)


@pytest.mark.parametrize(("name", "value"), [("array", -1), ("max_requeues", -1), ("signal_delay_s", 0)])
def test_less_than_the_least_is_refused(name: str, value: int) -> None:
    values: dict[str, Any] = {name: value}
    with pytest.raises(ValueError, match=rf'^"slurm\.{name}" is {value}; it must be at least {value + 1}$'):
        Slurm(**values)


@pytest.mark.parametrize("asked", [{"nodes": 2}, {"tasks_per_node": 4}])
def test_an_array_of_jobs_of_several_ranks_is_refused(asked: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="each job of an array is one rank: leave nodes and tasks_per_node out"):
        Slurm(array=8, **asked)


def test_an_array_of_jobs_of_one_rank_is_not_refused() -> None:
    assert Slurm(array=8, nodes=1, tasks_per_node=1).array == 8


def test_a_time_limit_too_near_to_the_signal_is_refused_with_the_least_that_will_do() -> None:
    with pytest.raises(ValueError, match=r'"slurm\.time_min" is 3, .* 120 s before the end, .*at least 4 minutes'):
        Slurm(time_min=3)


def test_a_smaller_delay_lets_a_shorter_time_limit_be() -> None:
    assert Slurm(time_min=3, signal_delay_s=60).time_min == 3


@given(st.integers(1, 10_000), st.integers(1, 100_000))
def test_a_time_limit_is_refused_exactly_if_the_signal_could_come_in_the_first_minute(minutes: int, delay: int) -> None:
    first_minute_is_safe = 60 * minutes - delay - EARLY_SIGNAL_S >= 60
    try:
        check_time(minutes, delay)
    except ValueError:
        assert not first_minute_is_safe
    else:
        assert first_minute_is_safe


@given(st.integers(1, 10_000), st.integers(1, 100_000))
def test_the_least_time_limit_that_a_refusal_names_is_accepted_and_one_minute_less_is_not(
    minutes: int, delay: int
) -> None:
    try:
        check_time(minutes, delay)
    except ValueError as error:
        least = int(str(error).partition("at least ")[2].split()[0])
        check_time(least, delay)
        with pytest.raises(ValueError, match="ask for at least"):
            check_time(least - 1, delay)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("0:00", 0),
        ("0:59", 59),
        ("59:58", 3598),
        ("1:00:00", 3600),
        ("23:59:59", 86399),
        ("1-00:00:00", 86400),
        ("100-01:02:03", 100 * 86400 + 3723),
        ("  4:05\n", 245),
    ],
)
def test_the_time_that_squeue_prints_is_read_in_seconds(text: str, expected: int) -> None:
    assert seconds(text) == expected


@pytest.mark.parametrize("text", ["UNLIMITED", "INVALID", "NOT_SET", "N/A", "", "-1:00", "1:2:3:4", "1-", ":30", "1.5"])
def test_what_is_no_time_is_none(text: str) -> None:
    assert seconds(text) is None


@given(st.integers(0, 400), st.integers(0, 23), st.integers(0, 59), st.integers(0, 59))
def test_any_time_is_read_as_it_was_written(days: int, hours: int, minutes: int, rest: int) -> None:
    total = ((days * 24 + hours) * 60 + minutes) * 60 + rest
    assert seconds(f"{days}-{hours:02d}:{minutes:02d}:{rest:02d}") == total
    assert seconds(f"{days * 24 + hours}:{minutes:02d}:{rest:02d}") == total


@given(st.text())
def test_no_text_makes_reading_a_time_fail(text: str) -> None:
    found = seconds(text)
    assert found is None or found >= 0


def test_no_text_is_no_share() -> None:
    assert Share.of("") is None


@given(st.integers(0, 10_000), st.integers(1, 10_000))
def test_a_share_is_an_index_below_a_count(index: int, count: int) -> None:
    if index < count:
        assert Share.of(f"{index}/{count}") == Share(index, count)
    else:
        with pytest.raises(ValueError, match='"share" is'):
            Share.of(f"{index}/{count}")


@pytest.mark.parametrize("text", ["3", "/", "3/", "/8", "8/8", "-1/8", "1/2/3", "a/b", "0/0", " 1/2"])
def test_what_is_no_share_is_refused_with_an_example(text: str) -> None:
    with pytest.raises(ValueError, match="it must be an index and a count, from 0/8 to 7/8 for eight shares"):
        Share.of(text)


def test_outside_of_a_slurm_job_there_is_no_allocation() -> None:
    assert Allocation.of({"PATH": "/bin", "SLURM_CONF": "/etc/slurm/slurm.conf"}) is None


def test_a_job_that_was_never_requeued_has_restarted_0_times() -> None:
    assert Allocation.of({"SLURM_JOB_ID": "7"}) == Allocation("7", 0, None)


def test_a_requeued_job_says_how_often() -> None:
    assert Allocation.of({"SLURM_JOB_ID": "7", "SLURM_RESTART_COUNT": "3"}) == Allocation("7", 3, None)


def test_an_element_of_an_array_has_an_id_of_its_own_and_that_of_the_whole() -> None:
    found = Allocation.of({"SLURM_JOB_ID": "9", "SLURM_ARRAY_JOB_ID": "7", "SLURM_ARRAY_TASK_ID": "1"})
    assert found is not None
    assert (found.job_id, found.submitted_id) == ("7_1", "7")


def test_the_end_of_the_job_is_the_variables() -> None:
    assert Allocation.of({"SLURM_JOB_ID": "7", "SLURM_JOB_END_TIME": "1700000000"}) == Allocation("7", 0, 1.7e9)


@pytest.mark.parametrize("text", ["", "N/A", "Unknown", "2026-11-22T12:00:00"])
def test_an_end_that_is_no_number_is_not_known(text: str) -> None:
    found = Allocation.of({"SLURM_JOB_ID": "7", "SLURM_JOB_END_TIME": text})
    assert found is not None
    assert found.ends_at is None
