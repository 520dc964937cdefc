"""A row is close where noise could have made its token another."""

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

from hpc.engine.sampling.draw import draw
from hpc.engine.sampling.rounding import Rounding, Witness
from hpc.engine.sampling.sampler import Sampler
from hpc.sampling_params import SamplingParams
from tests.engine.oracle import request
from tests.engine.sampling.choosing import (
    BEST,
    CPU,
    JUST_BELOW_1,
    KINDS,
    choose,
    column,
    kind,
    mixed_rows,
    numbers,
    prompt_of,
    sampler_of,
)  # fmt: skip


def draws(
    logits: torch.Tensor, columns: list[torch.Tensor], noise: torch.Tensor, **more: Any
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the drawn tokens and which of them are close, both [rows]."""
    witness = Witness(noise, columns[0])
    return draw(logits, *columns, witness=witness, **more), witness.close


def draw_noisily(
    logits: Any, uniform: Any, noise: float, top_p: float = 1.0, top_k: int = 0, min_p: float = 0.0
) -> tuple[list[int], list[bool]]:
    """Draw once from the same logits for each uniform number: tokens, and whether they are close."""
    rows = len(uniform)
    columns = [column(value, rows) for value in (1.0, top_p, top_k, min_p, uniform)]
    tokens, close = draws(torch.tensor(logits, dtype=torch.float32).expand(rows, -1), columns, column(noise, rows))
    return tokens.tolist(), close.tolist()


def closes(logits: torch.Tensor, columns: list[torch.Tensor], **more: Any) -> list[bool]:
    """Return which rows are close; the last column is their noise."""
    return draws(logits, columns[:-1], columns[-1], **more)[1].tolist()  # type: ignore[no-any-return]


def close_of(sampling: list[SamplingParams], logits: torch.Tensor, noise: float, **more: Any) -> list[bool]:
    """Choose first tokens; return which are close."""
    close = choose(sampling, logits, noise=noise, **more).close
    assert close is not None
    return close.tolist()  # type: ignore[no-any-return]


@pytest.mark.parametrize("spread", [0.5, 3.0, 8.0])
def test_the_same_draws_are_close_where_values_are_not_read(spread: float) -> None:
    logits, columns = mixed_rows(40, 5000)
    assert closes(logits * spread, columns, reads=False) == closes(logits * spread, columns)


@pytest.mark.parametrize(("rows", "vocabulary"), [(200, 50), (30, 5003)])
def test_whether_a_draw_is_close_does_not_depend_on_the_other_rows(rows: int, vocabulary: int) -> None:
    logits, columns = mixed_rows(rows, vocabulary)
    logits[::3] /= 10  # of a large vocabulary these need a look at many tokens
    alone = [closes(logits[i : i + 1], [column[i : i + 1] for column in columns])[0] for i in range(rows)]
    assert alone == closes(logits, columns)


@pytest.mark.parametrize("tied", [False, True])
def test_the_same_draws_are_close_where_few_tokens_are_ranked_for_a_small_top_k(tied: bool) -> None:
    rows, random = 400, np.random.default_rng(1)
    values = random.integers(0, 4, size=(rows, 300)) if tied else random.normal(size=(rows, 300)) * 2
    columns = [
        random.choice([0.5, 1.0, 2.0], rows), random.choice([0.5, 0.95, 1.0], rows),
        random.choice([1, 5, 40], rows), random.choice([0.0, 0.1], rows), random.random(rows),
        random.choice([0.0, 1e-3, 0.1], rows),
    ]  # fmt: skip
    given = torch.tensor(values, dtype=torch.float32), [column(each, rows) for each in columns]
    assert closes(*given, ranked=41) == closes(*given)


def test_a_witness_changes_nothing_of_what_is_drawn() -> None:
    logits, columns = mixed_rows(200, 300)
    assert draws(logits, columns[:-1], columns[-1])[0].tolist() == draw(logits, *columns[:-1]).tolist()


def test_without_noise_no_draw_is_close() -> None:
    tied = (1.0, 1.0, 1.0, 1.0)
    assert not any(draw_noisily(tied, [0.0, 0.25, 0.5, JUST_BELOW_1], 0.0, top_p=0.5, top_k=2)[1])


def test_without_noise_no_greedy_choice_is_close() -> None:
    assert close_of([SamplingParams()], torch.tensor([[1.0, 1.0]]), 0.0) == [False]


def test_without_rounding_nothing_is_said_of_closeness() -> None:
    assert choose([SamplingParams()], torch.tensor([[1.0, 1.0]])).close is None


@pytest.mark.parametrize(("second", "expected"), [(9.9, False), (9.9999, True), (10.0, True)])
def test_a_greedy_choice_is_close_where_the_best_two_are_nearer_than_the_noise(second: float, expected: bool) -> None:
    assert close_of([SamplingParams()], torch.tensor([[second, 10.0, -10.0]]), 1e-4) == [expected]


def test_the_noise_is_a_share_of_the_largest_logit_of_either_sign() -> None:
    logits = torch.tensor([[1.0, 1.5, -3.0], [1.0, 1.5, -300.0]])
    assert close_of([SamplingParams()] * 2, logits, 0.01) == [False, True]


@pytest.mark.parametrize("masked", [-torch.inf, torch.finfo(torch.float32).min])
def test_a_masked_token_makes_no_choice_close(masked: float) -> None:
    assert close_of([SamplingParams()], torch.tensor([[masked, 1.0, 2.0]]), 1e-5) == [False]


@pytest.mark.parametrize(
    ("uniform", "expected"), [(0.25, False), (0.4999, True), (0.5, True), (0.5001, True), (0.75, False)]
)
def test_a_draw_is_close_where_the_uniform_is_at_the_border_of_two_tokens(uniform: float, expected: bool) -> None:
    assert draw_noisily((1.0, 1.0), [uniform], 0.01)[1] == [expected]


@pytest.mark.parametrize(("third", "expected"), [(0.0, False), (0.999, True)])
def test_a_draw_of_the_last_kept_token_is_close_where_the_next_disputes_its_place(third: float, expected: bool) -> None:
    assert draw_noisily((1.0, 2.0, third), [0.1], 0.01, top_k=2) == ([0], [expected])


@pytest.mark.parametrize(("top_p", "expected"), [(0.7, False), (0.7501, True), (0.7499, True), (0.8, False)])
def test_a_draw_of_the_last_kept_token_is_close_where_top_p_ends_beside_it(top_p: float, expected: bool) -> None:
    logits = np.log([0.25, 0.5, 0.15, 0.1]).tolist()
    assert draw_noisily(logits, [0.15], 0.01, top_p=top_p) == ([0], [expected])


@pytest.mark.parametrize(("min_p", "expected"), [(0.55, False), (0.5999, True), (0.6001, True), (0.65, False)])
def test_a_draw_is_close_where_min_p_ends_beside_a_token(min_p: float, expected: bool) -> None:
    # 0.3 is 0.6 of 0.5; 0.29 of the mass is far from a border, with and without that token.
    logits = np.log([0.5, 0.3, 0.2 - 1e-9, 1e-9]).tolist()
    assert draw_noisily(logits, [0.29], 0.01, min_p=min_p) == ([0], [expected])


def test_a_draw_is_not_close_where_min_p_leaves_the_most_probable_token_alone() -> None:
    assert draw_noisily((1.0, 3.0, 2.0), [0.5], 0.01, min_p=1.0) == ([1], [False])


def test_a_draw_is_close_where_many_tokens_are_tied_at_the_border_of_top_k() -> None:
    tied = torch.zeros(1, 21)
    tied[0, 10] = 4.0
    moved = tied.clone()
    moved[0, 11:] += 1e-9  # other ten of the tokens are now among the eleven
    columns = [column(value, 1) for value in (1.0, 1.0, 11.0, 0.0, 0.05, 1e-4)]
    assert [closes(x, columns) for x in (tied, moved)] == [[True], [True]]


def test_few_draws_are_close_at_the_noise_of_float32() -> None:
    random = np.random.default_rng(0)
    logits = torch.tensor(random.normal(size=(5000, 200)) * 4, dtype=torch.float32)
    sampling = SamplingParams(temperature=0.8, top_p=0.95, top_k=50)
    assert np.mean(close_of([sampling] * 5000, logits, 1e-5)) < 0.01


@settings(derandomize=True, deadline=None, max_examples=60)
@given(
    seed=st.integers(0, 2**32 - 1),
    vocabulary=st.integers(2, 40),
    temperature=st.floats(0.2, 3),
    top_p=st.sampled_from([1.0, 0.99, 0.9, 0.5]),
    top_k=st.sampled_from([0, 1, 3, 10]),
    min_p=st.sampled_from([0.0, 0.0, 0.05, 0.5, 1.0]),
    noise=st.sampled_from([1e-4, 1e-3, 1e-2, 0.1]),
)
def test_a_draw_that_is_not_close_survives_a_tenth_of_the_noise(
    seed: int, vocabulary: int, temperature: float, top_p: float, top_k: int, min_p: float, noise: float
) -> None:
    rows, random = 2000, np.random.default_rng(seed)
    logits = torch.tensor(random.normal(size=(rows, vocabulary)) * 2)
    moved = logits + torch.tensor(random.uniform(-noise / 10, noise / 10, size=logits.shape))
    columns = [column(value, rows) for value in (temperature, top_p, top_k, min_p, random.random(rows))]
    tokens, close = draws(logits, columns, column(noise, rows))
    assert ((tokens == draw(moved, *columns)) | close).all()


def test_a_sampled_row_is_close_where_its_draw_is_and_not_where_its_best_two_are() -> None:
    tied = (2.0, 2.0)
    close = close_of([SamplingParams(temperature=1.0)] * 200, torch.tensor(tied).expand(200, -1), 0.02)
    assert close == draw_noisily(tied, [numbers(0, identity, 1)[0] for identity in range(200)], 0.04)[1]


@pytest.mark.parametrize(("penalty", "expected"), [(1.0, False), (3.0, True)])
def test_a_repetition_penalty_makes_the_noise_larger(penalty: float, expected: bool) -> None:
    logits = torch.tensor([[10.0, 9.98, -5.0]])
    assert close_of([SamplingParams(repetition_penalty=penalty)], logits, 1e-3, prompts=[[2]]) == [expected]


@settings(derandomize=True, deadline=None, max_examples=40)
@given(
    seed=st.integers(0, 2**32 - 1),
    repetition=st.sampled_from([0.3, 1.0, 1.5, 5.0]),
    presence=st.sampled_from([0.0, 0.7, -2.0]),
    temperature=st.sampled_from([0.0, 0.5, 1.5]),
    noise=st.sampled_from([1e-3, 1e-2]),
)
def test_a_choice_with_penalties_that_is_not_close_survives_a_tenth_of_the_noise(
    seed: int, repetition: float, presence: float, temperature: float, noise: float
) -> None:
    rows, random = 300, np.random.default_rng(seed)
    logits = torch.tensor(random.normal(size=(rows, 12)) * 2, dtype=torch.float32)
    size = noise * logits.abs().amax(dim=-1, keepdim=True).numpy() / 10
    moved = logits + torch.tensor(random.uniform(-1, 1, size=logits.shape) * size, dtype=torch.float32)
    sampling = SamplingParams(temperature=temperature, repetition_penalty=repetition, presence_penalty=presence)
    given = {"noise": noise, "prompts": random.integers(0, 12, size=(rows, 6)).tolist()}
    one, other = (choose([sampling] * rows, x, **given) for x in (logits, moved))
    assert one.close is not None
    assert ((one.tokens == other.tokens) | one.close).all()


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("number", range(len(KINDS)))
def test_a_row_whose_logits_are_no_numbers_is_not_close(number: int, bad: float) -> None:
    assert close_of([kind(number)], torch.full((1, 2000), bad), 0.01, eos=[7]) == [False]


def test_what_is_chosen_with_rounding_does_not_depend_on_who_comes_and_goes() -> None:
    logits = torch.tensor(np.random.default_rng(0).normal(size=(12, 10)) * 2, dtype=torch.float32)
    sampler = Sampler(2, CPU, [BEST], Rounding(1e-2))
    together: list[Any] = []
    for number in range(12):
        sampler.set(number % 2, request(prompt_of(number), number, kind(number)))
        choice = sampler.choose(logits[number : number + 1], [number % 2])
        assert choice.close is not None
        together.append((choice.tokens.item(), choice.close.item()))
    alone = []
    for number in range(12):
        own = {"ids": [number], "prompts": [prompt_of(number)], "eos": [BEST], "noise": 1e-2}
        choice = choose([kind(number)], logits[number : number + 1], **own)  # type: ignore[arg-type]
        assert choice.close is not None
        alone.append((choice.tokens.item(), choice.close.item()))
    assert together == alone


class Widest(TorchDispatchMode):
    """Remembers the widest tensor of float64."""

    width = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        if isinstance(made, torch.Tensor) and made.dtype == torch.float64 and made.dim():
            self.width = max(self.width, made.shape[-1])
        return made


@pytest.mark.parametrize("cut", [{}, {"top_k": 50, "top_p": 0.9}, {"top_p": 0.9}, {"min_p": 0.05}], ids=str)
def test_a_few_probable_tokens_are_drawn_without_a_float64_for_every_token(cut: dict[str, Any]) -> None:
    sampling = [SamplingParams(), SamplingParams(temperature=1.0, **cut), SamplingParams(presence_penalty=1)]
    sampler, logits = sampler_of(sampling, noise=1e-5), torch.randn(3, 20_000, generator=torch.manual_seed(0)) * 4
    with Widest() as widest:
        sampler.choose(logits, [0, 1, 2])
    assert 0 < widest.width <= 1024
