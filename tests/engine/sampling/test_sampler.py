"""The random numbers, the tokens that are drawn with them, and what the parameters make of a distribution."""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import RepetitionPenaltyLogitsProcessor

from hpc.engine.sampling.draw import BY_MASS, draw, most_probable, penalise, stream, uniforms
from hpc.engine.sampling.sampler import Sampler
from hpc.request import RowId
from hpc.sampling_params import SamplingParams
from tests.engine.acted import acted
from tests.engine.oracle import request
from tests.engine.sampling.choosing import (
    BEST,
    CPU,
    JUST_BELOW_1,
    KINDS,
    LOGITS,
    NEXT,
    Floats,
    choose,
    choose_often,
    draw_with,
    kind,
    mixed_rows,
    numbers,
    prompt_of,
    sampler_of,
)  # fmt: skip

DRAWS = 20_000


def chi_squared(observed: npt.NDArray[np.int64], expected: Floats) -> float:
    """Return the statistic as a share of its 0.999 quantile (Wilson and Hilferty 1931)."""
    assert expected.min() > 5
    freedom = len(expected) - 1
    quantile = freedom * (1 - 2 / (9 * freedom) + 3.09 * (2 / (9 * freedom)) ** 0.5) ** 3
    return float(((observed - expected) ** 2 / expected).sum() / quantile)


def truncated(logits: Sequence[float], temperature: float, top_p: float, top_k: int, min_p: float) -> Floats:
    """Return the distribution to draw from, computed token by token."""
    weights = np.exp(np.array(logits, dtype=np.float64) / temperature)
    order = sorted(range(len(weights)), key=lambda token: -weights[token])
    if top_k:
        order = order[:top_k]
    order = [token for token in order if weights[token] >= min_p * weights.max()]
    enough = top_p * sum(weights[token] for token in order)
    distribution, reached = np.zeros(len(weights)), 0.0
    for token in order:
        if top_p < 1 and reached >= enough:
            break
        reached += weights[token]
        distribution[token] = weights[token]
    return distribution / distribution.sum()


PINNED = [
    (0, 0, 0x57FEB173EC1A1C08, (0.8711136828759558, 0.7797520652576925, 0.44084258081448424)),
    (0, 1, 0x6DDEF22A8901AB1D, (0.5194739442398351, 0.9077902532559119, 0.5741505579118557)),
    (0, "1", 0x471A256F3DB58791, (0.7751323742391721, 0.6628652337379356, 0.696884289122548)),
    (1, 0, 0x976D618BFEBF0A95, (0.11882783723438195, 0.1747723846415692, 0.21115959183145772)),
    (0, "", 0x7E3DF101CECCC217, (0.9029727174570398, 0.07822352598488613, 0.9496721915646757)),
    (7, "row-é", 0x4BEACEDE3FACBAF2, (0.7981572914804592, 0.2361047483260792, 0.9546828139405278)),
    (0, -1, 0x61D6E745B3A5D6DB, (0.42960255707425676, 0.14888817685052147, 0.12056759159697394)),
    (-3, 2**63, 0xF787921FF68DDAB9, (0.5283261930216743, 0.41762601404789157, 0.43331650436445823)),
]


@pytest.mark.parametrize(("seed", "identity", "expected", "_"), PINNED)
def test_the_stream_of_a_seed_and_id_never_changes(seed: int, identity: RowId, expected: int, _: object) -> None:
    assert stream(seed, identity) == expected


@pytest.mark.parametrize(("seed", "identity", "_", "expected"), PINNED)
def test_the_uniforms_of_a_seed_and_id_never_change(
    seed: int, identity: RowId, _: int, expected: tuple[float, ...]
) -> None:
    assert tuple(numbers(seed, identity, 3)) == expected


def test_the_stream_of_a_second_sample_never_changes() -> None:
    assert stream(0, 0, sample=1) == 0x144071535DA96B59


def test_uniforms_are_the_upper_53_bits_of_splitmix64() -> None:
    # The first outputs for seed 1234567 of Vigna's reference implementation, splitmix64.c.
    reference = [
        6457827717110365317,
        3203168211198807973,
        9817491932198370423,
        4593380528125082431,
        16408922859458223821,
    ]
    found = uniforms(np.full(5, 1234567, dtype=np.uint64), np.arange(5, dtype=np.uint64))
    assert found.tolist() == [(value >> 11) / 2**53 for value in reference]


@pytest.mark.parametrize(
    ("one", "other"),
    [((0, 1), (0, "1")), ((0, 0), (1, 0)), ((1, 0), (0, 1)), ((0, 1, 0), (0, 1, 1)), ((12, 3), (1, 23))],
    ids=str,
)
def test_the_stream_depends_on_seed_id_its_type_and_sample(one: tuple[int, ...], other: tuple[int, ...]) -> None:
    assert stream(*one) != stream(*other)


def test_a_uniform_does_not_depend_on_the_rows_beside_it() -> None:
    streams = np.array([stream(0, identity) for identity in range(50)], dtype=np.uint64)
    positions = np.arange(50, dtype=np.uint64)[::-1]
    together = uniforms(streams, positions)
    assert [uniforms(streams[i : i + 1], positions[i : i + 1])[0] for i in range(50)] == together.tolist()


