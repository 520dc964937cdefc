"""Before a time limit nothing is begun that would not end by it; without one everything is."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hpc.executor.deadline import Deadline


class Clock:
    """A clock that goes when it is told to."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


def paced(clock: Clock, seconds_left: float | None, *paces: float) -> Deadline:
    """Make a deadline that knows requests of 100 tokens which took so many seconds a token."""
    deadline = Deadline(seconds_left, clock)
    for pace in paces:
        deadline.note(0, 100, 100 * pace)
    return deadline


def most_tokens(deadline: Deadline) -> int:
    """The longest request that is admitted."""
    return max(tokens for tokens in range(2000) if deadline.admits(0, tokens))


def test_without_a_deadline_everything_is_admitted(clock: Clock) -> None:
    deadline = paced(clock, None, 100.0, 100.0)
    clock.now += 1e9
    assert deadline.admits(10**9, 10**9)


def test_without_a_deadline_it_never_passes(clock: Clock) -> None:
    deadline = Deadline(None, clock)
    clock.now += 1e9
    assert not deadline.passed


def test_a_deadline_has_not_passed_before_its_time(clock: Clock) -> None:
    deadline = Deadline(60, clock)
    clock.now += 59.9
    assert not deadline.passed


@pytest.mark.parametrize("late", [0.0, 1.0, 1e6])
def test_a_deadline_has_passed_from_its_time_on(clock: Clock, late: float) -> None:
    deadline = Deadline(60, clock)
    clock.now += 60 + late
    assert deadline.passed


def test_a_deadline_may_have_passed_from_the_start(clock: Clock) -> None:
    assert Deadline(-5, clock).passed


@pytest.mark.parametrize("paces", [(), (1e-6,), (1e-6, 1e-6)])
def test_after_the_deadline_nothing_is_admitted(clock: Clock, paces: tuple[float, ...]) -> None:
    deadline = paced(clock, 60, *paces)
    clock.now += 60
    assert not deadline.admits(0, 1)


@pytest.mark.parametrize("paces", [(), (1e6,)])
def test_before_there_is_a_pace_it_is_tried(clock: Clock, paces: tuple[float, ...]) -> None:
    assert paced(clock, 60, *paces).admits(10**6, 10**6)


def test_what_fits_is_admitted_and_what_does_not_is_not(clock: Clock) -> None:
    deadline = paced(clock, 100, 1.0, 1.0, 1.0)
    assert (deadline.admits(0, 70), deadline.admits(0, 90)) == (True, False)


def test_what_fitted_does_not_fit_any_more_when_time_has_gone(clock: Clock) -> None:
    deadline = paced(clock, 100, 1.0, 1.0)
    clock.now += 50
    assert (deadline.admits(0, 30), deadline.admits(0, 70)) == (True, False)


def test_a_faster_pace_admits_more(clock: Clock) -> None:
    assert most_tokens(paced(clock, 100, 0.5, 0.5)) > most_tokens(paced(clock, 100, 1.0, 1.0))


def test_a_pace_that_has_become_faster_admits_more(clock: Clock) -> None:
    deadline = paced(clock, 100, *[1.0] * 10)
    before = most_tokens(deadline)
    for _ in range(64):
        deadline.note(0, 100, 10)
    assert most_tokens(deadline) > before


def test_one_slow_request_among_many_is_not_the_pace(clock: Clock) -> None:
    steady = paced(clock, 100, *[1.0] * 30)
    assert most_tokens(paced(clock, 100, *[1.0] * 29, 50.0)) == most_tokens(steady)


def test_where_many_requests_are_slow_theirs_is_the_pace(clock: Clock) -> None:
    slow = paced(clock, 100, *[1.0] * 30)
    assert most_tokens(paced(clock, 100, *[0.1] * 24, *[1.0] * 6)) == most_tokens(slow)


def test_a_long_prompt_counts_too(clock: Clock) -> None:
    deadline = paced(clock, 100, 1.0, 1.0)
    assert (deadline.admits(0, 70), deadline.admits(1000, 70)) == (True, False)


def test_a_request_that_generated_nothing_counts_as_one_token(clock: Clock) -> None:
    deadline = Deadline(100, clock)
    for _ in range(2):
        deadline.note(0, 0, 1.0)
    assert (deadline.admits(0, 70), deadline.admits(0, 90)) == (True, False)


requests = st.tuples(st.integers(0, 100_000), st.integers(1, 100_000))


@given(st.lists(st.tuples(requests, st.floats(0, 1e5)), max_size=80), requests, requests, st.floats(-10, 1e6))
def test_what_asks_for_less_is_admitted_wherever_what_asks_for_more_is(
    noted: list[tuple[tuple[int, int], float]], one: tuple[int, int], other: tuple[int, int], left: float
) -> None:
    deadline = Deadline(left, Clock())
    for (prompt, new), took in noted:
        deadline.note(prompt, new, took)
    less = (min(one[0], other[0]), min(one[1], other[1]))
    assert deadline.admits(*less) or not deadline.admits(*one)
