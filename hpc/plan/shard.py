"""Balance requests over ranks by predicted cost, and keep a tail back. Pure."""

import heapq
from dataclasses import dataclass

import numpy as np

from hpc.arrays import Floats, Ints

_BLOCK = 1 << 16
"""Requests that are Python numbers at a time, which take four times the memory of an array."""


@dataclass(frozen=True)
class Deal:
    """The shards of the ranks and the tail. Every request is in exactly one of the arrays."""

    shards: tuple[Ints, ...]
    """For each rank the indices of its requests, in the order in which it is to take them."""
    tail: Ints
    """Indices that rank 0 keeps back and hands out on demand, in that order."""


def deal(
    costs: Floats, bucket_of: Ints, size: int, tail: float, least: float = 0.0, groups: Ints | None = None
) -> Deal:
    """Share out requests over `size` ranks.

    `costs` (seconds) and `bucket_of` (tokens) have shape [requests]. The cheapest requests, with at
    least the share `tail` of all cost, stay back. The rest goes by longest processing time first: the
    dearest to the rank with the least so far, at most 4/3 - 1/(3*size) times the best makespan
    (Graham 1969). Within a shard, buckets come longest first, so that batches are of one bucket
    and the dear ones start early. Requests with the same number in `groups`, but for -1, stay together
    as far as balance allows. There is no tail with one rank, or if it would hold less than `least` seconds
    per rank.
    """
    unit_of = _units(costs, groups, size)
    unit_costs = np.bincount(unit_of, weights=costs) if len(costs) else costs
    order = np.argsort(-unit_costs, kind="stable")
    spent = np.cumsum(unit_costs[order])
    kept = len(order)
    if size > 1 and tail > 0 and kept and spent[-1] * tail >= size * least:
        # Rounding down: with tail 1 nothing is dealt out beforehand.
        kept = int(np.searchsorted(spent, spent[-1] * (1 - tail), side="right"))
    holder = np.full(len(order), size, dtype=np.int32)  # of each unit: a rank, or the tail
    loads = [(0.0, rank) for rank in range(size)]
    for begin in range(0, kept, _BLOCK):  # as Python's numbers they take four times the memory
        units = order[begin : min(begin + _BLOCK, kept)]
        for unit, cost in zip(units.tolist(), unit_costs[units].tolist(), strict=True):
            load, rank = loads[0]
            holder[unit] = rank
            heapq.heapreplace(loads, (load + cost, rank))
    ordered = np.lexsort((-costs, -bucket_of))
    held_by = holder[unit_of[ordered]] if len(ordered) else ordered
    by_holder = ordered[np.argsort(held_by, kind="stable")]
    parts = np.split(by_holder, np.cumsum(np.bincount(held_by, minlength=size + 1))[:size])
    return Deal(tuple(parts[:size]), parts[size])


def next_piece(spent: Floats, size: int, least: float = 0.0, done: int = 0) -> int:
    """Return how many of the tail's requests the next asker gets, `done` having been handed out: at least one.

    `spent`, shape [requests], is what the tail costs up to each of its requests, in the order of handing
    out. Guided self-scheduling (Polychronopoulos and Kuck 1987), with half a fair share: the asker gets
    1/(2*size) of what remains, so pieces shrink, down to `least` seconds: an engine that generates
    batch by batch gains nothing from a smaller one.
    """
    if done >= len(spent):
        return 0
    before = spent[done - 1] if done else 0.0
    piece = max(least, (spent[-1] - before) / (2 * size))
    return max(1, int(np.searchsorted(spent, before + piece, side="right")) - done)


def _units(costs: Floats, groups: Ints | None, size: int) -> Ints:
    """Return for each request the number of its unit, which goes to one rank: a group, or a part of a large one.

    A part costs at most an eighth of a rank's share, so that LPT can still balance.
    """
    if groups is None or not (groups >= 0).any():
        return np.arange(len(costs))
    max_cost = max(costs.sum() / (8 * size), 1e-12)
    order = np.lexsort((-costs, groups))
    grouped = groups[order]
    begins = np.diff(grouped, prepend=-2) != 0
    spent = np.cumsum(costs[order]) - costs[order]
    before = np.maximum.accumulate(np.where(begins, spent, 0.0))  # spent when the request's group began
    part = ((spent - before) // max_cost).astype(np.int64)
    new = begins | (grouped < 0) | (np.diff(part, prepend=0) != 0)
    units = np.empty(len(costs), dtype=np.int64)
    units[order] = np.cumsum(new) - 1
    return units