@settings(deadline=None)
@given(st.integers(0, 2**64 - 1), st.integers(0, 2**20))
def test_uniforms_are_from_0_to_below_1(start: int, position: int) -> None:
    [found] = uniforms(np.array([start], dtype=np.uint64), np.array([position], dtype=np.uint64))
    assert 0 <= found < 1


def test_the_uniforms_of_one_request_are_spread_evenly() -> None:
    observed = np.bincount((numbers(0, "spread", DRAWS) * 100).astype(int), minlength=100)
    assert chi_squared(observed, np.full(100, DRAWS / 100)) < 1


def test_the_first_uniforms_of_many_requests_are_spread_evenly() -> None:
    streams = np.array([stream(0, identity) for identity in range(DRAWS)], dtype=np.uint64)
    observed = np.bincount((uniforms(streams, np.zeros(DRAWS, dtype=np.uint64)) * 100).astype(int), minlength=100)
    assert chi_squared(observed, np.full(100, DRAWS / 100)) < 1


def test_a_uniform_says_nothing_of_the_next() -> None:
    cells = (numbers(0, "pairs", 2 * DRAWS) * 10).astype(int)
    observed = np.bincount(cells[::2] * 10 + cells[1::2], minlength=100)
    assert chi_squared(observed, np.full(100, DRAWS / 100)) < 1


def test_a_uniform_says_nothing_of_that_of_the_next_id() -> None:
    streams = np.array([stream(0, identity) for identity in range(2 * DRAWS)], dtype=np.uint64)
    cells = (uniforms(streams, np.full(2 * DRAWS, 5, dtype=np.uint64)) * 10).astype(int)
    observed = np.bincount(cells[::2] * 10 + cells[1::2], minlength=100)
    assert chi_squared(observed, np.full(100, DRAWS / 100)) < 1


TRUNCATIONS = [
    (1.0, 1.0, 0, 0.0),
    (0.7, 1.0, 0, 0.0),
    (2.5, 1.0, 0, 0.0),
    (1.0, 1.0, 3, 0.0),
    (1.6, 1.0, 7, 0.0),
    (1.0, 0.5, 0, 0.0),
    (1.3, 0.9, 0, 0.0),
    (1.0, 0.7, 4, 0.0),  # top_p of all of the mass would keep the four
    (2.0, 0.95, 6, 0.0),
    (1.0, 1.0, 0, 0.1),
    (2.0, 1.0, 0, 0.5),
    (0.5, 1.0, 0, 0.01),
    (1.0, 0.9, 0, 0.15),  # top_p of all of the mass would keep one more
    (1.5, 1.0, 3, 0.05),
    (1.5, 0.8, 7, 0.2),
]


@pytest.mark.parametrize(("temperature", "top_p", "top_k", "min_p"), TRUNCATIONS)
def test_tokens_are_drawn_with_their_renormalised_probability(
    temperature: float, top_p: float, top_k: int, min_p: float
) -> None:
    expected = truncated(LOGITS, temperature, top_p, top_k, min_p)
    tokens = draw_with(LOGITS, numbers(0, "draws", DRAWS), temperature, top_p, top_k, min_p)
    observed = np.bincount(tokens, minlength=len(LOGITS))
    assert chi_squared(observed[expected > 0], DRAWS * expected[expected > 0]) < 1


@pytest.mark.parametrize(("temperature", "top_p", "top_k", "min_p"), TRUNCATIONS)
def test_exactly_the_tokens_inside_top_k_and_top_p_are_drawn(
    temperature: float, top_p: float, top_k: int, min_p: float
) -> None:
    tokens = draw_with(LOGITS, numbers(0, "draws", DRAWS), temperature, top_p, top_k, min_p)
    assert sorted(set(tokens)) == np.flatnonzero(truncated(LOGITS, temperature, top_p, top_k, min_p)).tolist()


@pytest.mark.parametrize(("temperature", "top_p", "top_k", "min_p"), TRUNCATIONS)
@pytest.mark.parametrize("uniform", [0.0, 2.0**-53, 0.5, JUST_BELOW_1])
def test_the_token_is_where_the_cumulative_distribution_exceeds_the_uniform(
    uniform: float, temperature: float, top_p: float, top_k: int, min_p: float
) -> None:
    reached = np.cumsum(truncated(LOGITS, temperature, top_p, top_k, min_p))
    [token] = draw_with(LOGITS, [uniform], temperature, top_p, top_k, min_p)
    assert token == np.searchsorted(reached / reached[-1], uniform, side="right")


@pytest.mark.parametrize(("top_p", "top_k"), [(1.0, 1), (1e-9, 0), (1e-9, 5), (0.2, 1)])
def test_a_set_of_one_token_is_the_most_probable(top_p: float, top_k: int) -> None:
    tokens = draw_with(LOGITS, numbers(0, "one", 1000), 5.0, top_p, top_k)
    assert set(tokens) == {int(np.argmax(LOGITS))}


@pytest.mark.parametrize("uniform", [0.0, 0.5, JUST_BELOW_1])
def test_a_top_k_beyond_the_vocabulary_keeps_all(uniform: float) -> None:
    assert draw_with(LOGITS, [uniform], top_k=1000) == draw_with(LOGITS, [uniform])


