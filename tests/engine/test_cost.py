"""A request's predicted seconds are the sum over its prefill and its steps."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hpc.engine.cost import CostModel

TOKENS = st.integers(0, 3000)


def predict(prompt: int, new: int, model: CostModel | None = None) -> float:
    return float((model or CostModel()).requests(np.array([prompt]), np.array([new]))[0])


@settings(deadline=None, max_examples=50)
@given(prompt=TOKENS, new=st.integers(0, 200))
def test_the_prediction_is_the_sum_over_prefill_and_steps(prompt: int, new: int) -> None:
    model = CostModel(prefill_token=2.0, prefill_pair=0.5, decode_step=3.0, decode_kv=0.25)
    prefill = 2.0 * prompt + 0.5 * prompt * prompt / 2
    steps = sum(3.0 + 0.25 * (prompt + step) for step in range(new))
    assert predict(prompt, new, model) == pytest.approx(prefill + steps)


@settings(deadline=None)
@given(prompt=TOKENS, new=TOKENS)
def test_a_longer_prompt_costs_more(prompt: int, new: int) -> None:
    assert predict(prompt + 1, new) > predict(prompt, new)


@settings(deadline=None)
@given(prompt=TOKENS, new=TOKENS)
def test_a_longer_completion_costs_more(prompt: int, new: int) -> None:
    assert predict(prompt, new + 1) > predict(prompt, new)


def test_each_request_is_predicted_by_itself() -> None:
    together = CostModel().requests(np.array([5, 700]), np.array([20, 3]))
    assert together.tolist() == [predict(5, 20), predict(700, 3)]


def test_of_no_requests_nothing_is_predicted() -> None:
    assert CostModel().requests(np.empty(0, np.int64), np.empty(0, np.int64)).shape == (0,)
