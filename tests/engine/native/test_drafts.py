"""What is guessed, and when; what an engine makes of it is in test_engine.py."""

from typing import Any

import pytest

from hpc.engine.native.drafts import MAX_DRAFT, MIN_ACCEPTED, PAUSE, ROWS, NgramDrafts, accepted
from hpc.engine.native.scheduled_step import LiveSequence
from hpc.engine.sequence import Sequence
from hpc.sampling_params import SamplingParams
from tests.engine.oracle import request


def row_of(prompt: list[int], generated: list[int], slot: int = 0, **sampling: Any) -> LiveSequence:
    """Return a row that decodes; the last of the generated tokens is the newest."""
    asked = request(prompt, slot, SamplingParams(**{"max_new_tokens": 100, **sampling}))
    limit = asked.sampling.max_new_tokens
    sequence = Sequence(asked, list(generated))
    return LiveSequence(asked.token_ids, 0, 1000, slot, sequence, num_scheduled=len(generated) + 1, limit=limit)


def guess(row: LiveSequence, room: int = 100) -> list[int]:
    return NgramDrafts().draft([row], [room])[0]


REPEATED = [1, 2, 3, 4, 5, 6, 7, 8, 9]


def test_what_followed_the_last_tokens_before_is_guessed() -> None:
    assert guess(row_of(REPEATED, [1, 2, 3])) == [4, 5, 6, 7]


def test_where_the_last_tokens_stand_across_the_prompts_end_they_are_found() -> None:
    assert guess(row_of([*REPEATED, 1], [2, 3])) == [4, 5, 6, 7]


def test_what_was_generated_is_searched_too() -> None:
    assert guess(row_of([50], [*REPEATED, 1, 2, 3])) == [4, 5, 6, 7]


def test_of_several_places_the_last_counts() -> None:
    assert guess(row_of([1, 2, 3, 4, 4, 4, 1, 2, 3, 5, 6, 7, 8], [1, 2, 3])) == [5, 6, 7, 8]


def test_what_never_stood_together_is_no_reason_to_guess() -> None:
    assert guess(row_of(REPEATED, [1, 3, 5])) == []


def test_two_tokens_are_too_few_to_guess_from() -> None:
    assert guess(row_of([1, 2], [])) == []


def test_a_text_that_goes_in_circles_is_guessed_to_go_on() -> None:
    assert guess(row_of([7, 8, 7, 8, 7], [8])) == [7, 8, 7, 8]


def test_no_more_is_guessed_than_there_is_room_for() -> None:
    assert guess(row_of(REPEATED, [1, 2, 3]), room=2) == [4, 5]


def test_what_is_generated_between_two_guesses_is_searched_at_the_second() -> None:
    row, drafts = row_of([50], [1, 2, 3]), NgramDrafts()
    assert row.sequence is not None
    assert drafts.draft([row], [100]) == [[]]
    row.sequence.token_ids += [9, 8, 7, 6, 1, 2, 3]
    assert drafts.draft([row], [100]) == [[9, 8, 7, 6]]


def test_a_new_row_in_a_slot_has_nothing_of_the_one_before_it() -> None:
    drafts = NgramDrafts()
    drafts.draft([row_of(REPEATED, [1, 2, 3])], [100])
    assert drafts.draft([row_of([50], [1, 2, 3])], [100]) == [[]]


@pytest.mark.parametrize(
    "sampling",
    [{"temperature": 1.0}, {"repetition_penalty": 1.1}, {"logprobs": 0}, {"min_new_tokens": 4}],
    ids=lambda sampling: next(iter(sampling)),
)
def test_a_row_whose_next_token_is_not_just_the_most_probable_is_not_guessed(sampling: dict[str, Any]) -> None:
    assert guess(row_of(REPEATED, [1, 2, 3], **sampling)) == []


def test_a_row_is_guessed_once_it_has_its_least_tokens() -> None:
    assert guess(row_of(REPEATED, [1, 2, 3], min_new_tokens=3)) == [4, 5, 6, 7]


def test_a_step_has_no_more_rows_than_are_cheap() -> None:
    rows = [row_of(REPEATED, [1, 2, 3], slot) for slot in range(ROWS - MAX_DRAFT)]
    assert len(rows) + sum(map(len, NgramDrafts().draft(rows, [100] * len(rows)))) == ROWS


def test_the_row_that_may_go_on_for_longest_is_guessed_first() -> None:
    rows = [row_of(REPEATED, [1, 2, 3], slot, max_new_tokens=10 + slot) for slot in range(ROWS - 1)]
    assert [index for index, guessed in enumerate(NgramDrafts().draft(rows, [100] * len(rows))) if guessed] == [
        ROWS - 2
    ]


def test_while_guesses_are_wrong_there_are_none() -> None:
    drafts, row = NgramDrafts(), row_of(REPEATED, [1, 2, 3])
    drafts.learn(1000, 0)
    assert [drafts.draft([row], [100])[0] for _ in range(PAUSE)] == [[]] * PAUSE


def test_after_a_pause_guesses_are_tried_again() -> None:
    drafts, row = NgramDrafts(), row_of(REPEATED, [1, 2, 3])
    drafts.learn(1000, 0)
    for _ in range(PAUSE):
        drafts.draft([row], [100])
    assert drafts.draft([row], [100]) == [[4, 5, 6, 7]]


def test_while_more_guesses_are_right_than_must_be_they_go_on() -> None:
    drafts, row = NgramDrafts(), row_of(REPEATED, [1, 2, 3])
    for _ in range(1000):
        drafts.learn(10, int(10 * MIN_ACCEPTED) + 3)
    assert drafts.draft([row], [100]) == [[4, 5, 6, 7]]


@pytest.mark.parametrize(
    ("first", "draft", "behind", "known"),
    [
        (1, [], [], []),
        (1, [1, 2, 3], [2, 3, 4], [2, 3, 4]),
        (1, [1, 2, 3], [2, 9, 4], [2, 9]),
        (1, [1, 2, 3], [9, 3, 4], [9]),
        (1, [5, 2, 3], [2, 3, 4], []),
        (1, [1, 2, 3], [2, -1, 4], [2]),
    ],
    ids=["none", "all right", "the last wrong", "the second wrong", "the first wrong", "no number"],
)
def test_what_is_known_ends_behind_the_last_guess_that_was_right(
    first: int, draft: list[int], behind: list[int], known: list[int]
) -> None:
    assert accepted(first, draft, behind) == known