@pytest.mark.parametrize("masked", [-torch.inf, torch.finfo(torch.float32).min, -1e9])
@pytest.mark.parametrize("cut", [{}, {"top_k": 2}, {"top_k": 4}, {"top_p": 0.99}, {"min_p": 0.1}], ids=str)
def test_a_token_of_probability_0_is_never_drawn(masked: float, cut: dict[str, Any]) -> None:
    logits = (masked, 1.0, masked, 1.0, masked)
    assert set(draw_with(logits, [0.0, 0.49, 0.5, JUST_BELOW_1], **cut)) == {1, 3}


def test_the_lowest_temperature_draws_the_most_probable_token() -> None:
    assert set(draw_with(LOGITS, numbers(0, "cold", 1000), temperature=1e-4)) == {int(np.argmax(LOGITS))}


@pytest.mark.parametrize(("top_k", "kept"), [(1, [1]), (2, [1, 3]), (3, [1, 3, 4]), (4, [0, 1, 3, 4])])
def test_of_equal_logits_top_k_keeps_the_first(top_k: int, kept: list[int]) -> None:
    tokens = draw_with((0.0, 2.0, 0.0, 2.0, 2.0), numbers(0, "ties", 1000), top_k=top_k)
    assert sorted(set(tokens)) == kept


@pytest.mark.parametrize("reads", [True, False])
@pytest.mark.parametrize(("top_p", "kept"), [(0.2, [0]), (0.25, [0]), (0.3, [0, 1]), (0.8, [0, 1, 2, 3])])
def test_of_equal_logits_top_p_keeps_the_first(top_p: float, kept: list[int], reads: bool) -> None:
    tokens = draw_with((1.0, 1.0, 1.0, 1.0), numbers(0, "ties", 1000), top_p=top_p, reads=reads)
    assert sorted(set(tokens)) == kept


@pytest.mark.parametrize("vocabulary", [255, 256, 257, 1000, 1024, 5000])
@pytest.mark.parametrize("spread", [0.0, 1.0, 6.0])
def test_the_token_of_a_large_vocabulary_is_where_the_distribution_exceeds_the_uniform(
    vocabulary: int, spread: float
) -> None:
    logits = (np.random.default_rng(vocabulary).normal(size=vocabulary) * spread).astype(np.float32)
    reached = np.cumsum(truncated(logits.tolist(), 0.8, 1.0, 0, 0.0))
    uniform = [0.0, JUST_BELOW_1, *numbers(0, "large", 300), *reached[100:200] * 0.9999, *reached[100:200] * 0.9]
    tokens = np.array(draw_with(logits.tolist(), uniform, temperature=0.8))
    assert (np.pad(reached, (1, 0))[tokens] - uniform <= 4e-6).all()
    assert (uniform - reached[tokens] <= 4e-6).all()


# Sets of some and of many tokens of a large vocabulary.

WIDE = [
    (1.0, 0.5, 0, 0.0),
    (1.0, 0.95, 0, 0.0),
    (0.1, 0.95, 0, 0.0),
    (1.0, 1.0, 130, 0.0),
    (1.0, 1.0, 1024, 0.0),
    (1.0, 1.0, 4097, 0.0),
    (0.5, 1.0, 0, 0.9),
    (0.5, 1.0, 0, 0.015),
    (1.0, 0.9, 3000, 0.0),
    (1.0, 0.8, 0, 0.1),
    (1.0, 0.99, 2000, 0.3),
]


@pytest.mark.parametrize("reads", [True, False])
@pytest.mark.parametrize(("temperature", "top_p", "top_k", "min_p"), WIDE)
def test_a_set_is_as_large_as_its_parameters_say(
    reads: bool, temperature: float, top_p: float, top_k: int, min_p: float
) -> None:
    logits = (-np.arange(6000.0) / 2000).astype(np.float32).tolist()
    kept = np.flatnonzero(truncated(logits, temperature, top_p, top_k, min_p))
    first, last = draw_with(logits, [0.0, JUST_BELOW_1], temperature, top_p, top_k, min_p, reads=reads)
    assert (first, last) == (0, kept.max())


@pytest.mark.parametrize("top_k", [1, 127, 128, 1023, 1024, 1500, 2999])
def test_of_many_equal_logits_top_k_keeps_the_first(top_k: int) -> None:
    assert draw_with([0.0] * 3000, [JUST_BELOW_1], top_k=top_k) == [top_k - 1]


@pytest.mark.parametrize("spread", [0.5, 3.0, 8.0])
def test_what_is_drawn_is_the_same_where_values_are_not_read(spread: float) -> None:
    logits, columns = mixed_rows(40, 5000)
    columns = columns[:-1]
    near = draw(logits * spread, *columns)
    assert draw(logits * spread, *columns, reads=False).tolist() == near.tolist()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("vocabulary", [1, 2, 10, 257, 5003])
