"""The random numbers, and the tokens that are drawn with them."""

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hpc.engine.sample import Sampler, draw, stream, uniforms
from hpc.job import SamplingParams
from hpc.records import RowId

Floats = npt.NDArray[np.float64]

CPU = torch.device("cpu")
DRAWS = 20_000
JUST_BELOW_1 = 1 - 2.0**-53
LOGITS = (0.3, -1.2, 2.0, 1.1, -0.4, 0.9, 1.7, -2.5, 0.0, 1.4)


def numbers(seed: int, identity: RowId, count: int, first: int = 0) -> Floats:
    """Return the uniform numbers of a request at the first positions."""
    return uniforms(
        np.full(count, stream(seed, identity), dtype=np.uint64), np.arange(first, first + count, dtype=np.uint64)
    )


def chi_squared(observed: npt.NDArray[np.int64], expected: Floats) -> float:
    """Return the statistic as a share of its 0.999 quantile (Wilson and Hilferty 1931)."""
    assert expected.min() > 5
    freedom = len(expected) - 1
    quantile = freedom * (1 - 2 / (9 * freedom) + 3.09 * (2 / (9 * freedom)) ** 0.5) ** 3
    return float(((observed - expected) ** 2 / expected).sum() / quantile)


def draw_with(
    logits: Sequence[float],
    uniform: Sequence[float] | Floats,
    temperature: float = 1.0,
    top_p: float = 1.0,
    top_k: int = 0,
    noise: float = 0.0,
) -> tuple[list[int], list[bool]]:
    """Draw once from the same logits for each uniform number: tokens and whether they were close."""
    rows = len(uniform)
    columns = [torch.full((rows, 1), float(v), dtype=torch.float64) for v in (temperature, top_p, top_k, noise)]
    tokens, close = draw(
        torch.tensor(logits, dtype=torch.float32).expand(rows, -1),
        *columns[:3],
        torch.tensor(np.asarray(uniform), dtype=torch.float64)[:, None],
        columns[3],
    )
    return tokens.tolist(), close.tolist()


def truncated(logits: Sequence[float], temperature: float, top_p: float, top_k: int) -> Floats:
    """Return the distribution to draw from, computed token by token."""
    weights = np.exp(np.array(logits, dtype=np.float64) / temperature)
    order = sorted(range(len(weights)), key=lambda token: -weights[token])
    if top_k:
        order = order[:top_k]
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
    (1.0, 1.0, 0),
    (0.7, 1.0, 0),
    (2.5, 1.0, 0),
    (1.0, 1.0, 3),
    (1.6, 1.0, 7),
    (1.0, 0.5, 0),
    (1.3, 0.9, 0),
    (1.0, 0.7, 4),  # top_p of all of the mass would keep the four
    (2.0, 0.95, 6),
]


@pytest.mark.parametrize(("temperature", "top_p", "top_k"), TRUNCATIONS)
def test_tokens_are_drawn_with_their_renormalised_probability(temperature: float, top_p: float, top_k: int) -> None:
    expected = truncated(LOGITS, temperature, top_p, top_k)
    tokens, _ = draw_with(LOGITS, numbers(0, "draws", DRAWS), temperature, top_p, top_k)
    observed = np.bincount(tokens, minlength=len(LOGITS))
    assert chi_squared(observed[expected > 0], DRAWS * expected[expected > 0]) < 1


@pytest.mark.parametrize(("temperature", "top_p", "top_k"), TRUNCATIONS)
def test_exactly_the_tokens_inside_top_k_and_top_p_are_drawn(temperature: float, top_p: float, top_k: int) -> None:
    tokens, _ = draw_with(LOGITS, numbers(0, "draws", DRAWS), temperature, top_p, top_k)
    assert sorted(set(tokens)) == np.flatnonzero(truncated(LOGITS, temperature, top_p, top_k)).tolist()


@pytest.mark.parametrize(("temperature", "top_p", "top_k"), TRUNCATIONS)
@pytest.mark.parametrize("uniform", [0.0, 2.0**-53, 0.5, JUST_BELOW_1])
def test_the_token_is_where_the_cumulative_distribution_exceeds_the_uniform(
    uniform: float, temperature: float, top_p: float, top_k: int
) -> None:
    reached = np.cumsum(truncated(LOGITS, temperature, top_p, top_k))
    [token], _ = draw_with(LOGITS, [uniform], temperature, top_p, top_k)
    assert token == np.searchsorted(reached / reached[-1], uniform, side="right")


