"""The memory for keys and values: plausible on the machine that runs this."""

import mmap
import os

from hpc.engine.memory import SHARE, cache_bytes, limit, resident


def test_the_limit_is_at_most_the_machines_memory() -> None:
    assert 0 < limit() <= os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def test_what_is_resident_is_within_the_limit() -> None:
    assert 0 < resident() < limit()


def test_what_is_resident_grows_with_what_is_touched() -> None:
    size, page = 64 << 20, mmap.PAGESIZE
    with mmap.mmap(-1, size) as block:  # not from malloc, which may have as much that was touched before
        before = resident()
        block[::page] = bytes(size // page)
        assert resident() - before > 48 << 20


def test_a_cache_has_its_share_of_what_is_left() -> None:
    assert 0 < cache_bytes(1) <= SHARE * limit()


def test_ranks_of_a_node_share_its_memory() -> None:
    assert 4 * cache_bytes(4) < cache_bytes(1)


def test_where_nothing_is_left_a_cache_has_none() -> None:
    assert cache_bytes(10**9) == 0
