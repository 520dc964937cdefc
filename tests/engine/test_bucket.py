"""Buckets pad the least that so many buckets can, and every prompt fits its own."""

from itertools import combinations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hpc.engine.bucket import MAX_DISTINCT, assign, boundaries

LENGTHS = st.lists(st.integers(1, 60), min_size=1, max_size=40)


def padded(lengths: list[int], bucket_lengths: list[int]) -> int:
    """Tokens after padding, counted one by one."""
    return sum(min(bound for bound in bucket_lengths if bound >= length) for length in lengths)


@settings(deadline=None)
@given(lengths=st.lists(st.integers(1, 25), min_size=1, max_size=30), num_buckets=st.integers(1, 5))
def test_no_other_boundaries_pad_less(lengths: list[int], num_buckets: int) -> None:
    distinct = sorted(set(lengths))
    choices = combinations(distinct[:-1], min(num_buckets, len(distinct)) - 1)
    best = min(padded(lengths, [*choice, distinct[-1]]) for choice in choices)
    assert padded(lengths, boundaries(np.array(lengths), num_buckets).tolist()) == best


@settings(deadline=None)
@given(lengths=LENGTHS, num_buckets=st.integers(1, 8))
def test_there_are_at_most_so_many_boundaries_and_they_ascend(lengths: list[int], num_buckets: int) -> None:
    found = boundaries(np.array(lengths), num_buckets).tolist()
    assert len(found) <= num_buckets
    assert found == sorted(set(found))


@settings(deadline=None)
@given(lengths=LENGTHS, num_buckets=st.integers(1, 8))
def test_every_length_is_assigned_the_smallest_bucket_it_fits(lengths: list[int], num_buckets: int) -> None:
    found = boundaries(np.array(lengths), num_buckets)
    expected = [min(bound for bound in found.tolist() if bound >= length) for length in lengths]
    assert assign(np.array(lengths), found).tolist() == expected


def test_the_last_boundary_is_the_longest_length() -> None:
    assert boundaries(np.array([3, 90, 7, 41]), 2).tolist()[-1] == 90


def test_as_many_buckets_as_lengths_pad_nothing() -> None:
    assert boundaries(np.array([5, 5, 9, 2]), 3).tolist() == [2, 5, 9]


def test_no_lengths_have_no_boundaries() -> None:
    assert boundaries(np.array([], dtype=np.int64), 4).tolist() == []


@pytest.mark.parametrize("distinct", [MAX_DISTINCT, MAX_DISTINCT + 1, 3 * MAX_DISTINCT])
def test_every_one_of_very_many_lengths_fits_its_bucket(distinct: int) -> None:
    lengths = np.arange(1, distinct + 1)
    assert (assign(lengths, boundaries(lengths, 4)) >= lengths).all()


@pytest.mark.parametrize("distinct", [MAX_DISTINCT + 1, 3 * MAX_DISTINCT - 1])
def test_rounding_very_many_lengths_adds_less_than_a_step(distinct: int) -> None:
    lengths = np.arange(1, distinct + 1)
    step = -(-distinct // MAX_DISTINCT)
    assert 0 <= boundaries(lengths, 4)[-1] - distinct < step


def test_very_many_even_lengths_are_cut_into_even_buckets() -> None:
    lengths = np.arange(1, 2 * MAX_DISTINCT + 1)
    assert boundaries(lengths, 4).tolist() == [2048, 4096, 6144, 8192]


def test_no_buckets_are_refused() -> None:
    with pytest.raises(ValueError, match="num_buckets is 0; it must be at least 1"):
        boundaries(np.array([1]), 0)
