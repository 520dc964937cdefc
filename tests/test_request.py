"""A completion's key is a hash of what it depends on, and of nothing else."""

import dataclasses
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hpc.arrays import Tokens
from hpc.request import KEY_BYTES, Completion, Request, RowId, Sample, completion_key
from hpc.sampling_params import SamplingParams

DRAWN = SamplingParams(temperature=1.0)
TOKEN_IDS = st.lists(st.integers(0, 3), max_size=6)


def int32(*token_ids: int) -> Tokens:
    return np.array(token_ids, dtype=np.int32)


def test_a_key_has_its_length() -> None:
    assert len(completion_key(int32(1, 2), SamplingParams(), 0)) == KEY_BYTES


@settings(deadline=None)
@given(TOKEN_IDS, TOKEN_IDS)
def test_keys_are_equal_exactly_where_the_prompts_are(one: list[int], other: list[int]) -> None:
    keys = [completion_key(int32(*token_ids), SamplingParams(), 0) for token_ids in (one, other)]
    assert (keys[0] == keys[1]) == (one == other)


@pytest.mark.parametrize(
    "same", [np.array([1, 2, 3]), np.array([1, 0, 2, 0, 3], dtype=np.int32)[::2], np.array([1, 2, 3], dtype=">i4")]
)
def test_a_key_does_not_depend_on_how_the_tokens_lie_in_memory(same: Tokens) -> None:
    assert completion_key(same, DRAWN, 0) == completion_key(int32(1, 2, 3), DRAWN, 0)


@pytest.mark.parametrize("other", ["a", 7])
def test_equal_greedy_requests_share_a_key_whatever_their_ids(other: RowId) -> None:
    assert completion_key(int32(1), SamplingParams(), 0) == completion_key(int32(1), SamplingParams(), other)


def test_greedy_requests_share_a_key_whatever_their_seeds() -> None:
    assert completion_key(int32(1), SamplingParams(seed=1), 0) == completion_key(int32(1), SamplingParams(), 0)


@pytest.mark.parametrize(("one", "other"), [(0, 1), ("a", "b"), (1, "1")])
def test_sampled_requests_with_other_ids_have_other_keys(one: RowId, other: RowId) -> None:
    assert completion_key(int32(1), DRAWN, one) != completion_key(int32(1), DRAWN, other)


@pytest.mark.parametrize("change", [{"seed": 1}, {"temperature": 0.5}, {"top_k": 3}, {"max_new_tokens": 3}])
def test_sampled_requests_with_other_parameters_have_other_keys(change: dict[str, Any]) -> None:
    assert completion_key(int32(1), DRAWN, 0) != completion_key(int32(1), dataclasses.replace(DRAWN, **change), 0)


@pytest.mark.parametrize("change", [{"max_new_tokens": 3}, {"stop": ("a",)}, {"ignore_eos": True}])
def test_greedy_requests_that_end_otherwise_have_other_keys(change: dict[str, Any]) -> None:
    assert completion_key(int32(1), SamplingParams(), 0) != completion_key(int32(1), SamplingParams(**change), 0)


def test_a_lone_surrogate_in_an_id_has_a_key() -> None:
    assert completion_key(int32(1), DRAWN, "\ud800") != completion_key(int32(1), DRAWN, "\ud801")


def test_a_request_holds_its_padded_prompt_and_its_completion() -> None:
    request = Request(0, 0, int32(1, 2, 3), SamplingParams(max_new_tokens=10), bytes(KEY_BYTES), bucket=8)
    assert request.max_tokens == 18


@pytest.mark.parametrize(
    ("sampling", "expected"),
    [
        (SamplingParams(), "4b9b4797a9f11e6c01c087b763c15508"),
        (SamplingParams(temperature=0.7, top_p=0.9, seed=7, stop=("a",)), "ed8ff4d10ac84c273a3d6e9d6588dcfe"),
    ],
    ids=["greedy", "sampled"],
)
def test_a_key_of_the_first_journals_never_changes(sampling: SamplingParams, expected: str) -> None:
    assert completion_key(int32(1, 2, 3), sampling, "x").hex() == expected


def test_a_completion_of_one_sample_has_that_sample() -> None:
    one = Completion(bytes(16), 0, 0, (1, 2), "text", "stop", logprobs=((-0.5, ()), (-1.5, ())))
    assert (one.samples, one.num_tokens) == ((Sample((1, 2), "text", "stop", one.logprobs),), 2)


def test_a_completion_of_several_samples_counts_the_tokens_of_all() -> None:
    others = Sample((3,), "more", "length"), Sample((), "", "stop")
    assert Completion(bytes(16), 0, 0, (1, 2), "text", "stop", others=others).num_tokens == 3
