"""Model the seconds of an engine's step, and fit the model to measured steps. Pure.

`StepCosts` predicts in seconds. `hpc.engine.cost.CostModel`, whose ratios are fixed, only shares requests out.

`step = t(tokens) + h*chosen + a*pairs + e*kv`, where t is non-decreasing and linear between knots:
with few tokens reading the weights bounds it, with many the computing. `pairs` is the sum of
n*(p + n/2) over chunks of n prompt tokens behind p, `kv` the stored tokens that decoding reads.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from hpc.arrays import Floats, Ints
from hpc.engine.steps import Measured

KNOTS = (1, 2, 4, 8, 12, 16, 24, 32, 48, 64, 96, 128, 192, 256, 384, 512, 768, 1024, 2048, 4096, 8192)
"""Numbers of tokens between which the cost of a step is linear."""


@dataclass(frozen=True)
class StepCosts:
    """The cost of a replica's steps, in seconds."""

    knots: tuple[int, ...]
    """Numbers of tokens, increasing."""
    at_knots: tuple[float, ...]
    """t at the knots."""
    chosen: float
    """h: for each token that is chosen."""
    pair: float
    """a: for each pair of a prompt token and one that it attends to."""
    kv: float
    """e: for each stored token that decoding reads."""

    def tokens(self, count: int) -> float:
        """Return t: constant up to the first knot, extrapolated linearly beyond the last."""
        return float(_basis(np.array([count]), self.knots)[0] @ _increments(self.at_knots))

    def step(self, tokens: int, chosen: int, pairs: float, kv: float) -> float:
        """Return the seconds of a step."""
        return self.tokens(tokens) + self.chosen * chosen + self.pair * pairs + self.kv * kv


def fit(samples: Sequence[Measured], min_steps: int = 16) -> StepCosts:
    """Fit non-negative costs to measured steps by least squares.

    Raises `ValueError` for fewer than `min_steps`. A trial, whose steps are of all shapes, may have few.

    Steps weigh by the inverse of their duration, as the many short ones make up as much of a run as the
    few long ones. A step that took over three times what the fit says, when something else had the core,
    does not count.
    """
    values = np.array(samples, dtype=np.float64).reshape(-1, 5)
    if len(values) < min_steps:
        raise ValueError(f"{len(values)} steps have been measured; {min_steps} are the least for a fit")
    interval = np.searchsorted(KNOTS, values[:, 0])  # a knot is for the steps up to it; without any there is none
    knots = tuple(KNOTS[index] for index in np.unique(np.minimum(interval, len(KNOTS) - 1)).tolist())
    parts = np.hstack([_basis(values[:, 0], knots), values[:, 1:4]])
    seconds = values[:, 4]
    found = _non_negative(parts / seconds[:, None], np.ones(len(seconds)))
    usual = seconds <= 3 * np.maximum(parts @ found, 1e-9)
    if usual.sum() >= 16:
        found = _non_negative(parts[usual] / seconds[usual, None], np.ones(int(usual.sum())))
    at_knots = np.cumsum(found[: len(knots)])
    chosen, pair, kv = found[len(knots) :].tolist()
    return StepCosts(knots, tuple(at_knots.tolist()), chosen, pair, kv)


def _basis(tokens: Ints | Floats, knots: tuple[int, ...]) -> Floats:
    """Return the share of the rise up to each knot that a number of tokens has passed, shape [steps, knots]."""
    points = np.asarray(tokens, dtype=np.float64)[:, None]
    ends = np.array(knots, dtype=np.float64)
    begins = np.concatenate([[0.0], ends[:-1]])
    part = (points - begins) / (ends - begins)
    part[:, :-1] = np.minimum(part[:, :-1], 1.0)
    part[:, 0] = 1.0  # up to the first knot all cost the same: reading the weights
    found: Floats = np.maximum(part, 0.0)
    return found


def _increments(values: tuple[float, ...]) -> Floats:
    return np.diff(np.array(values), prepend=0.0)


def _non_negative(parts: Floats, target: Floats) -> Floats:
    """Return the non-negative x with the least squared error of parts @ x (Lawson and Hanson 1974)."""
    from scipy.optimize import nnls

    found: Floats = nnls(parts, target)[0]
    return found