@pytest.mark.parametrize(("top_p", "top_k"), [(1.0, 1), (1e-9, 0), (1e-9, 5), (0.2, 1)])
def test_a_set_of_one_token_is_the_most_probable(top_p: float, top_k: int) -> None:
    tokens, _ = draw_with(LOGITS, numbers(0, "one", 1000), 5.0, top_p, top_k)
    assert set(tokens) == {int(np.argmax(LOGITS))}


@pytest.mark.parametrize("uniform", [0.0, 0.5, JUST_BELOW_1])
def test_a_top_k_beyond_the_vocabulary_keeps_all(uniform: float) -> None:
    assert draw_with(LOGITS, [uniform], top_k=1000) == draw_with(LOGITS, [uniform])


def test_a_token_of_probability_0_is_never_drawn() -> None:
    logits = (-torch.inf, 1.0, -torch.inf, 1.0, -torch.inf)
    assert set(draw_with(logits, [0.0, 0.49, 0.5, JUST_BELOW_1])[0]) == {1, 3}


def test_the_lowest_temperature_draws_the_most_probable_token() -> None:
    assert set(draw_with(LOGITS, numbers(0, "cold", 1000), temperature=1e-4)[0]) == {int(np.argmax(LOGITS))}


@pytest.mark.parametrize(("top_k", "kept"), [(1, [1]), (2, [1, 3]), (3, [1, 3, 4]), (4, [0, 1, 3, 4])])
def test_of_equal_logits_top_k_keeps_the_first(top_k: int, kept: list[int]) -> None:
    tokens, _ = draw_with((0.0, 2.0, 0.0, 2.0, 2.0), numbers(0, "ties", 1000), top_k=top_k)
    assert sorted(set(tokens)) == kept


@pytest.mark.parametrize(("top_p", "kept"), [(0.2, [0]), (0.25, [0]), (0.3, [0, 1]), (0.8, [0, 1, 2, 3])])
def test_of_equal_logits_top_p_keeps_the_first(top_p: float, kept: list[int]) -> None:
    tokens, _ = draw_with((1.0, 1.0, 1.0, 1.0), numbers(0, "ties", 1000), top_p=top_p)
    assert sorted(set(tokens)) == kept


def mixed_rows(rows: int) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """Return the arguments of `draw` for rows of all kinds: logits, and the columns."""
    random = np.random.default_rng(0)
    logits = torch.tensor(random.normal(size=(rows, 50)) * 3, dtype=torch.float32)
    columns = [
        random.choice([0.3, 1.0, 2.0], rows),
        random.choice([0.5, 0.9, 1.0], rows),
        random.choice([0, 1, 5, 40], rows).astype(float),
        random.random(rows),
        random.choice([0.0, 1e-3, 0.3], rows),
    ]
    return logits, [torch.tensor(column)[:, None] for column in columns]


@pytest.mark.parametrize("what", [0, 1], ids=["token", "close"])
def test_what_is_drawn_does_not_depend_on_the_other_rows(what: int) -> None:
    logits, columns = mixed_rows(200)
    together = draw(logits, *columns)[what].tolist()
    alone = [draw(logits[i : i + 1], *(column[i : i + 1] for column in columns))[what].item() for i in range(200)]
    assert alone == together


@pytest.mark.parametrize("what", [0, 1], ids=["token", "close"])
def test_what_is_drawn_does_not_depend_on_the_order_of_the_rows(what: int) -> None:
    logits, columns = mixed_rows(200)
    order = torch.randperm(200, generator=torch.Generator().manual_seed(0))
    shuffled = draw(logits[order], *(column[order] for column in columns))[what]
    assert shuffled.tolist() == draw(logits, *columns)[what][order].tolist()


# A row is close where noise could have made its token another.


def test_without_noise_no_draw_is_close() -> None:
    tied = (1.0, 1.0, 1.0, 1.0)
    assert not any(draw_with(tied, [0.0, 0.25, 0.5, JUST_BELOW_1], top_p=0.5, top_k=2)[1])


