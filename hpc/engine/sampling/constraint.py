"""Constraints: the tokens that a slot must not choose now. The sampler asks before it chooses."""

from collections.abc import Collection
from typing import Protocol

import numpy as np

from hpc.arrays import Ints
from hpc.sampling_params import SamplingParams
from hpc.trim import ending_tokens

NOTHING: Ints = np.zeros(0, dtype=np.int64)


class Constraint(Protocol):
    """Says which tokens one sequence must not choose.

    It sees positions only: on a GPU the host chooses a token before it has read the one before.
    """

    def forbidden(self, position: int) -> Ints:
        """Return the token ids that must not be chosen at a position, counted from the first generated token.

        The same array as for the position before where nothing has changed: only a new one is copied to the device.
        """


class MinNewTokens:
    """Forbids the ending tokens at the first `count` positions."""

    def __init__(self, count: int, endings: Collection[int]) -> None:
        self._count = count
        self._endings = np.array(sorted(endings), dtype=np.int64)

    def forbidden(self, position: int) -> Ints:
        """Return the ending tokens, none from position `count` on."""
        return self._endings if position < self._count else NOTHING


def constraint_of(sampling: SamplingParams, eos_token_ids: Collection[int]) -> Constraint | None:
    """Return the constraint that a request's parameters ask for; None if every token is allowed everywhere."""
    if sampling.min_new_tokens and (endings := ending_tokens(sampling, eos_token_ids)):
        return MinNewTokens(sampling.min_new_tokens, endings)
    return None


def is_free_from(sampling: SamplingParams, position: int) -> bool:
    """Return whether no token is forbidden from a position on, so that draft tokens need no constraint."""
    return position >= sampling.min_new_tokens
