"""Outline: what of a read corpus is still to be generated, and what answers the rest. Pure."""

from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from hpc.allocation import Share
from hpc.journal import JournalIndex
from hpc.progress import Work
from hpc.store import TokenStore

Ints = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Outline:
    """What there is to do."""

    work: Work
    asked: Ints
    """For each completion that the corpus asks for, the first row that does; increasing."""
    pending: Ints
    """Those among them that no journal has, of this share."""
    also: dict[int, list[int]] = field(default_factory=dict)
    """For a pending row, the further rows that ask for its completion."""


def outline(tokens: TokenStore, earlier: JournalIndex, share: Share | None = None) -> Outline:
    """Compare a corpus with the journals of earlier attempts."""
    share = share or Share(0, 1)
    rows = np.flatnonzero(tokens.good)
    keys = tokens.keys[rows]
    unique, first, which, count = np.unique(keys, return_index=True, return_inverse=True, return_counts=True)
    found = earlier.find(unique) >= 0
    asked_by = rows[first]
    also: dict[int, list[int]] = {}
    for index in np.flatnonzero((count[which] > 1) & ~found[which]).tolist():
        if rows[index] != asked_by[which[index]]:
            also.setdefault(int(asked_by[which[index]]), []).append(int(rows[index]))
    pending = np.sort(asked_by[~found])
    mine = rows % share.count == share.index
    size = len(range(share.index, tokens.num_rows, share.count))
    work = Work(
        rows=size,
        refused=size - int(mine.sum()),
        done=int(found[which[mine]].sum()),
        requests=int((pending % share.count == share.index).sum()),
        duplicates=len(rows) - len(unique),
    )
    return Outline(work, np.sort(asked_by), pending[pending % share.count == share.index], also)
