"""An estimate of many requests is that of a part of them, and its interval is what a pilot leaves open."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from hpc.corpus.store import Prompts
from hpc.engine.bounds import Bounds, Size
from hpc.forecast.calibration import Calibration, Kind
from hpc.forecast.estimate import MERGE_ROW_S, SIMULATED, Demand, Estimator, fewest
from hpc.forecast.step_costs import StepCosts
from hpc.job import Job
from hpc.plan.arrange import cuts

COSTS = StepCosts((1, 8, 64, 512), (1e-2, 1.2e-2, 3e-2, 0.2), 1e-5, 1e-7, 1e-8)
FOUND = Calibration(
    Kind("m", "float32", "cpu", 1, 1), Bounds(64, 512, 1 << 20, 100), Size(10**6, 1e6, 1e5, 10**9), 7.0, COSTS, 99, 0.0
)
JOB = Job("m", ("c.jsonl",), engine="native")


def demand(count: int, seen: list[float] | None = None, longest: int = 400) -> Demand:
    random = np.random.default_rng(3)
    lengths, new = random.integers(1, longest, count), random.integers(1, 200, count)
    tokens = random.integers(0, 1 << 30, int(lengths.sum()), dtype=np.int32)
    prompts = Prompts(tokens, np.cumsum(lengths) - lengths, lengths, new, np.ones(count, dtype=np.int64))
    return Demand(prompts, cuts(prompts, JOB), None if seen is None else np.array(seen), count)


def test_loading_generating_and_merging_are_in_the_time() -> None:
    one = demand(1)
    prompt, new = int(one.prompts.lengths[0]), int(one.prompts.new_tokens[0])
    generating = COSTS.step(prompt, 1, prompt * prompt / 2, 0)
    generating += sum(COSTS.step(1, 1, 0, prompt + step) for step in range(1, new))
    assert Estimator(JOB, one, FOUND).predict(1).seconds == pytest.approx(7 + generating + MERGE_ROW_S)


@pytest.mark.parametrize("ranks", [1, 4])
def test_a_part_of_many_requests_takes_its_part_of_the_time(ranks: int) -> None:
    many = demand(2 * SIMULATED, longest=40)
    whole = Estimator(JOB, many, FOUND).predict(ranks).seconds
    apart = []
    for part in (slice(SIMULATED), slice(SIMULATED, None)):
        arrays = many.prompts.starts, many.prompts.lengths, many.prompts.new_tokens, many.prompts.samples
        half = Prompts(many.prompts.tokens, *(values[part] for values in arrays))
        apart.append(Estimator(JOB, Demand(half, cuts(half, JOB), None, 0), FOUND).predict(ranks).seconds - 7)
    assert whole - 7 - MERGE_ROW_S * 2 * SIMULATED == pytest.approx(sum(apart), rel=0.03)


def test_where_lengths_are_known_there_is_no_interval() -> None:
    found = Estimator(JOB, demand(50), FOUND).predict(2)
    assert found.low_s == found.seconds == found.high_s


def test_a_pilot_of_unlike_lengths_leaves_an_interval() -> None:
    found = Estimator(JOB, demand(50, [0.1, 0.5, 1.0] * 11), FOUND).predict(2)
    assert found.low_s < found.seconds < found.high_s


def test_completions_that_end_early_take_less_time() -> None:
    short, long = (Estimator(JOB, demand(50, [share] * 33), FOUND).predict(1).seconds for share in (0.2, 1.0))
    assert short < long


def test_one_rank_has_the_speed_and_the_efficiency_of_one() -> None:
    found = Estimator(JOB, demand(50), FOUND).predict(1)
    assert (found.speedup, found.efficiency, found.idle) == (1, 1, 0)


@given(st.integers(1, 1000), st.integers(1, 1000))
def test_the_fewest_that_meet_a_condition_are_found(least: int, most: int) -> None:
    assert fewest(lambda count: count >= least, most) == (least if least <= most else None)


def test_requests_that_stand_for_others_take_the_time_of_all() -> None:
    whole, part = demand(4000, longest=40), demand(2000, longest=40)
    standing = Demand(part.prompts, part.shared, None, 0, every=2)
    times = [Estimator(JOB, each, FOUND).predict(4).seconds - 7 for each in (whole, standing)]
    assert times[1] == pytest.approx(times[0] - MERGE_ROW_S * 4000, rel=0.05)


def test_of_fewer_simulated_requests_the_time_is_about_the_same() -> None:
    times = [Estimator(JOB, demand(8000, longest=40), FOUND, few).predict(4).seconds for few in (500, SIMULATED)]
    assert times[0] == pytest.approx(times[1], rel=0.1)