def test_without_noise_no_greedy_choice_is_close() -> None:
    _, close = Sampler([SamplingParams()], [0], CPU, noise=0.0).choose(torch.tensor([[1.0, 1.0]]), 0)
    assert not close.item()


@pytest.mark.parametrize(("second", "expected"), [(9.9, False), (9.9999, True), (10.0, True)])
def test_a_greedy_choice_is_close_where_the_best_two_are_nearer_than_the_noise(second: float, expected: bool) -> None:
    logits = torch.tensor([[second, 10.0, -10.0]])
    _, close = Sampler([SamplingParams()], [0], CPU, noise=1e-4).choose(logits, 0)
    assert close.item() == expected


def test_the_noise_is_a_share_of_the_largest_logit_of_either_sign() -> None:
    logits = torch.tensor([[1.0, 1.5, -3.0], [1.0, 1.5, -300.0]])
    _, close = Sampler([SamplingParams()] * 2, [0, 1], CPU, noise=0.01).choose(logits, 0)
    assert close.tolist() == [False, True]


@pytest.mark.parametrize("masked", [-torch.inf, torch.finfo(torch.float32).min])
def test_a_masked_token_makes_no_choice_close(masked: float) -> None:
    _, close = Sampler([SamplingParams()], [0], CPU, noise=1e-5).choose(torch.tensor([[masked, 1.0, 2.0]]), 0)
    assert not close.item()


@pytest.mark.parametrize(
    ("uniform", "expected"), [(0.25, False), (0.4999, True), (0.5, True), (0.5001, True), (0.75, False)]
)
def test_a_draw_is_close_where_the_uniform_is_at_the_border_of_two_tokens(uniform: float, expected: bool) -> None:
    assert draw_with((1.0, 1.0), [uniform], noise=0.01)[1] == [expected]


@pytest.mark.parametrize(("third", "expected"), [(0.0, False), (0.999, True)])
def test_a_draw_of_the_last_kept_token_is_close_where_the_next_disputes_its_place(third: float, expected: bool) -> None:
    [token], [close] = draw_with((1.0, 2.0, third), [0.1], top_k=2, noise=0.01)
    assert (token, close) == (0, expected)


@pytest.mark.parametrize(("top_p", "expected"), [(0.7, False), (0.7501, True), (0.7499, True), (0.8, False)])
def test_a_draw_of_the_last_kept_token_is_close_where_top_p_ends_beside_it(top_p: float, expected: bool) -> None:
    logits = np.log([0.25, 0.5, 0.15, 0.1]).tolist()
    [token], [close] = draw_with(logits, [0.15], top_p=top_p, noise=0.01)
    assert (token, close) == (0, expected)


def test_few_draws_are_close_at_the_noise_of_float32() -> None:
    random = np.random.default_rng(0)
    logits = torch.tensor(random.normal(size=(5000, 200)) * 4, dtype=torch.float32)
    sampling = SamplingParams(temperature=0.8, top_p=0.95, top_k=50)
    _, close = Sampler([sampling] * 5000, range(5000), CPU, noise=1e-5).choose(logits, 0)
    assert close.double().mean() < 0.01


@settings(derandomize=True, deadline=None, max_examples=60)
@given(
    seed=st.integers(0, 2**32 - 1),
    vocabulary=st.integers(2, 40),
    temperature=st.floats(0.2, 3),
    top_p=st.sampled_from([1.0, 0.99, 0.9, 0.5]),
    top_k=st.sampled_from([0, 1, 3, 10]),
    noise=st.sampled_from([1e-3, 1e-2, 0.1]),
)
def test_a_draw_that_is_not_close_survives_a_tenth_of_the_noise(
    seed: int, vocabulary: int, temperature: float, top_p: float, top_k: int, noise: float
) -> None:
    rows, random = 2000, np.random.default_rng(seed)
    logits = torch.tensor(random.normal(size=(rows, vocabulary)) * 2)
    moved = logits + torch.tensor(random.uniform(-noise / 10, noise / 10, size=logits.shape))
    columns = [torch.full((rows, 1), value, dtype=torch.float64) for value in (temperature, top_p, float(top_k), noise)]
    columns.insert(3, torch.tensor(random.random((rows, 1))))
    tokens, close = draw(logits, *columns)
    tokens_moved, _ = draw(moved, *columns)
    assert ((tokens == tokens_moved) | close).all()


