"""Prompts share what they have in common at their beginning, against brute force."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hpc.arrays import Ints
from hpc.plan.prefix import BLOCK, cuts

Prompt = list[int]


def cut_of(prompts: list[Prompt]) -> tuple[list[int], list[int]]:
    """Return the cut and the group of each prompt."""
    lengths = np.array([len(prompt) for prompt in prompts], dtype=np.int64)
    tokens = np.array([token for prompt in prompts for token in prompt], dtype=np.int32)
    cut, group = cuts(tokens, np.cumsum(lengths) - lengths, lengths)
    return cut.tolist(), group.tolist()


def members(group: list[int]) -> list[list[int]]:
    """Return the indices of each group's prompts."""
    return [[at for at, name in enumerate(group) if name == one] for one in sorted(set(group) - {-1})]


def common(prompts: list[Prompt]) -> int:
    """Return how many first tokens all prompts share, one by one."""
    shared = 0
    for tokens in zip(*prompts, strict=False):
        if len(set(tokens)) > 1:
            break
        shared += 1
    return shared


@st.composite
def corpora(draw: st.DrawFn) -> list[Prompt]:
    """Prompts that are cut, joined and altered parts of a few texts: they share much, at odd places."""
    texts = [[7] * 100, [7] * 40 + [8] * 60, list(range(100)), list(range(37)) + [5] * 63]
    prompts = []
    for _ in range(draw(st.integers(0, 12))):
        prompt = draw(st.sampled_from(texts))[: draw(st.integers(0, 100))]
        prompts.append(prompt + draw(st.lists(st.integers(0, 2), max_size=20)))
    return prompts


ANY = settings(deadline=None, max_examples=50)


def best_saving(prompts: list[Prompt], index: int) -> float:
    """Return the most that a prompt saves: c*(1 - 1/g) over all whole blocks that g prompts share."""
    most = 0.0
    for depth in range(BLOCK, len(prompts[index]), BLOCK):
        sharing = sum(prompt[:depth] == prompts[index][:depth] and len(prompt) > depth for prompt in prompts)
        if sharing > 1:
            most = max(most, depth * (1 - 1 / sharing))
    return most


@ANY
@given(corpora())
def test_a_cut_is_shorter_than_its_prompt(prompts: list[Prompt]) -> None:
    cut, _ = cut_of(prompts)
    assert all(0 <= at < max(1, len(prompt)) for at, prompt in zip(cut, prompts, strict=True))


@ANY
@given(corpora())
def test_a_prompt_has_a_cut_if_and_only_if_it_has_a_group(prompts: list[Prompt]) -> None:
    cut, group = cut_of(prompts)
    assert [at > 0 for at in cut] == [name >= 0 for name in group]


@ANY
@given(corpora())
def test_a_group_has_at_least_two_prompts(prompts: list[Prompt]) -> None:
    assert all(len(rows) >= 2 for rows in members(cut_of(prompts)[1]))


@ANY
@given(corpora())
def test_the_prompts_of_a_group_have_one_cut(prompts: list[Prompt]) -> None:
    cut, group = cut_of(prompts)
    assert all(len({cut[row] for row in rows}) == 1 for rows in members(group))


@ANY
@given(corpora())
def test_the_prompts_of_a_group_are_equal_up_to_their_cut(prompts: list[Prompt]) -> None:
    cut, group = cut_of(prompts)
    assert all(len({tuple(prompts[row][: cut[row]]) for row in rows}) == 1 for rows in members(group))


@ANY
@given(corpora())
def test_a_cut_is_at_the_end_of_what_its_group_shares_or_a_block_behind_where_it_was_found(
    prompts: list[Prompt],
) -> None:
    cut, group = cut_of(prompts)
    for rows in members(group):
        own = [prompts[row] for row in rows]
        shared = min(common(own), min(map(len, own)) - 1)
        assert cut[rows[0]] == shared or (cut[rows[0]] % BLOCK == 0 and shared > cut[rows[0]] >= 2 * BLOCK)