@pytest.mark.parametrize("shape", ["smooth", "tied", "masked", "equal", "near"])
def test_a_set_is_found_without_sorting_as_it_is_by_looking_at_the_most_probable(
    shape: str, vocabulary: int, dtype: torch.dtype
) -> None:
    random, rows = np.random.default_rng(vocabulary), 120
    values = random.normal(size=(rows, vocabulary)) * random.choice([0.01, 1, 5, 30], (rows, 1))
    if shape == "tied":
        values = values.round()
    elif shape == "masked":
        values[:, 1:][random.random((rows, vocabulary - 1)) < 0.5] = -np.inf
    elif shape == "equal":
        values[:] = random.normal(size=(rows, 1))
    elif shape == "near":  # of one another, as the numbers of their type allow
        values = 1 + np.abs(values) * 1e-6
    logits = torch.tensor(values).to(dtype)
    top_p = random.choice([1.0, 1e-9, *random.random(6)], rows)
    min_p = random.choice([0.0, 0.0, 0.0, 1.0, *random.random(4) ** 3], rows)
    temperature = random.choice([0.01, 0.3, 1.0, 2.0, 50.0], rows)
    args = [torch.tensor(column)[:, None] for column in (temperature, top_p, 0 * top_p, min_p, random.random(rows))]
    expected = draw(logits, *args).tolist()
    assert draw(logits, *args, ranked=BY_MASS, reads=False).tolist() == expected


class Operators(TorchDispatchMode):
    """Remembers which operators are called."""

    def __init__(self) -> None:
        super().__init__()
        self.names: set[str] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.add(func.name().removeprefix("aten::").split(".")[0])
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(("top_k", "sorts"), [(0, False), (5, False), (1000, False), (8000, True)])
def test_on_a_device_all_logits_are_sorted_for_a_large_top_k_alone(top_k: int, sorts: bool) -> None:
    with acted() as gpu, Operators() as called:
        sampler = sampler_of([SamplingParams(temperature=1.0, top_k=top_k, top_p=0.9)], device=gpu.device)
        sampler.choose(torch.randn(1, 3000, generator=torch.manual_seed(0)), [0])
    assert ("sort" in called.names) == sorts


@pytest.mark.parametrize("top_k", [0, 127, 128, 1000, 1024, 4000, 9000])
def test_what_is_chosen_is_the_same_where_values_are_not_read(top_k: int) -> None:
    random = np.random.default_rng(top_k)
    logits = torch.tensor(random.normal(size=(40, 5000)) * 2, dtype=torch.float32)
    sampling = [
        SamplingParams(temperature=1.0 + row % 3, top_k=top_k, top_p=1 - row / 60, min_p=0.01 * (row % 2))
        for row in range(40)
    ]
    with acted() as gpu:
        tokens = choose(sampling, logits, device=gpu.device).tokens.tolist()
    assert tokens == choose(sampling, logits).tokens.tolist()


def test_what_is_drawn_does_not_depend_on_the_other_rows() -> None:
    logits, columns = mixed_rows(200)
    columns = columns[:-1]
    together = draw(logits, *columns).tolist()
    alone = [draw(logits[i : i + 1], *(column[i : i + 1] for column in columns)).item() for i in range(200)]
    assert alone == together


def test_what_is_drawn_from_a_large_vocabulary_does_not_depend_on_the_other_rows() -> None:
    logits, columns = mixed_rows(30, 5003)
    columns = columns[:-1]
    logits[::3] /= 10  # these need a look at many tokens
    together = draw(logits, *columns).tolist()
    alone = [draw(logits[i : i + 1], *(column[i : i + 1] for column in columns)).item() for i in range(30)]
    assert alone == together


def test_what_is_drawn_does_not_depend_on_the_order_of_the_rows() -> None:
    logits, columns = mixed_rows(200)
    columns = columns[:-1]
    order = torch.randperm(200, generator=torch.Generator().manual_seed(0))
    shuffled = draw(logits[order], *(column[order] for column in columns))
    assert shuffled.tolist() == draw(logits, *columns)[order].tolist()


# The sampler is the draw, with each row's own parameters, stream and position.


def test_a_sampled_row_is_drawn_with_the_uniform_of_its_seed_id_and_position() -> None:
    ids = list(range(100))
    sampler, logits = sampler_of([SamplingParams(temperature=1.0, seed=3)] * 100), torch.tensor(LOGITS).expand(100, -1)
    tokens = [sampler.choose(logits, ids).tokens.tolist() for _ in range(8)][7]
    expected = draw_with(LOGITS, [numbers(3, identity, 1, first=7)[0] for identity in ids])
    assert tokens == expected


def test_each_sample_of_a_request_is_drawn_with_a_stream_of_its_own() -> None:
    sampler, one = Sampler(50, CPU), request([0], "one", SamplingParams(temperature=1.0, n=50))
    for sample in range(50):
        sampler.set(sample, one, sample)
    tokens = sampler.choose(torch.tensor(LOGITS).expand(50, -1), list(range(50))).tokens.tolist()
    streams = np.array([stream(0, "one", sample) for sample in range(50)], dtype=np.uint64)
    assert tokens == draw_with(LOGITS, uniforms(streams, np.zeros(50, dtype=np.uint64)))


def test_a_greedy_row_takes_the_most_probable_token_beside_sampled_ones() -> None:
    sampling = [SamplingParams(temperature=3.0), SamplingParams(), SamplingParams(temperature=3.0)]
    assert choose(sampling, torch.tensor(LOGITS).expand(3, -1)).tokens[1] == int(np.argmax(LOGITS))


def test_a_sampled_row_is_the_same_beside_greedy_ones() -> None:
    hot, logits = SamplingParams(temperature=3.0, top_k=5), torch.tensor(LOGITS)
    alone = choose_often(sampler_of([hot], [9]), LOGITS, 50)
    sampler = sampler_of([SamplingParams(), hot, SamplingParams()], [0, 9, 1])
    assert [sampler.choose(logits.expand(3, -1), [0, 1, 2]).tokens[1].item() for _ in range(50)] == alone


