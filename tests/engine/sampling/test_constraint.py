"""Which tokens must not be chosen, and when."""

import pytest

from hpc.engine.sampling.constraint import MinNewTokens, constraint_of, is_free_from
from hpc.sampling_params import SamplingParams


def test_the_ending_tokens_are_forbidden_before_min_new_tokens() -> None:
    constraint = MinNewTokens(2, {7, 3})
    assert [constraint.forbidden(position).tolist() for position in range(4)] == [[3, 7], [3, 7], [], []]


@pytest.mark.parametrize("position", [0, 5])
def test_what_is_forbidden_is_the_same_array_while_nothing_changes(position: int) -> None:
    constraint = MinNewTokens(2, {7, 3})
    assert constraint.forbidden(position) is constraint.forbidden(position + 1)


@pytest.mark.parametrize(
    ("sampling", "eos", "constrained"),
    [
        ({}, [1], False),
        ({"min_new_tokens": 1}, [1], True),
        ({"min_new_tokens": 1}, [], False),
        ({"min_new_tokens": 1, "ignore_eos": True}, [1], False),
        ({"min_new_tokens": 1, "ignore_eos": True, "stop_token_ids": (4,)}, [1], True),
    ],
    ids=str,
)
def test_a_request_has_a_constraint_where_tokens_that_end_it_come_too_early(
    sampling: dict[str, int], eos: list[int], constrained: bool
) -> None:
    assert (constraint_of(SamplingParams(**sampling), eos) is not None) == constrained  # type: ignore[arg-type]


def test_no_token_is_forbidden_from_min_new_tokens_on() -> None:
    sampling = SamplingParams(min_new_tokens=3)
    constraint = constraint_of(sampling, [1])
    assert constraint is not None
    assert [is_free_from(sampling, position) for position in range(5)] == [
        not len(constraint.forbidden(position)) for position in range(5)
    ]
