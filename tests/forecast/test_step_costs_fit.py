"""Costs that are fitted to steps are those that the steps were made with."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from hpc.engine.steps import Measured, StepLog, StepShape
from hpc.forecast.step_costs import StepCosts, fit

TRUE = StepCosts((1, 2, 4, 8, 12, 16, 24, 32, 48, 64), tuple(0.01 + 1e-4 * n for n in range(10)), 2e-5, 3e-8, 4e-9)


def steps(costs: StepCosts, count: int, noise: float = 0.0) -> list[Measured]:
    random = np.random.default_rng(0)
    made = []
    for _ in range(count):
        tokens, kv = int(random.integers(1, 65)), int(random.integers(0, 50_000))
        chosen = int(random.integers(0, tokens + 1))
        pairs = float(random.integers(0, 200_000)) * (random.random() < 0.3)
        seconds = costs.step(tokens, chosen, pairs, kv) * (1 + noise * random.standard_normal())
        made.append((tokens, chosen, pairs, kv, seconds))
    return made


def test_a_fit_to_exact_steps_predicts_others() -> None:
    found = fit(steps(TRUE, 400))
    for tokens, chosen, pairs, kv, seconds in steps(TRUE, 100):
        assert found.step(tokens, chosen, pairs, kv) == pytest.approx(seconds, rel=1e-3)


def test_a_fit_to_noisy_steps_predicts_their_sum() -> None:
    found = fit(steps(TRUE, 2000, noise=0.1))
    exact = steps(TRUE, 500)
    predicted = sum(found.step(*step[:4]) for step in exact)
    assert predicted == pytest.approx(sum(step[4] for step in exact), rel=0.03)


def test_steps_that_something_else_disturbed_do_not_count() -> None:
    disturbed = [(*step[:4], 20 * step[4]) if index % 25 == 0 else step for index, step in enumerate(steps(TRUE, 500))]
    found = fit(disturbed)
    assert found.step(32, 32, 0.0, 1000) == pytest.approx(TRUE.step(32, 32, 0.0, 1000), rel=0.05)


def test_no_cost_is_negative_and_more_tokens_never_cost_less() -> None:
    random = np.random.default_rng(1)
    found = fit([(int(n), 1, 0.0, 0, float(random.random())) for n in random.integers(1, 100, 200)])
    assert min(found.chosen, found.pair, found.kv) >= 0
    assert list(found.at_knots) == sorted(found.at_knots)


def test_steps_smaller_than_any_measured_one_cost_as_much_as_the_smallest() -> None:
    found = fit([step for step in steps(TRUE, 400) if step[0] > 30])
    assert found.tokens(1) == found.tokens(found.knots[0]) > 0.005


def test_too_few_steps_are_refused() -> None:
    with pytest.raises(ValueError, match="15 steps"):
        fit(steps(TRUE, 15))


@given(st.integers(1, 200))
def test_costs_are_linear_between_knots_and_beyond_the_last(tokens: int) -> None:
    costs = StepCosts((1, 10, 100), (1.0, 2.0, 4.0), 0.0, 0.0, 0.0)
    expected = np.interp(tokens, [1, 10, 100, 190], [1.0, 2.0, 4.0, 6.0]) if tokens <= 190 else 4 + (tokens - 100) / 45
    assert costs.tokens(tokens) == pytest.approx(float(expected))


def test_a_step_that_computes_prompts_and_decodes_counts_for_both_by_its_tokens() -> None:
    log = StepLog()
    log.add(StepShape(tokens=40, prompt=30, chosen=11, pairs=450.0, kv=500), 2.0)
    log.add(StepShape(tokens=10, prompt=0, chosen=10, pairs=0.0, kv=510), 0.5)
    assert (log.totals.prefill_s, log.totals.decode_s) == (1.5, 1.0)
    assert (log.totals.steps, log.totals.step_tokens, log.totals.step_prompt, log.totals.step_kv) == (2, 50, 30, 1010)


def test_few_steps_are_enough_where_they_are_said_to_be() -> None:
    assert fit(steps(TRUE, 5), min_steps=5).tokens(64) > 0