@pytest.mark.parametrize("row", range(4))
def test_each_row_has_its_own_temperature_top_p_top_k_and_min_p(row: int) -> None:
    sampling = [
        SamplingParams(temperature=0.5),
        SamplingParams(temperature=1.0, top_p=0.5),
        SamplingParams(temperature=2.0, top_k=3),
        SamplingParams(temperature=1.5, min_p=0.3),
    ]
    sampler = sampler_of(sampling)
    logits = torch.tensor(LOGITS).expand(4, -1)
    tokens = [sampler.choose(logits, [0, 1, 2, 3]).tokens[row].item() for _ in range(200)]
    own = sampling[row]
    expected = draw_with(LOGITS, numbers(0, row, 200), own.temperature, own.top_p, own.top_k, own.min_p)
    assert tokens == expected


def test_of_equal_logits_a_greedy_row_takes_the_first() -> None:
    assert choose([SamplingParams()], torch.tensor([[0.0, 5.0, 5.0, 5.0]])).tokens.tolist() == [1]


@pytest.mark.parametrize("cut", [{"top_k": 1}, {"min_p": 1.0}], ids=str)
def test_where_one_token_is_left_a_draw_is_greedy(cut: dict[str, Any]) -> None:
    random = np.random.default_rng(0)
    logits = torch.tensor(random.permuted(np.tile(np.arange(20.0), (500, 1)), axis=1), dtype=torch.float32)
    tokens = choose([SamplingParams(temperature=2.0, **cut)] * 500, logits).tokens
    assert tokens.tolist() == choose([SamplingParams()] * 500, logits).tokens.tolist()


def test_of_equal_logits_top_k_1_takes_the_first() -> None:
    random = np.random.default_rng(0)
    logits = torch.tensor(random.integers(0, 5, size=(500, 20)), dtype=torch.float32)  # full of ties
    tokens = choose([SamplingParams(temperature=2.0, top_k=1)] * 500, logits).tokens
    assert tokens.tolist() == choose([SamplingParams()] * 500, logits).tokens.tolist()


@pytest.mark.parametrize("reads", [True, False])
@pytest.mark.parametrize("cut", [{"top_k": 1}, {"top_p": 1e-9}], ids=str)
def test_the_least_difference_of_logits_decides_which_one_token_is_left(cut: dict[str, Any], reads: bool) -> None:
    logits = (1e-3, float(np.nextafter(np.float32(1e-3), np.float32(1))), 0.0)
    assert set(draw_with(logits, [0.0, 0.5, JUST_BELOW_1], temperature=100.0, reads=reads, **cut)) == {1}


# A few most probable tokens are enough for a small top_k.


@pytest.mark.parametrize("tied", [False, True])
def test_to_look_at_a_few_tokens_changes_nothing_where_top_k_keeps_fewer(tied: bool) -> None:
    rows, random = 400, np.random.default_rng(1)
    values = random.integers(0, 4, size=(rows, 300)) if tied else random.normal(size=(rows, 300)) * 2
    columns = [
        random.choice([0.5, 1.0, 2.0], rows),
        random.choice([0.5, 0.95, 1.0], rows),
        random.choice([1, 5, 40], rows).astype(float),
        random.choice([0.0, 0.1], rows),
        random.random(rows),
    ]
    arguments = [torch.tensor(values, dtype=torch.float32), *(torch.tensor(column)[:, None] for column in columns)]
    assert draw(*arguments, ranked=41).tolist() == draw(*arguments).tolist()


# The most probable token: of few logits at once, of many in two stages.

MANY = 2**19
"""More logits than are looked at at once."""


