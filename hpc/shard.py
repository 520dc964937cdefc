"""Balance requests over ranks by predicted cost, and keep a tail back. Pure."""

import heapq
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

Ints = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Plan:
    """Who generates what. Every request stands in exactly one of the arrays."""

    shards: tuple[Ints, ...]
    """For each rank the indices of its requests, in the order in which it is to take them."""
    tail: Ints
    """Indices that rank 0 keeps back and hands out on demand, in that order."""


def plan(costs: Floats, bucket_of: Ints, size: int, tail: float, least: float = 0.0) -> Plan:
    """Share out requests over `size` ranks.

    `costs` (seconds) and `bucket_of` (tokens) have shape [requests]. The cheapest requests, with at
    least the share `tail` of all cost, stay back. The rest goes by longest processing time first: the
    dearest to the rank with the least so far, at most 4/3 - 1/(3*size) times the best makespan
    (Graham 1969). Within a shard, buckets come longest first, so that batches are of one bucket
    and the dear ones start early. One rank needs no tail; nor is there one that would not give every
    rank a piece of `least` seconds.
    """
    order = np.argsort(-costs, kind="stable")
    spent = np.cumsum(costs[order])
    kept = len(order)
    if size > 1 and tail > 0 and kept and spent[-1] * tail >= size * least:
        # Rounding down: with tail 1 nothing is dealt out beforehand.
        kept = int(np.searchsorted(spent, spent[-1] * (1 - tail), side="right"))
    dealt: list[list[int]] = [[] for _ in range(size)]
    loads = [(0.0, rank) for rank in range(size)]
    for index, cost in zip(order[:kept].tolist(), costs[order[:kept]].tolist(), strict=True):
        load, rank = loads[0]
        dealt[rank].append(index)
        heapq.heapreplace(loads, (load + cost, rank))
    shards = tuple(_by_bucket(np.asarray(shard, dtype=np.int64), costs, bucket_of) for shard in dealt)
    return Plan(shards, _by_bucket(order[kept:].astype(np.int64), costs, bucket_of))


def next_piece(remaining_cost: Floats, size: int, least: float = 0.0) -> int:
    """Return how many of the remaining tail requests the next asker gets: at least one.

    `remaining_cost`, shape [requests], in the order of handing out. Guided self-scheduling
    (Polychronopoulos and Kuck 1987), with half a fair share: the asker gets 1/(2*size) of what
    remains, so pieces shrink, down to `least` seconds: an engine that generates batch by batch gains
    nothing from a smaller one.
    """
    if not len(remaining_cost):
        return 0
    spent = np.cumsum(remaining_cost)
    return max(1, int(np.searchsorted(spent, max(least, spent[-1] / (2 * size)), side="right")))


def _by_bucket(indices: Ints, costs: Floats, bucket_of: Ints) -> Ints:
    return indices[np.lexsort((-costs[indices], -bucket_of[indices]))] if len(indices) else indices
