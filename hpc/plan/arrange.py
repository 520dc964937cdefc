"""Plan which requests are computed together, by which rank and in which order. Pure.

An engine that pads gets buckets. Another one gets its requests longest predicted first, those that share a prefix
adjacent. The engine's traits say which it is.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from hpc.arrays import Floats, Ints
from hpc.corpus.store import Prompts
from hpc.engine import bucket
from hpc.engine.bounds import MAX_SEQS
from hpc.engine.cost import CostModel
from hpc.engine.registry import traits
from hpc.job import Job
from hpc.plan import prefix
from hpc.plan.shard import Deal, deal


@dataclass(frozen=True)
class Plan:
    """Buckets, prefixes, costs and shards of the pending requests; arrays of shape [pending]."""

    buckets: Ints
    """Tokens to which each prompt is padded."""
    prefixes: Ints
    """Tokens at its beginning that each prompt shares."""
    groups: Ints
    """Number of the prefix that each shares with others; -1 if it shares none."""
    costs: Floats
    """Predicted seconds."""
    least: float
    """Seconds of work below which a piece is not worth handing out."""
    shards: Deal
    """Names requests by their index in `pending`."""


def cuts(prompts: Prompts, job: Job) -> tuple[Ints, Ints]:
    """Return for each prompt how many of its first tokens it shares, and with which group; 0 and -1 for none."""
    if traits(job.engine).shares_prefixes:
        return prefix.cuts(prompts.tokens, prompts.starts, prompts.lengths)
    count = len(prompts.lengths)
    return np.zeros(count, dtype=np.int64), np.full(count, -1, dtype=np.int64)


def make_plan(
    prompts: Prompts,
    pending: Ints,
    job: Job,
    size: int,
    shared: tuple[Ints, Ints] | None = None,
    at_once: int = MAX_SEQS,
) -> Plan:
    """Plan the prompts with the indices `pending` for `size` ranks.

    `shared` is what `cuts` returns for all; `at_once` is how many sequences a rank has under way.
    """
    whole = len(pending) == len(prompts.lengths)  # then nothing is copied: a corpus may be large
    of_pending: Callable[[Ints], Ints] = lambda values: values if whole else values[pending]  # noqa: E731
    lengths, new_tokens, samples = map(of_pending, (prompts.lengths, prompts.new_tokens, prompts.samples))
    cost = CostModel()
    cut, group = map(of_pending, shared or cuts(prompts, job))
    kind = traits(job.engine)
    if not kind.pads:
        costs = cost.requests(lengths - cut, new_tokens * samples)
        together = _together(costs, group) if (group >= 0).any() else np.zeros(1, dtype=np.int64)
        # What all ranks could begin with would, kept back, only be later.
        tail = min(job.tail, kind.max_tail, max(0.0, 1 - size * at_once / max(1, int(samples.sum()))))
        shards = deal(costs, np.broadcast_to(together, costs.shape), size, tail, groups=group)
        return Plan(lengths, cut, group, costs, 0.0, shards)
    costs = cost.requests(lengths, new_tokens) * samples
    buckets, least = lengths, 0.0
    if len(pending):
        chosen = bucket.choose(lengths, new_tokens, job.buckets, size, job.batch_tokens, cost.prefill_token, cost.step)
        buckets = bucket.assign(lengths, chosen)
        least = cost.step * float(new_tokens.max())  # what a batch costs, be it full or not
    shards = deal(costs, buckets, size, min(job.tail, kind.max_tail), least)
    return Plan(buckets, cut, group, costs, least, shards)


def _together(costs: Floats, group: Ints) -> Ints:
    """Return numbers, equal within a group, that order requests by the highest cost in their group."""
    dearest = costs.copy()
    members = np.flatnonzero(group >= 0)
    if len(members):
        max_cost = np.zeros(int(group.max()) + 1)
        np.maximum.at(max_cost, group[members], costs[members])
        dearest[members] = max_cost[group[members]]
    order = np.lexsort((group, dearest))
    changes = (np.diff(dearest[order], prepend=-1) != 0) | (np.diff(group[order], prepend=-2) != 0)
    together = np.empty(len(costs), dtype=np.int64)
    together[order] = np.cumsum(changes)
    return together
