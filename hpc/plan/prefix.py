"""Find the prefixes that prompts share, so that each is computed once. Pure.

Examples are a system prompt, a few-shot header, a document with several questions. Each prompt gets one cut; it
depends on the whole corpus and not on what is pending, so that a row is computed the same way in
every attempt.
"""

import numpy as np
import numpy.typing as npt

from hpc.arrays import Ints, Tokens

_AT_ONCE = 1 << 18
"""Prompts hashed at a time: it bounds the memory of intermediate arrays to a few MiB."""

BLOCK = 16
"""Tokens compared at a time; a shorter shared prefix is not worth a cut."""


def cuts(tokens: Tokens, starts: Ints, lengths: Ints) -> tuple[Ints, Ints]:
    """Return for each prompt how many of its first tokens it shares, and with which group; 0 and -1 for none.

    `tokens` holds all prompts, prompt i being `tokens[starts[i] : starts[i] + lengths[i]]`; the results
    have the shape of `lengths`. Of the beginnings that a prompt shares with others, the cut takes the
    one that saves most: c tokens shared by g prompts save c*(1 - 1/g) for each. It is shorter than the
    prompt, whose last token must be computed for the logits behind it.
    """
    cut, group = np.zeros(len(lengths), dtype=np.int64), np.full(len(lengths), -1, dtype=np.int64)
    alive = np.flatnonzero(lengths > BLOCK)
    alive = alive[_repeated(tokens, starts[alive])]  # of a large corpus mostly few, and all else is about these
    within = np.zeros(len(alive), dtype=np.int64)  # which of the beginnings seen so far each has
    saved = np.zeros(len(lengths), dtype=np.float32)
    groups = depth = 0
    while len(alive):
        at = starts[alive] + depth
        _, first, within, count = np.unique(
            _hashes(within, tokens, at), return_index=True, return_inverse=True, return_counts=True
        )
        same = np.full(len(at), True)
        for column in range(BLOCK):  # a hash may be that of another block
            same &= tokens[at + column] == tokens[at[first] + column][within]
        shared = (count[within] > 1) & same
        alive, within, size = alive[shared], within[shared], count[within][shared]
        depth += BLOCK
        gain = depth * (1 - 1 / size)
        better = gain >= saved[alive]
        saved[alive[better]] = gain[better]
        cut[alive[better]], group[alive[better]] = depth, groups + within[better]
        groups += len(count)
        longer = lengths[alive] > depth + BLOCK
        alive, within = alive[longer], within[longer]
    _lengthen(tokens, starts, lengths, cut, group)
    return cut, group


def _repeated(tokens: Tokens, at: Ints) -> npt.NDArray[np.bool_]:
    """Return which blocks of tokens, beginning at `at`, have the hash of another one."""
    hashed = np.empty(len(at), dtype=np.uint64)
    for begin in range(0, len(at), _AT_ONCE):
        part = at[begin : begin + _AT_ONCE]
        hashed[begin : begin + _AT_ONCE] = _hashes(np.zeros(len(part), dtype=np.int64), tokens, part)
    ordered = np.sort(hashed)
    twice = np.unique(ordered[1:][ordered[1:] == ordered[:-1]])
    del ordered
    if not len(twice):
        return np.zeros(len(at), dtype=bool)
    found: npt.NDArray[np.bool_] = twice[np.minimum(np.searchsorted(twice, hashed), len(twice) - 1)] == hashed
    return found


def _hashes(within: Ints, tokens: Tokens, at: Ints) -> npt.NDArray[np.uint64]:
    """Hash the block of tokens that begins at each of `at`, together with a number."""
    hashed = within.astype(np.uint64)
    with np.errstate(over="ignore"):
        for column in range(BLOCK):
            hashed = (hashed ^ tokens[at + column].astype(np.uint64)) * np.uint64(0x9E3779B97F4A7C15)
            hashed ^= hashed >> np.uint64(29)
    return hashed


def _lengthen(tokens: Tokens, starts: Ints, lengths: Ints, cut: Ints, group: Ints) -> None:
    """Move each group's cut to the end of the shared prefix, less than a block further; drop groups of one prompt."""
    members = np.flatnonzero(group >= 0)
    members = members[np.argsort(group[members], kind="stable")]
    begins = np.flatnonzero(np.diff(group[members], prepend=-2))
    for rows in np.split(members, begins)[1:]:
        if len(rows) < 2:  # the others of the group have a better cut
            cut[rows], group[rows] = 0, -1
            continue
        at = int(cut[rows[0]])
        room = min(int(lengths[rows].min()) - 1, at + BLOCK) - at
        following = tokens[(starts[rows] + at)[:, None] + np.arange(max(0, room))]
        differs = (following != following[0]).any(axis=0)
        cut[rows] = at + (int(differs.argmax()) if differs.any() else len(differs))
