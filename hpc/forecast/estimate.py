"""Estimate the time of a job on a number of ranks, from a plan and a calibration.

Of many requests a part is simulated, chosen evenly by cost, on proportionally fewer ranks, so that each simulated rank
has as much work as a real one.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from hpc.arrays import Floats, Ints
from hpc.corpus.store import Prompts
from hpc.engine.cost import CostModel
from hpc.forecast.calibration import Calibration
from hpc.forecast.simulate import Workload, simulate
from hpc.job import Job
from hpc.plan.arrange import make_plan

MERGE_ROW_S = 4e-5
"""Seconds that rank 0 takes to gather and write a row."""
SIMULATED = 40_000
"""Max requests that are simulated, over all draws of output lengths."""
DRAWS = 9
"""Draws of output lengths behind an interval: the fewest whose 10th and 90th percentile are not the extremes."""


@dataclass(frozen=True)
class Prediction:
    """The predicted time of a job on a number of ranks, in seconds."""

    ranks: int
    low_s: float
    seconds: float
    """The median of the draws, as `low_s` and `high_s` are their 10th and 90th percentile."""
    high_s: float
    rank_hours: float
    speedup: float
    """Over one rank."""
    efficiency: float
    """Of the ranks' time, the share that one rank would need too."""
    idle: float
    """Share of the ranks' time in which they wait for the last one."""


@dataclass(frozen=True)
class Demand:
    """The requests to generate: prompts, shared prefixes, and the lengths of outputs."""

    prompts: Prompts
    shared: tuple[Ints, Ints]
    """As `plan.cuts` returns it."""
    seen: Floats | None
    """For each finished completion, the fraction of its limit that it used; None if all are assumed to reach it."""
    rows: int
    """Rows of the output."""
    every: int = 1
    """How many requests each of these stands for."""


class Estimator:
    """Predicts a job for any number of ranks."""

    def __init__(self, job: Job, demand: Demand, found: Calibration, simulated: int = SIMULATED) -> None:
        self._job, self._found, self._rows = job, found, demand.rows
        prompts, (cut, group) = demand.prompts, demand.shared
        costs = CostModel().requests(prompts.lengths - cut, prompts.new_tokens * prompts.samples)
        draws = 1 if demand.seen is None else DRAWS
        every = max(1, -(-len(costs) * draws // simulated))
        self._every = every * demand.every
        random = np.random.default_rng(0)
        by_cost = np.argsort(costs, kind="stable")
        self._draws: list[tuple[Prompts, tuple[Ints, Ints], Ints]] = []
        for draw in range(draws):
            chosen = np.sort(by_cost[draw * every // draws :: every])
            part = Prompts(
                prompts.tokens, prompts.starts[chosen], prompts.lengths[chosen], prompts.new_tokens[chosen],
                prompts.samples[chosen],
            )  # fmt: skip
            new = part.new_tokens
            if demand.seen is not None:  # drawn from a draw: how much a pilot tells is part of the interval
                known = random.choice(demand.seen, len(demand.seen))
                new = np.maximum(1, (new * random.choice(known, len(new))).astype(np.int64))
            self._draws.append((part, (cut[chosen], group[chosen]), new))
        self._known: dict[int, Prediction] = {}

    @property
    def max_ranks(self) -> int:
        """Number of requests: more ranks would have nothing to do."""
        return max(1, len(self._draws[0][2]) * self._every)

    def predict(self, ranks: int) -> Prediction:
        """Predict loading, generating and merging on `ranks` ranks."""
        if ranks not in self._known:
            times, idle = zip(*(self._generating(ranks, *draw) for draw in self._draws), strict=True)
            whole = self._found.load_s + np.array(times) + MERGE_ROW_S * self._rows
            low, middle, high = np.percentile(whole, [10, 50, 90]).tolist()
            alone = middle if ranks == 1 else self.predict(1).seconds
            self._known[ranks] = Prediction(
                ranks, low, middle, high, ranks * middle / 3600, alone / middle, alone / middle / ranks,
                float(np.median(idle)),
            )  # fmt: skip
        return self._known[ranks]

    def _generating(self, ranks: int, part: Prompts, shared: tuple[Ints, Ints], new: Ints) -> tuple[float, float]:
        """Return the seconds until the last rank is done, and the share of them that ranks wait for it."""
        fewer = max(1, round(ranks / self._every))
        engine = self._found.engine
        arranged = make_plan(part, np.arange(len(new)), self._job, fewer, shared, engine.max_seqs)
        # The samples of a prompt share all of it but its last token.
        several = part.samples > 1
        prefixes = np.where(several, part.lengths - 1, arranged.prefixes)
        groups = np.where(several, arranged.groups.max(initial=0) + 1 + np.arange(len(new)), arranged.groups)
        work = Workload(part.lengths, prefixes, groups, new, part.samples)
        clocks = simulate(self._found.costs, engine, work, arranged.shards, arranged.costs)
        last = max(clocks)
        return last * self._every * fewer / ranks, 1 - sum(clocks) / (fewer * last) if last else 0.0


def fewest(meets: Callable[[int], bool], max_ranks: int) -> int | None:
    """Return the fewest ranks that meet a condition; None if `max_ranks` do not. More ranks must meet it too."""
    high = 1
    while not meets(high):
        if high >= max_ranks:
            return None
        high = min(max_ranks, 2 * high)
    low = high // 2
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if meets(middle) else (middle, high)
    return high