# The sampler is the draw, with each row's own parameters, stream and position.


def test_a_sampled_row_is_drawn_with_the_uniform_of_its_seed_id_and_position() -> None:
    ids = list(range(100))
    sampling = SamplingParams(temperature=1.0, seed=3)
    tokens, _ = Sampler([sampling] * 100, ids, CPU).choose(torch.tensor(LOGITS).expand(100, -1), 7)
    expected, _ = draw_with(LOGITS, [numbers(3, identity, 1, first=7)[0] for identity in ids])
    assert tokens.tolist() == expected


def test_a_sampled_row_is_close_where_its_draw_is_and_not_where_its_best_two_are() -> None:
    tied = (2.0, 2.0)
    _, close = Sampler([SamplingParams(temperature=1.0)] * 200, range(200), CPU, noise=0.02).choose(
        torch.tensor(tied).expand(200, -1), 0
    )
    _, expected = draw_with(tied, [numbers(0, identity, 1)[0] for identity in range(200)], noise=0.04)
    assert close.tolist() == expected


def test_a_greedy_row_takes_the_most_probable_token_beside_sampled_ones() -> None:
    sampling = [SamplingParams(temperature=3.0), SamplingParams(), SamplingParams(temperature=3.0)]
    tokens, _ = Sampler(sampling, [0, 1, 2], CPU).choose(torch.tensor(LOGITS).expand(3, -1), 0)
    assert tokens[1] == int(np.argmax(LOGITS))


def test_a_sampled_row_is_the_same_beside_greedy_ones() -> None:
    hot, logits = SamplingParams(temperature=3.0, top_k=5), torch.tensor(LOGITS)
    alone = [Sampler([hot], [9], CPU).choose(logits[None], position)[0].item() for position in range(50)]
    sampler = Sampler([SamplingParams(), hot, SamplingParams()], [0, 9, 1], CPU)
    assert [sampler.choose(logits.expand(3, -1), position)[0][1].item() for position in range(50)] == alone


@pytest.mark.parametrize("row", range(3))
def test_each_row_has_its_own_temperature_top_p_and_top_k(row: int) -> None:
    sampling = [
        SamplingParams(temperature=0.5),
        SamplingParams(temperature=1.0, top_p=0.5),
        SamplingParams(temperature=2.0, top_k=3),
    ]
    sampler = Sampler(sampling, [0, 1, 2], CPU)
    logits = torch.tensor(LOGITS).expand(3, -1)
    tokens = [sampler.choose(logits, position)[0][row].item() for position in range(200)]
    own = sampling[row]
    expected, _ = draw_with(LOGITS, numbers(0, row, 200), own.temperature, own.top_p, own.top_k)
    assert tokens == expected


def test_of_equal_logits_a_greedy_row_takes_the_first() -> None:
    tokens, _ = Sampler([SamplingParams()], [0], CPU).choose(torch.tensor([[0.0, 5.0, 5.0, 5.0]]), 0)
    assert tokens.tolist() == [1]


def test_top_k_1_is_greedy() -> None:
    random = np.random.default_rng(0)
    logits = torch.tensor(random.integers(0, 5, size=(500, 20)), dtype=torch.float32)  # full of ties
    tokens, _ = Sampler([SamplingParams(temperature=2.0, top_k=1)] * 500, range(500), CPU).choose(logits, 0)
    greedy, _ = Sampler([SamplingParams()] * 500, range(500), CPU).choose(logits, 0)
    assert tokens.tolist() == greedy.tolist()


def test_a_draw_is_close_where_many_tokens_are_tied_at_the_border_of_top_k() -> None:
    tied = torch.zeros(1, 21)
    tied[0, 10] = 4.0
    moved = tied.clone()
    moved[0, 11:] += 1e-9  # other ten of the tokens are now among the eleven
    column = torch.ones(1, 1, dtype=torch.float64)
    closes = [draw(x, column, column, 11 * column, 0.05 * column, 1e-4 * column)[1].item() for x in (tied, moved)]
    assert closes == [True, True]
