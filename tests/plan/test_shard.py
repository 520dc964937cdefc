"""A plan loses and doubles nothing, is balanced within Graham's bound, and its tail is handed out to the end."""

from itertools import product

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hpc.plan.shard import deal, next_piece

COSTS = st.lists(st.integers(1, 50).map(float), max_size=30)
TAIL = st.sampled_from([0.0, 0.1, 0.15, 0.5, 0.9, 1.0])


def array(costs: list[float]) -> npt.NDArray[np.float64]:
    return np.array(costs, dtype=np.float64)


def one_bucket(costs: list[float]) -> npt.NDArray[np.int64]:
    return np.ones(len(costs), dtype=np.int64)


@settings(deadline=None)
@given(costs=COSTS, size=st.integers(1, 5), tail=TAIL, data=st.data())
def test_every_request_is_planned_exactly_once(costs: list[float], size: int, tail: float, data: st.DataObject) -> None:
    bucket_of = data.draw(st.lists(st.integers(1, 4), min_size=len(costs), max_size=len(costs)))
    planned = deal(array(costs), np.array(bucket_of, dtype=np.int64), size, tail)
    assert sorted(np.concatenate([*planned.shards, planned.tail]).tolist()) == list(range(len(costs)))


@settings(deadline=None)
@given(costs=COSTS, size=st.integers(1, 5), tail=TAIL)
def test_every_rank_has_a_shard_even_if_it_is_empty(costs: list[float], size: int, tail: float) -> None:
    assert len(deal(array(costs), one_bucket(costs), size, tail).shards) == size


@settings(deadline=None)
@given(costs=COSTS.filter(bool), size=st.integers(1, 5))
def test_no_rank_has_more_than_the_mean_and_part_of_the_dearest(costs: list[float], size: int) -> None:
    shards = deal(array(costs), one_bucket(costs), size, 0).shards
    # The request that ends last was begun when no rank had less than the mean of the others.
    assert max(array(costs)[shard].sum() for shard in shards) <= sum(costs) / size + (1 - 1 / size) * max(costs)


@settings(deadline=None, max_examples=50)
@given(costs=st.lists(st.integers(1, 20).map(float), min_size=1, max_size=7), size=st.integers(2, 3))
def test_the_makespan_is_within_grahams_bound_of_the_best(costs: list[float], size: int) -> None:
    best = min(
        max(sum(cost for cost, at in zip(costs, ranks, strict=True) if at == rank) for rank in range(size))
        for ranks in product(range(size), repeat=len(costs))
    )
    shards = deal(array(costs), one_bucket(costs), size, 0).shards
    assert max(array(costs)[shard].sum() for shard in shards) <= (4 / 3 - 1 / (3 * size)) * best + 1e-9


@settings(deadline=None)
@given(costs=COSTS.filter(bool), size=st.integers(2, 5), tail=st.sampled_from([0.1, 0.25, 0.5, 0.9]))
def test_the_tail_is_the_least_that_holds_its_share(costs: list[float], size: int, tail: float) -> None:
    kept_back = array(costs)[deal(array(costs), one_bucket(costs), size, tail).tail]
    share = tail * sum(costs)
    assert kept_back.sum() >= share - 1e-9
    assert kept_back.sum() - kept_back.max() < share + 1e-9


@settings(deadline=None)
@given(costs=COSTS, size=st.integers(2, 5), tail=TAIL)
def test_nothing_in_the_tail_is_dearer_than_what_is_dealt_out(costs: list[float], size: int, tail: float) -> None:
    planned = deal(array(costs), one_bucket(costs), size, tail)
    dealt = array(costs)[np.concatenate(planned.shards)]
    assert array(costs)[planned.tail].max(initial=0) <= dealt.min(initial=np.inf)


def test_one_rank_has_no_tail() -> None:
    assert len(deal(np.ones(10), one_bucket([1.0] * 10), 1, 0.5).tail) == 0


def test_a_tail_of_0_is_a_static_plan() -> None:
    assert len(deal(np.ones(10), one_bucket([1.0] * 10), 3, 0).tail) == 0


def test_a_tail_of_1_deals_nothing_out() -> None:
    planned = deal(np.ones(10), one_bucket([1.0] * 10), 3, 1)
    assert [len(shard) for shard in planned.shards] == [0, 0, 0]


@pytest.mark.parametrize("tail", [0.0, 1.0])
def test_a_shard_and_the_tail_take_buckets_longest_first_and_the_dearest_of_each_first(tail: float) -> None:
    costs, bucket_of = array([1, 5, 2, 4, 3]), np.array([10, 10, 20, 20, 5])
    planned = deal(costs, bucket_of, 2, tail) if tail else deal(costs, bucket_of, 1, tail)
    order = planned.tail if tail else planned.shards[0]
    assert order.tolist() == [3, 2, 1, 0, 4]


@settings(deadline=None)
@given(costs=COSTS.filter(bool), size=st.integers(1, 5))
def test_a_piece_is_one_request_or_at_most_half_a_fair_share(costs: list[float], size: int) -> None:
    count = next_piece(np.cumsum(array(costs)), size)
    assert 1 <= count <= len(costs)
    assert count == 1 or sum(costs[:count]) <= sum(costs) / (2 * size) + 1e-9


@settings(deadline=None)
@given(costs=COSTS.filter(bool), size=st.integers(1, 5))
def test_a_piece_is_as_large_as_half_a_fair_share_allows(costs: list[float], size: int) -> None:
    count = next_piece(np.cumsum(array(costs)), size)
    assert count == len(costs) or sum(costs[: count + 1]) > sum(costs) / (2 * size) - 1e-9


@settings(deadline=None)
@given(number=st.integers(1, 200), size=st.integers(1, 5))
def test_pieces_of_equal_requests_shrink_until_nothing_remains(number: int, size: int) -> None:
    pieces: list[int] = []
    while sum(pieces) < number:
        pieces.append(next_piece(np.arange(1.0, number + 1), size, done=sum(pieces)))
    assert pieces == sorted(pieces, reverse=True)
    assert (sum(pieces), pieces[-1]) == (number, 1)


def test_of_nothing_the_next_piece_is_nothing() -> None:
    assert next_piece(np.empty(0), 3) == 0
