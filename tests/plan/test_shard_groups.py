"""Requests of one group stay together as far as balance allows."""

from itertools import pairwise

import numpy as np
import numpy.typing as npt
from hypothesis import given, settings
from hypothesis import strategies as st

from hpc.plan.shard import Deal, deal

REQUESTS = st.lists(st.tuples(st.integers(1, 50), st.integers(-1, 5)), min_size=1, max_size=40)
SIZE = st.integers(1, 5)
TAIL = st.sampled_from([0.0, 0.15, 0.5, 1.0])


def planned(requests: list[tuple[int, int]], size: int, tail: float) -> Deal:
    costs, groups = arrays(requests)
    return deal(costs, np.ones(len(requests), dtype=np.int64), size, tail, groups=groups)


def arrays(requests: list[tuple[int, int]]) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.int64]]:
    return np.array([float(cost) for cost, _ in requests]), np.array([group for _, group in requests], dtype=np.int64)


def unit(requests: list[tuple[int, int]], size: int) -> float:
    """Return the most that is dealt out at once: an eighth of a share and a request that reaches beyond it."""
    costs, _ = arrays(requests)
    return float(costs.sum() / (8 * size) + costs.max())


@settings(deadline=None)
@given(REQUESTS, SIZE, TAIL)
def test_every_request_is_planned_exactly_once(requests: list[tuple[int, int]], size: int, tail: float) -> None:
    made = planned(requests, size, tail)
    assert sorted(np.concatenate([*made.shards, made.tail]).tolist()) == list(range(len(requests)))


@settings(deadline=None)
@given(REQUESTS, SIZE)
def test_no_rank_has_more_than_the_mean_and_a_part_of_a_group(requests: list[tuple[int, int]], size: int) -> None:
    costs, _ = arrays(requests)
    loads = [costs[shard].sum() for shard in planned(requests, size, 0).shards]
    assert max(loads) <= costs.sum() / size + unit(requests, size) + 1e-9


@settings(deadline=None)
@given(REQUESTS, SIZE)
def test_without_groups_the_plan_is_what_it_is_with_none(requests: list[tuple[int, int]], size: int) -> None:
    costs, _ = arrays(requests)
    ones = np.ones(len(costs), dtype=np.int64)
    with_none = deal(costs, ones, size, 0.15, groups=np.full(len(costs), -1))
    without = deal(costs, ones, size, 0.15)
    assert [shard.tolist() for shard in with_none.shards] == [shard.tolist() for shard in without.shards]
    assert with_none.tail.tolist() == without.tail.tolist()


@settings(deadline=None)
@given(REQUESTS, st.integers(2, 5))
def test_a_group_is_on_no_more_ranks_than_its_parts(requests: list[tuple[int, int]], size: int) -> None:
    costs, groups = arrays(requests)
    shards = planned(requests, size, 0).shards
    for group in set(groups.tolist()) - {-1}:
        ranks = sum(bool((groups[shard] == group).any()) for shard in shards)
        assert ranks <= 1 + costs[groups == group].sum() // (costs.sum() / (8 * size)) + 1e-9


def test_small_groups_are_each_on_one_rank() -> None:
    groups = np.arange(120) // 4
    shards = deal(np.ones(120), np.ones(120, dtype=np.int64), 3, 0, groups=groups).shards
    assert [len(set(groups[shard].tolist())) for shard in shards] == [10, 10, 10]


def test_one_large_group_is_shared_out() -> None:
    shards = deal(np.ones(120), np.ones(120, dtype=np.int64), 3, 0, groups=np.zeros(120, dtype=np.int64)).shards
    assert [len(shard) for shard in shards] == [40, 40, 40]


def test_groups_of_equal_numbers_in_the_order_stand_together() -> None:
    groups = np.array([0, 1, -1, 0, 1, -1, 0, 1])
    [shard] = deal(np.ones(8), np.array([3, 2, 1, 3, 2, 1, 3, 2]), 1, 0, groups=groups).shards
    changes = sum(first != second for first, second in pairwise(groups[shard].tolist()))
    assert changes == 2


def test_no_requests_with_groups_are_a_plan_of_nothing() -> None:
    none = np.zeros(0)
    made = deal(none, none.astype(np.int64), 3, 0.15, groups=none.astype(np.int64))
    assert [len(shard) for shard in made.shards] == [0, 0, 0]
