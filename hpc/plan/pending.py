"""Find the requests of a corpus that no journal answers yet. Pure."""

from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from hpc.arrays import Floats, Ints
from hpc.corpus.store import TokenStore
from hpc.job import Job, Share
from hpc.output.journal import JournalIndex, decode
from hpc.rundir.progress import Work

MIN_SEEN, MAX_SEEN = 32, 2048
"""Completions from which output lengths are estimated; with fewer, every row is assumed to reach its limit."""


@dataclass(frozen=True)
class Pending:
    """The requests to generate, and the rows that each answers."""

    work: Work
    asked: Ints
    """For each completion that the corpus asks for, the first row that does; increasing."""
    pending: Ints
    """Those among them that no journal has, of this share."""
    also: dict[int, list[int]] = field(default_factory=dict)
    """For a pending row, the further rows that ask for its completion."""


def find_pending(tokens: TokenStore, earlier: JournalIndex, share: Share | None = None) -> Pending:
    """Compare a corpus with the journals of earlier attempts."""
    share = share or Share(0, 1)
    rows, new = _by_key(tokens)  # in the order of keys; new: a key's first row
    asked_by, leads = rows[new], np.flatnonzero(new)
    found = earlier.find(tokens.keys[asked_by]) >= 0 if len(earlier) else np.zeros(len(asked_by), dtype=bool)
    further = np.flatnonzero(~new)
    which = np.searchsorted(leads, further, side="right") - 1
    also: dict[int, list[int]] = {}
    for row, answer in zip(rows[further].tolist(), which.tolist(), strict=True):
        if not found[answer]:
            also.setdefault(int(asked_by[answer]), []).append(row)
    done = [asked_by[found], rows[further[found[which]]]]
    mine: Callable[[Ints], Ints] = lambda some: some[some % share.count == share.index] if share.count > 1 else some  # noqa: E731
    pending = np.sort(mine(asked_by[~found]))
    size = len(range(share.index, tokens.num_rows, share.count))
    work = Work(
        rows=size,
        refused=size - len(mine(rows)),
        done=sum(len(mine(some)) for some in done),
        requests=len(pending),
        duplicates=len(further),
    )
    return Pending(work, pending if not found.any() and share.count == 1 else np.sort(asked_by), pending, also)


def _by_key(tokens: TokenStore) -> tuple[Ints, npt.NDArray[np.bool_]]:
    """Return the good rows in the order of their keys, and whether each is the first with its key.

    Keys take more of rank 0's memory than anything else of a corpus: the sorted copy lives only in this function.
    """
    order = np.argsort(tokens.keys, kind="stable")
    order = order[tokens.good[order]]
    keys = tokens.keys[order]
    new = np.ones(len(order), dtype=bool)
    new[1:] = keys[1:] != keys[:-1]
    return order, new


def lengths_seen(job: Job, tokens: TokenStore, index: JournalIndex) -> tuple[Floats | None, str]:
    """Return, for each finished completion, the fraction of `max_new_tokens` it used, and a phrase naming the source.

    None if every row is assumed to reach its limit.
    """
    if job.sampling.ignore_eos:
        return None, "max_new_tokens, as --sampling.ignore-eos says"
    if not len(index):
        return None, "max_new_tokens: at most so long"
    rows = np.flatnonzero(tokens.good)
    numbers = index.find(tokens.keys[rows])
    known, first = np.unique(numbers, return_index=True)
    first = first[known >= 0][:MAX_SEEN]
    limits = (tokens.new_tokens * tokens.samples)[rows[first]].tolist()
    shares = []
    for limit, record in zip(limits, index.read(numbers[first]), strict=True):
        completion = decode(record)
        if completion.error is None:
            shares.append(min(1.0, completion.num_tokens / max(1, limit)))
    if len(shares) < MIN_SEEN:
        return None, "max_new_tokens: at most so long"
    return np.array(shares), f"{len(shares):,} completions of this run"