@ANY
@given(corpora())
def test_prompts_of_different_groups_with_one_cut_differ_before_it(prompts: list[Prompt]) -> None:
    cut, group = cut_of(prompts)
    beginnings = [tuple(prompts[rows[0]][: cut[rows[0]]]) for rows in members(group)]
    assert len(set(beginnings)) == len(beginnings)


@ANY
@given(corpora())
def test_a_prompt_that_shares_no_block_has_no_cut(prompts: list[Prompt]) -> None:
    cut, _ = cut_of(prompts)
    assert all(cut[row] == 0 for row in range(len(prompts)) if best_saving(prompts, row) == 0)


@ANY
@given(corpora())
def test_whole_blocks_of_a_cut_are_the_best_for_the_prompt(prompts: list[Prompt]) -> None:
    cut, _ = cut_of(prompts)
    for row, prompt in enumerate(prompts):
        if cut[row]:
            depths = range(BLOCK, cut[row] + 1, BLOCK)
            sharing = [sum(other[:at] == prompt[:at] and len(other) > at for other in prompts) for at in depths]
            saved = max(at * (1 - 1 / count) for at, count in zip(depths, sharing, strict=True))
            assert saved >= best_saving(prompts, row) - 1e-9


@ANY
@given(corpora(), st.randoms(use_true_random=False))
def test_the_order_of_the_prompts_changes_no_cut(prompts: list[Prompt], numbers) -> None:  # type: ignore[no-untyped-def]
    order = list(range(len(prompts)))
    numbers.shuffle(order)
    cut, _ = cut_of(prompts)
    assert cut_of([prompts[row] for row in order])[0] == [cut[row] for row in order]


@pytest.mark.parametrize("count", [2, 64])
def test_prompts_with_300_tokens_in_common_are_all_cut_there(count: int) -> None:
    header = [token % 97 for token in range(300)]
    prompts = [header + [100 + row] * (1 + row % 30) for row in range(count)]
    assert cut_of(prompts) == ([300] * count, [cut_of(prompts)[1][0]] * count)


def test_a_lone_prompt_has_no_cut() -> None:
    assert cut_of([list(range(100))]) == ([0], [-1])


def test_no_prompts_have_no_cuts() -> None:
    assert cut_of([]) == ([], [])


def test_equal_prompts_share_all_but_the_last_token() -> None:
    assert cut_of([list(range(50))] * 3)[0] == [49] * 3


def test_prompts_that_share_less_than_a_block_are_not_cut() -> None:
    assert cut_of([[1] * (BLOCK - 1) + [2] * 20, [1] * (BLOCK - 1) + [3] * 20])[0] == [0, 0]


def test_prompts_that_share_one_block_are_cut_there() -> None:
    assert cut_of([[1] * BLOCK + [2] * 20, [1] * BLOCK + [3] * 20])[0] == [BLOCK, BLOCK]


def test_a_prompt_that_is_another_ones_beginning_is_cut_before_its_last_token() -> None:
    assert cut_of([[1] * 40, [1] * 90])[0] == [39, 39]


def test_a_pair_that_shares_much_more_than_the_others_has_a_cut_of_its_own() -> None:
    header, document = [1] * 20, [2] * 400
    prompts = [header + [10 + row] * 30 for row in range(6)] + [header + document + [3], header + document + [4]]
    assert cut_of(prompts)[0] == [20] * 6 + [420] * 2


def test_a_pair_that_shares_little_more_than_many_others_is_cut_with_them() -> None:
    header = [1] * 160
    prompts = [header + [10 + row] * 30 for row in range(20)]
    prompts += [header + [9] * 20 + [row] for row in range(2)]
    assert cut_of(prompts)[0] == [160] * 22


def test_the_arrays_have_the_shape_of_the_lengths() -> None:
    none: Ints = np.zeros(0, dtype=np.int64)
    cut, group = cuts(np.zeros(0, dtype=np.int32), none, none)
    assert (cut.shape, group.shape) == ((0,), (0,))
