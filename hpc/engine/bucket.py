"""Bucket requests by length so that few tokens are padding. Pure."""

import numpy as np

from hpc.arrays import Ints

MAX_DISTINCT = 4096
"""Maximum number of distinct lengths; beyond it they are rounded up to a multiple, which bounds time and memory."""


def boundaries(lengths: Ints, num_buckets: int) -> Ints:
    """Return up to `num_buckets` bucket lengths, ascending, with the minimum of padding."""
    return all_boundaries(lengths, num_buckets)[-1]


def all_boundaries(lengths: Ints, num_buckets: int) -> list[Ints]:
    """Return the best bucket lengths for each number of buckets, from 1 to `num_buckets` or the number of lengths.

    `lengths` has shape [requests], in tokens. Each request is padded to the smallest boundary not
    below its length; the last boundary is the longest length (or the multiple above it, when there
    are more than `MAX_DISTINCT` distinct lengths).

    Exact: with d distinct lengths L[j] of which C[j] requests are no longer than the j-th, the minimum
    number of tokens with k buckets is T_k[j] = min_i T_{k-1}[i] + L[j]*(C[j] - C[i]). For fixed i
    this is a line in L[j] with slope -C[i], so the minimum is the lower envelope of lines whose
    slopes fall while L[j] rises: O(k*d) (the monotone convex hull trick).
    """
    if num_buckets < 1:
        raise ValueError(f"num_buckets is {num_buckets}; it must be at least 1")
    distinct, counts = np.unique(np.asarray(lengths, dtype=np.int64), return_counts=True)
    if len(distinct) > MAX_DISTINCT:
        step = -(-int(distinct[-1]) // MAX_DISTINCT)
        distinct, counts = np.unique(-(-np.asarray(lengths, dtype=np.int64) // step) * step, return_counts=True)
    length = distinct.tolist()
    below = [0, *np.cumsum(counts).tolist()]
    total, first = [length[j] * below[j + 1] for j in range(len(length))], []
    found = [distinct[-1:]]
    for _ in range(min(num_buckets, len(length)) - 1):
        total, chosen = _add_bucket(length, below, total)
        first.append(chosen)
        ends = [len(length) - 1]
        for begins in reversed(first):
            if begins[ends[-1]] == 0:
                break
            ends.append(begins[ends[-1]] - 1)
        found.append(distinct[ends[::-1]])
    return found


def choose(
    lengths: Ints, new_tokens: Ints, num_buckets: int, size: int, batch_tokens: int, padding_s: float, step_s: float
) -> Ints:
    """Return up to `num_buckets` bucket lengths, those with which `size` ranks finish first.

    Few buckets pad more, at `padding_s` a token. Many buckets make more batches, and each batch, full or
    not, takes as many steps of `step_s` as its longest completion has tokens. `lengths` and
    `new_tokens`, in tokens, have shape [requests].
    """
    distinct, which, counts = np.unique(lengths, return_inverse=True, return_counts=True)
    longest_new = np.zeros(len(distinct), dtype=np.int64)
    np.maximum.at(longest_new, which, new_tokens)

    def seconds(bucket_lengths: Ints) -> float:
        bucket_of = np.searchsorted(bucket_lengths, distinct)
        rows = np.bincount(bucket_of, counts, len(bucket_lengths)) / size
        new = np.zeros(len(bucket_lengths), dtype=np.int64)
        np.maximum.at(new, bucket_of, longest_new)
        batches = np.ceil(rows / np.maximum(1, batch_tokens // (bucket_lengths + new)))
        return float((rows * bucket_lengths).sum() * padding_s + (batches * new).sum() * step_s)

    return min(all_boundaries(lengths, num_buckets), key=seconds)


def assign(lengths: Ints, bucket_lengths: Ints) -> Ints:
    """Return the bucket length that each length, shape [requests], is padded to."""
    return bucket_lengths[np.searchsorted(bucket_lengths, lengths)]


def _add_bucket(length: list[int], below: list[int], total: list[int]) -> tuple[list[int], list[int]]:
    """Allow one more bucket; return the new minimum totals, and where the last bucket begins.

    `total[j]` is the minimum for lengths 0..j. The last bucket of 0..j begins at i: it holds
    below[j+1] - below[i] requests, and total[i-1] pays for the rest. Integers throughout: exact.
    """
    lines: list[tuple[int, int, int]] = []  # slope -below[i], intercept total[i-1], i; a lower hull
    best, begins, at = [], [], 0
    for j, x in enumerate(length):
        slope, intercept = -below[j], total[j - 1] if j else 0
        while len(lines) >= 2:
            (m0, b0, _), (m1, b1, _) = lines[-2], lines[-1]
            if (intercept - b0) * (m0 - m1) > (b1 - b0) * (m0 - slope):
                break
            lines.pop()
        lines.append((slope, intercept, j))
        at = min(at, len(lines) - 1)
        while at + 1 < len(lines) and lines[at + 1][0] * x + lines[at + 1][1] <= lines[at][0] * x + lines[at][1]:
            at += 1
        m, b, i = lines[at]
        best.append(x * below[j + 1] + m * x + b)
        begins.append(i)
    return best, begins