@pytest.mark.parametrize("vocabulary", [1, 2, 1000, 1023, 1024, 1025, 2048, 3000, 5119])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("least", [0, MANY], ids=["few", "many"])
def test_the_most_probable_token_is_that_of_argmax(vocabulary: int, dtype: torch.dtype, least: int) -> None:
    generator = torch.Generator().manual_seed(vocabulary)
    rows = max(300, least // vocabulary + 1)
    logits = torch.randint(-4, 5, (rows, vocabulary), generator=generator).to(dtype)  # full of ties
    logits[100:200] = torch.randn(100, vocabulary, generator=generator).to(dtype)
    assert most_probable(logits)[1].tolist() == logits.argmax(dim=-1).tolist()


@pytest.mark.parametrize("at", [0, 1023, 1024, 2047, 2048, 2999])
def test_a_token_at_the_edge_of_a_block_is_found(at: int) -> None:
    logits = torch.zeros(MANY // 3000 + 1, 3000)
    logits[:, at] = 1.0
    assert most_probable(logits)[1].unique().tolist() == [at]


@pytest.mark.parametrize("rows", [2, MANY // 3000 + 1])
def test_nan_is_the_largest_logit(rows: int) -> None:
    logits = torch.zeros(rows, 3000)
    logits[1, 2999] = torch.nan
    best, tokens = most_probable(logits)
    assert (bool(best[1].isnan()), tokens[:2].tolist()) == (True, [0, 2999])


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
def test_a_row_whose_logits_are_no_numbers_is_not_finite(bad: float) -> None:
    logits = torch.tensor(LOGITS).repeat(3, 1)
    logits[1, 4:] = bad
    logits[1, :4] = -torch.inf
    assert choose([SamplingParams()] * 3, logits).finite.tolist() == [True, False, True]


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize(
    "sampling",
    [
        {},
        {"temperature": 1.0},
        {"temperature": 1.0, "top_k": 3, "top_p": 0.5, "min_p": 0.1},
        {"temperature": 1.0, "top_p": 0.5, "min_p": 0.1},
        {"repetition_penalty": 2.0, "frequency_penalty": 1.0},
        {"min_new_tokens": 3},
    ],
    ids=str,
)
@pytest.mark.parametrize("on_gpu", [False, True])
def test_a_row_whose_logits_are_no_numbers_gets_some_token(on_gpu: bool, bad: float, sampling: dict[str, Any]) -> None:
    with acted() as gpu:
        device = gpu.device if on_gpu else CPU
        choice = choose([SamplingParams(**sampling)], torch.full((1, 2000), bad), eos=[7], device=device)
    assert (0 <= choice.tokens.item() < 2000, choice.finite.item()) == (True, False)


# Penalties.


@pytest.mark.parametrize("penalty", [0.5, 1.3, 7.0])
def test_the_repetition_penalty_is_that_of_transformers(penalty: float) -> None:
    prompt, steps, random = [3, 1, 3, 9], 12, np.random.default_rng(0)
    sampler = sampler_of([SamplingParams(repetition_penalty=penalty)], prompts=[prompt])
    process, tokens, expected = RepetitionPenaltyLogitsProcessor(penalty), list(prompt), []
    for _ in range(steps):
        logits = torch.tensor(random.normal(size=(1, 12)), dtype=torch.float32)
        expected.append(int(process(torch.tensor([tokens]), logits).argmax()))
        tokens.append(int(sampler.choose(logits, [0]).tokens.item()))
    assert tokens[len(prompt) :] == expected


def test_the_repetition_penalty_changes_logits_as_transformers_does() -> None:
    logits, seen = torch.tensor([LOGITS]), torch.zeros(1, len(LOGITS), dtype=torch.bool)
    seen[0, [1, 2, 8]] = True
    none = torch.zeros(1, 1)
    found = penalise(logits, seen, None, torch.tensor([[1.7]]), none, none)
    expected = RepetitionPenaltyLogitsProcessor(1.7)(torch.tensor([[1, 2, 8, 2]]), logits)
    assert found.tolist() == expected.tolist()


def penalised_choices(logits: Sequence[float], presence: float, frequency: float, count: int) -> list[int]:
    """Return the greedy choices from the same logits, by the formula of OpenAI's documentation."""
    tokens: list[int] = []
    for _ in range(count):
        times = np.bincount(tokens, minlength=len(logits)) if tokens else np.zeros(len(logits))
        tokens.append(int(np.argmax(np.array(logits) - frequency * times - presence * (times > 0))))
    return tokens


@pytest.mark.parametrize(("presence", "frequency"), [(0.5, 0.0), (0.0, 0.3), (1.0, 0.25), (-0.5, 0.7), (0.3, -0.1)])
def test_presence_and_frequency_penalties_are_subtracted(presence: float, frequency: float) -> None:
    sampling = SamplingParams(presence_penalty=presence, frequency_penalty=frequency)
    logits = np.random.default_rng(0).normal(size=12).tolist()
    assert choose_often(sampler_of([sampling]), logits, 60) == penalised_choices(logits, presence, frequency, 60)


@pytest.mark.parametrize("penalty", ["presence_penalty", "frequency_penalty"])
def test_presence_and_frequency_penalties_do_not_count_the_prompt(penalty: str) -> None:
    best = int(np.argmax(LOGITS))
    sampler = sampler_of([SamplingParams(**{penalty: 2.0})], prompts=[[best] * 5])  # type: ignore[arg-type]
    assert choose_often(sampler, LOGITS, 1) == [best]


def test_the_repetition_penalty_comes_before_the_frequency_penalty() -> None:
    sampler = sampler_of([SamplingParams(repetition_penalty=2.0, frequency_penalty=1.0)], prompts=[[4]])
    # 4.0, then 4 / 2 - 1 = 1.0 and not (4 - 1) / 2 = 1.5.
    assert choose_often(sampler, (4.0, 1.2, 0.0, 0.0, 0.0), 2) == [0, 1]


def test_a_penalty_changes_no_row_beside_its_own() -> None:
    sampling = [SamplingParams(), SamplingParams(frequency_penalty=2.0, repetition_penalty=3.0), SamplingParams()]
    sampler, logits = sampler_of(sampling), torch.tensor(LOGITS).expand(3, -1)
    choices = [sampler.choose(logits, [0, 1, 2]).tokens.tolist() for _ in range(5)]
    best = int(np.argmax(LOGITS))
    assert [(first, last) for first, _, last in choices] == [(best, best)] * 5


def test_penalties_leave_the_logits_as_they_were() -> None:
    logits = torch.tensor([LOGITS])
    sampler = sampler_of([SamplingParams(frequency_penalty=2.0, repetition_penalty=3.0, min_new_tokens=9)], eos=[2])
    for _ in range(3):
        sampler.choose(logits, [0])
    assert torch.equal(logits, torch.tensor([LOGITS]))


@pytest.mark.parametrize("prompt", [[0] * 9, [99, 2]])
def test_a_prompt_token_without_a_logit_is_no_harm(prompt: list[int]) -> None:
    assert len(choose_often(sampler_of([SamplingParams(repetition_penalty=2.0)], prompts=[prompt]), LOGITS, 2)) == 2


def test_tokens_are_drawn_with_their_probability_after_the_penalties() -> None:
    penalties = {"repetition_penalty": 1.8, "presence_penalty": 0.6, "frequency_penalty": 0.3}
    sampling = SamplingParams(temperature=1.3, **penalties)  # type: ignore[arg-type]
    prompt, forced = [1, 2, 2], [6, 6, 3]
    sampler = sampler_of([sampling] * DRAWS, prompts=[prompt] * DRAWS)
    slots = list(range(DRAWS))
    for token in forced:  # so that all have generated the same
        only = torch.full((1, len(LOGITS)), -1e9)
        only[0, token] = 0.0
        sampler.choose(only.expand(DRAWS, -1), slots)
    tokens = sampler.choose(torch.tensor(LOGITS).expand(DRAWS, -1), slots).tokens
    weights = np.array(LOGITS)
    for token in {*prompt, *forced}:
        weights[token] = weights[token] / 1.8 if weights[token] > 0 else weights[token] * 1.8
    times = np.bincount(forced, minlength=len(LOGITS))
    weights = np.exp((weights - 0.3 * times - 0.6 * (times > 0)) / 1.3)
    observed = np.bincount(tokens.numpy(), minlength=len(LOGITS))
    assert chi_squared(observed, DRAWS * weights / weights.sum()) < 1


# No ending token before min_new_tokens.


def test_no_ending_token_is_chosen_before_min_new_tokens() -> None:
    sampler = sampler_of([SamplingParams(min_new_tokens=3)], eos=[BEST])
    assert choose_often(sampler, LOGITS, 5) == [NEXT, NEXT, NEXT, BEST, BEST]


def test_no_stop_token_is_chosen_before_min_new_tokens() -> None:
    sampler = sampler_of([SamplingParams(min_new_tokens=2, stop_token_ids=(BEST, 2**31 - 1))])
    assert choose_often(sampler, LOGITS, 3) == [NEXT, NEXT, BEST]


def test_an_ignored_ending_token_is_chosen_before_min_new_tokens() -> None:
    sampler = sampler_of([SamplingParams(min_new_tokens=3, ignore_eos=True)], eos=[BEST])
    assert choose_often(sampler, LOGITS, 1) == [BEST]


def test_no_ending_token_is_drawn_before_min_new_tokens() -> None:
    sampler = sampler_of([SamplingParams(min_new_tokens=200, temperature=1.5)], eos=[BEST, NEXT])
    tokens = choose_often(sampler, LOGITS, 400)
    assert ({BEST, NEXT} & set(tokens[:200]), {BEST, NEXT} & set(tokens[200:])) == (set(), {BEST, NEXT})


@pytest.mark.parametrize(("bad", "expected"), [(1.0, True), (torch.nan, False)])
def test_logits_of_tokens_that_are_held_back_must_be_numbers_too(bad: float, expected: bool) -> None:
    logits = torch.tensor([[bad, 0.0]])
    for held in ([0], [0, 1]):
        assert choose([SamplingParams(min_new_tokens=1)], logits, eos=held).finite.item() == expected


def test_each_row_has_its_own_min_new_tokens() -> None:
    sampler = sampler_of([SamplingParams(min_new_tokens=n) for n in (0, 1, 3)], eos=[BEST])
    logits = torch.tensor(LOGITS).expand(3, -1)
    choices = [sampler.choose(logits, [0, 1, 2]).tokens.tolist() for _ in range(4)]
    assert choices == [[BEST, NEXT, NEXT], [BEST, BEST, NEXT], [BEST, BEST, NEXT], [BEST, BEST, BEST]]


# Log probabilities.


@pytest.mark.parametrize(
    "sampling",
    [
        {},
        {"temperature": 0.3, "top_k": 2},
        {"repetition_penalty": 5.0, "frequency_penalty": 2.0, "min_new_tokens": 2},
    ],
    ids=str,
)
def test_log_probabilities_are_those_of_the_logits_before_any_parameter(sampling: dict[str, Any]) -> None:
    choice = choose([SamplingParams(logprobs=0, **sampling)], torch.tensor([LOGITS]), prompts=[[2, 6]], eos=[2])
    assert choice.logprobs is not None
    exact = torch.tensor(LOGITS, dtype=torch.float64).log_softmax(dim=-1)
    assert choice.logprobs.read()[0][0] == pytest.approx(exact[choice.tokens[0]].item(), abs=1e-6)


@pytest.mark.parametrize("count", [1, 3, 10])
def test_the_most_probable_tokens_come_with_their_log_probabilities(count: int) -> None:
    choice = choose([SamplingParams(logprobs=count)], torch.tensor([LOGITS]))
    assert choice.logprobs is not None
    exact = torch.tensor(LOGITS, dtype=torch.float64).log_softmax(dim=-1)
    tokens = sorted(range(len(LOGITS)), key=lambda token: -LOGITS[token])[:count]
    assert choice.logprobs.read()[0][1] == tuple((t, pytest.approx(exact[t].item(), abs=1e-6)) for t in tokens)


def test_each_row_has_as_many_log_probabilities_as_it_asks_for() -> None:
    sampling = [SamplingParams(logprobs=count) for count in (None, 2, 0, None, 5)]
    choice = choose(sampling, torch.tensor(LOGITS).expand(5, -1))
    assert choice.logprobs is not None
    assert {row: len(top) for row, (_, top) in choice.logprobs.read().items()} == {1: 2, 2: 0, 4: 5}


def test_where_no_row_asks_there_are_no_log_probabilities() -> None:
    assert choose([SamplingParams()] * 2, torch.tensor(LOGITS).expand(2, -1)).logprobs is None


def test_a_vocabulary_smaller_than_what_is_asked_for_gives_all_of_it() -> None:
    choice = choose([SamplingParams(logprobs=20)], torch.tensor([LOGITS]))
    assert choice.logprobs is not None
    assert len(choice.logprobs.read()[0][1]) == len(LOGITS)


def test_the_log_probability_of_an_impossible_token_is_a_number() -> None:
    choice = choose([SamplingParams(logprobs=2)], torch.tensor([[1.0, -torch.inf]]))
    assert choice.logprobs is not None
    assert all(math.isfinite(value) for _, value in choice.logprobs.read()[0][1])


# Slots.


@pytest.mark.parametrize("number", range(len(KINDS)))
@pytest.mark.parametrize("before", range(len(KINDS)))
def test_a_slot_that_is_taken_again_holds_nothing_of_the_request_before(number: int, before: int) -> None:
    sampler = sampler_of([kind(before)], ["before"], prompts=[prompt_of(before)], eos=[BEST])
    choose_often(sampler, LOGITS, 7)
    sampler.set(0, request(prompt_of(number), "after", kind(number)))
    fresh = sampler_of([kind(number)], ["after"], prompts=[prompt_of(number)], eos=[BEST])
    assert choose_often(sampler, LOGITS, 12) == choose_often(fresh, LOGITS, 12)


def test_what_is_chosen_does_not_depend_on_slots_and_on_who_comes_and_goes() -> None:
    # 40 requests through 7 slots, each for some tokens, in batches of changing slots; and each alone.
    random = np.random.default_rng(0)
    table = torch.tensor(random.normal(size=(40, 16, 10)) * 2, dtype=torch.float32)
    sampler, chosen = Sampler(7, CPU, [BEST]), [[] for _ in range(40)]  # type: ignore[var-annotated]
    live: dict[int, int] = {}
    waiting = list(range(40))
    while waiting or live:
        for slot in range(7):
            if slot not in live and waiting and random.random() < 0.5:
                live[slot] = waiting.pop(0)
                sampler.set(slot, request(prompt_of(live[slot]), live[slot], kind(live[slot] % len(KINDS))))
        slots = [slot for slot in random.permutation(7).tolist() if slot in live and random.random() < 0.8]
        if slots:
            logits = torch.stack([table[live[slot], len(chosen[live[slot]])] for slot in slots])
            for slot, token in zip(slots, sampler.choose(logits, slots).tokens.tolist(), strict=True):
                chosen[live[slot]].append(token)
                if len(chosen[live[slot]]) == 5 + live[slot] % 11:
                    del live[slot]
    alone = []
    for number in range(40):
        one = sampler_of([kind(number)], [number], [prompt_of(number)], [BEST])
        count = 5 + number % 11
        alone.append([one.choose(table[number, step][None], [0]).tokens.item() for step in range(count)])
    assert chosen == alone


def test_what_is_chosen_does_not_depend_on_how_many_rows_are_drawn_at_a_time() -> None:
    sampling, vocabulary = [kind(n) for n in range(100)], 50_000  # so many logits are drawn from ten rows at a time
    logits = torch.tensor(np.random.default_rng(0).normal(size=(100, vocabulary)) * 2, dtype=torch.float32)
    alone = [choose(sampling[n : n + 1], logits[n : n + 1], [n]).tokens.item() for n in range(100)]
    assert choose(sampling, logits).tokens.tolist() == alone


def test_a_slot_that_no_request_has_taken_cannot_be_chosen_for() -> None:
    with pytest.raises(ValueError, match="no request has taken"):
        Sampler(2, CPU).choose(torch.tensor([LOGITS]), [1])


class Lagging(TorchDispatchMode):
    """Fails at whatever reads values from the device, which would wait for it."""

    READS = ("_local_scalar_dense", "nonzero", "masked_select", "equal", "unique")

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.name().removeprefix("aten::").split(".")[0]
        assert not name.startswith(self.READS), name
        if name in ("index", "index_put", "index_put_", "_index_put_impl_"):
            assert all(index is None or index.dtype != torch.bool for index in args[1]), f"{name} with a mask"
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("noise", [None, 1e-5])
def test_choosing_reads_nothing_from_the_device(noise: float | None) -> None:
    rows = list(range(len(KINDS)))
    with acted() as gpu, Lagging():
        prompts = [prompt_of(n) for n in rows]
        sampler = sampler_of([kind(n) for n in rows], None, prompts, [BEST], noise, gpu.device)
        for _ in range(6):
            sampler.choose(torch.tensor(LOGITS).expand(len(rows), -1), rows)
