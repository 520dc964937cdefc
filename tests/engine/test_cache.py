"""Extents of the cache never overlap and lose nothing; the pools of layers have what a token takes."""

import random
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from hpc.engine.cache import Cache, pool_shapes, token_bytes
from hpc.engine.extents import ALIGN, Extents, aligned
from hpc.engine.form import KVShape
from tests.engine.oracle import CPU

TOKENS = 20 * ALIGN + 7
SIZES = st.integers(1, 6 * ALIGN)


class ExtentMachine(RuleBasedStateMachine):
    """Takes, extends and gives back in any order, beside a list of what is taken."""

    def __init__(self) -> None:
        super().__init__()
        self.extents = Extents(TOKENS)
        self.taken: list[tuple[int, int]] = []

    def gaps(self) -> list[tuple[int, int]]:
        """Return start and end of what is free, by brute force."""
        free = [True] * (self.extents.num_tokens // ALIGN)
        for start, size in self.taken:
            free[start // ALIGN : (start + aligned(size)) // ALIGN] = [False] * (aligned(size) // ALIGN)
        marks = [False, *free, False]
        edges = [at * ALIGN for at in range(len(marks) - 1) if marks[at] != marks[at + 1]]
        return list(zip(edges[::2], edges[1::2], strict=True))

    @rule(size=SIZES)
    def take(self, size: int) -> None:
        fits = [start for start, end in self.gaps() if end - start >= aligned(size)]
        start = self.extents.take(size)
        assert start == (fits[0] if fits else None)  # first fit: memory once touched is used again
        if start is not None:
            self.taken.append((start, size))

    @precondition(lambda self: self.taken)
    @rule(data=st.data())
    def give(self, data: st.DataObject) -> None:
        self.extents.give(*self.taken.pop(data.draw(st.integers(0, len(self.taken) - 1))))

    @precondition(lambda self: self.taken)
    @rule(data=st.data(), wanted=SIZES)
    def extend(self, data: st.DataObject, wanted: int) -> None:
        index = data.draw(st.integers(0, len(self.taken) - 1))
        start, size = self.taken[index]
        wanted = max(size, wanted)
        end, more = start + aligned(size), aligned(wanted) - aligned(size)
        behind = next((stop - begin for begin, stop in self.gaps() if begin == end), 0)
        assert self.extents.extend(start, size, wanted) == (behind >= more)
        if behind >= more:
            self.taken[index] = start, wanted

    @invariant()
    def nothing_overlaps(self) -> None:
        used = sorted((start, start + aligned(size)) for start, size in self.taken)
        assert all(end <= start for (_, end), (start, _) in pairwise(used))
        assert all(0 <= start < end <= self.extents.num_tokens for start, end in used)


ExtentMachine.TestCase.settings = settings(deadline=None, max_examples=25, stateful_step_count=25)
TestExtents = ExtentMachine.TestCase


@settings(deadline=None)
@given(st.lists(SIZES, max_size=8), st.randoms(use_true_random=False))
def test_what_is_given_back_in_any_order_is_one_gap_again(sizes: list[int], order: random.Random) -> None:
    extents = Extents(TOKENS)
    taken = [(start, size) for size in sizes if (start := extents.take(size)) is not None]
    order.shuffle(taken)
    for start, size in taken:
        extents.give(start, size)
    assert extents.take(extents.num_tokens) == 0


@pytest.mark.parametrize("tokens", [0, 1, ALIGN - 1])
def test_a_pool_smaller_than_an_extent_has_no_room(tokens: int) -> None:
    assert Extents(tokens).take(1) is None


def test_a_pool_has_whole_extents_alone() -> None:
    assert Extents(3 * ALIGN + 5).num_tokens == 3 * ALIGN


@given(st.integers(0, 10_000))
def test_aligned_is_the_next_multiple(tokens: int) -> None:
    assert 0 <= aligned(tokens) - tokens < ALIGN
    assert aligned(tokens) % ALIGN == 0


@pytest.mark.parametrize(("dim", "panel", "expected"), [(40, 0, 40), (40, 32, 64), (64, 32, 64), (1, 16, 16)])
def test_values_are_padded_to_panels_where_a_kernel_attends(dim: int, panel: int, expected: int) -> None:
    assert pool_shapes(KVShape((2, 8), (3, dim)), panel)[1] == (3, expected)


@pytest.mark.parametrize(("dim", "panel", "expected"), [(7, 0, 7), (7, 32, 8), (8, 32, 8)])
def test_keys_are_padded_to_pairs_where_a_kernel_attends(dim: int, panel: int, expected: int) -> None:
    assert pool_shapes(KVShape((2, dim), (3, 8)), panel)[0] == (2, expected)


LAYOUTS = {0: KVShape((2, 16), (2, 24)), 3: KVShape((1, 8), (1, 8))}


@pytest.mark.parametrize("panel", [0, 32])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_cache_takes_the_bytes_of_its_tokens(panel: int, dtype: torch.dtype) -> None:
    cache = Cache(LAYOUTS, 5 * ALIGN, dtype, CPU, panel)
    size = sum(pool.numel() * pool.itemsize for pools in cache.layers.values() for pool in pools)
    assert size == 5 * ALIGN * token_bytes(LAYOUTS, dtype, panel)


@pytest.mark.parametrize(("source", "target"), [(0, 96), (96, 0), (0, 32), (32, 0)])
def test_a_copy_has_the_keys_and_values_of_the_original(source: int, target: int) -> None:
    cache = Cache(LAYOUTS, 6 * ALIGN, torch.float32, CPU, 0)
    for pools in cache.layers.values():
        for pool in pools:
            pool.copy_(torch.arange(float(pool.numel())).view(pool.shape))
    before = {index: [pool.clone() for pool in pools] for index, pools in cache.layers.items()}
    cache.copy(source, target, 40)
    for index, pools in cache.layers.items():
        for pool, original in zip(pools, before[index], strict=True):
            assert torch.equal(pool[target : target + 40], original[source : source + 40])


def test_a_copy_changes_nothing_beside_its_target() -> None:
    cache = Cache(LAYOUTS, 6 * ALIGN, torch.float32, CPU, 0)
    [pool, _] = cache.layers[0]
    pool.copy_(torch.arange(float(pool.numel())).view(pool.shape))
    before = pool.clone()
    cache.copy(0, 2 * ALIGN, ALIGN + 1)
    assert torch.equal(pool[: 2 * ALIGN], before[: 2 * ALIGN])
    assert torch.equal(pool[4 * ALIGN :], before[4 * ALIGN :])
