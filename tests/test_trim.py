"""Where a completion ends is decided by its tokens and parameters alone."""

from collections.abc import Sequence

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hpc.job import SamplingParams
from hpc.trim import ending_tokens, ends_with_stop, trim
from tests.fakes import ByteText

EOS = 256


decode = ByteText(**{"</s>": EOS})
"""Tokens are bytes; the end-of-sequence token has no text."""


def trimmed(token_ids: Sequence[int], **sampling: object) -> tuple[tuple[int, ...], str, str | None]:
    return trim(token_ids, SamplingParams(**sampling), (EOS,), decode)  # type: ignore[arg-type]


def test_an_eos_token_ends_and_is_counted_but_not_in_the_text() -> None:
    assert trimmed([*b"abc", EOS, *b"def"]) == ((*b"abc", EOS), "abc", "stop")


def test_an_eos_token_at_the_beginning_leaves_an_empty_text() -> None:
    assert trimmed([EOS, *b"abc"]) == ((EOS,), "", "stop")


def test_the_first_of_several_eos_tokens_ends() -> None:
    assert trim(list(b"abcd"), SamplingParams(), tuple(b"cb"), decode) == (tuple(b"ab"), "a", "stop")


def test_an_ignored_eos_token_does_not_end() -> None:
    assert trimmed([*b"ab", EOS, *b"cd"], ignore_eos=True, max_new_tokens=4) == ((*b"ab", EOS, *b"c"), "abc", "length")


def test_a_stop_token_ends_and_is_not_in_the_text() -> None:
    assert trimmed(b"abcd", stop_token_ids=(ord("c"),)) == (tuple(b"abc"), "ab", "stop")


def test_a_stop_token_ends_even_where_eos_is_ignored() -> None:
    assert trimmed(b"abcd", stop_token_ids=(ord("c"),), ignore_eos=True) == (tuple(b"abc"), "ab", "stop")


def test_a_stop_string_over_several_tokens_is_cut_with_what_follows() -> None:
    assert trimmed(b"one END two", stop=("END",)) == (tuple(b"one END"), "one ", "stop")


def test_the_stop_string_that_is_complete_first_ends() -> None:
    assert trimmed(b"abcdef", stop=("bcde", "cd")) == (tuple(b"abcd"), "ab", "stop")


def test_of_two_stop_strings_complete_at_one_token_the_text_is_cut_at_the_earlier() -> None:
    assert trimmed(b"abcdef", stop=("d", "bcd")) == (tuple(b"abcd"), "a", "stop")


def test_the_first_occurrence_of_a_stop_string_ends() -> None:
    assert trimmed(b"a|b|c", stop=("|",)) == (tuple(b"a|"), "a", "stop")


def test_a_stop_string_before_an_eos_token_ends() -> None:
    assert trimmed([*b"a|b", EOS], stop=("|",)) == (tuple(b"a|"), "a", "stop")


def test_a_stop_string_behind_an_eos_token_is_not_seen() -> None:
    assert trimmed([*b"ab", EOS, *b"|"], stop=("|",)) == ((*b"ab", EOS), "ab", "stop")


def test_a_stop_string_right_before_an_eos_token_leaves_the_token_out() -> None:
    assert trimmed([*b"ab|", EOS], stop=("|",)) == (tuple(b"ab|"), "ab", "stop")


def test_a_stop_string_behind_the_limit_is_not_seen() -> None:
    assert trimmed(b"abcd|", stop=("|",), max_new_tokens=4) == (tuple(b"abcd"), "abcd", "length")


def test_a_stop_string_complete_at_the_limit_is_a_stop() -> None:
    assert trimmed(b"abc|", stop=("|",), max_new_tokens=4) == (tuple(b"abc|"), "abc", "stop")


def test_an_eos_token_at_the_limit_is_a_stop() -> None:
    assert trimmed([*b"abc", EOS], max_new_tokens=4) == ((*b"abc", EOS), "abc", "stop")


def test_the_limit_ends() -> None:
    assert trimmed(b"abcdef", max_new_tokens=3) == (tuple(b"abc"), "abc", "length")


def test_what_nothing_ends_has_no_reason() -> None:
    assert trimmed(b"abc", stop=("|",), max_new_tokens=9) == (tuple(b"abc"), "abc", None)


def test_a_character_over_several_tokens_is_one_character_of_the_text() -> None:
    assert trimmed("é€𝄞".encode(), max_new_tokens=9)[1] == "é€𝄞"


def test_a_stop_string_of_a_character_over_several_tokens_ends_at_its_last_token() -> None:
    assert trimmed("aé€b".encode(), stop=("€",)) == (tuple("aé€".encode()), "aé", "stop")


def test_half_of_a_stop_character_is_no_stop() -> None:
    assert trimmed("a€".encode()[:-1], stop=("€",))[2] is None


def test_an_ending_token_before_min_new_tokens_does_not_end() -> None:
    tokens = [EOS, *b"a", EOS, *b"b"]
    assert trimmed(tokens, min_new_tokens=1) == ((EOS, *b"a", EOS), "a", "stop")


def test_an_ending_token_right_behind_min_new_tokens_ends() -> None:
    assert trimmed([*b"ab", EOS, *b"c"], min_new_tokens=2) == ((*b"ab", EOS), "ab", "stop")


@pytest.mark.parametrize(("least", "kept"), [(0, b"a|"), (2, b"a|"), (3, b"a|b|"), (4, b"a|b|"), (5, b"a|b|cd")])
def test_a_stop_string_complete_before_min_new_tokens_does_not_end(least: int, kept: bytes) -> None:
    assert trimmed(b"a|b|cd", stop=("|",), min_new_tokens=least, max_new_tokens=6)[0] == tuple(kept)


def test_a_stop_string_that_begins_before_min_new_tokens_and_ends_there_ends() -> None:
    assert trimmed(b"xENDy", stop=("END",), min_new_tokens=4) == (tuple(b"xEND"), "x", "stop")


def test_a_stop_string_that_does_not_count_stays_in_the_text() -> None:
    assert trimmed(b"a|b|c", stop=("|",), min_new_tokens=3)[1] == "a|b"


def test_a_stop_character_whose_last_token_is_the_least_ends() -> None:
    assert trimmed("a€b".encode(), stop=("€",), min_new_tokens=4) == (tuple("a€".encode()), "a", "stop")


def test_a_stop_character_whose_last_token_is_before_the_least_does_not_end() -> None:
    assert trimmed("a€b".encode(), stop=("€",), min_new_tokens=5)[2] is None


STOPS = ["a", "ab", "aab", "b a", "é", "€", "𝄞", "𝄞€"]
TOKEN_IDS = st.lists(
    st.sampled_from(["a", "b", " ", "é", "€", "𝄞"]).map(lambda text: list(text.encode()))
    | st.sampled_from([EOS, *"é€𝄞".encode()]).map(lambda token: [token]),
    max_size=16,
).map(lambda parts: [token for part in parts for token in part])
"""Whole characters, and what a model that is cut or confused makes of them."""
SAMPLING = st.builds(
    lambda least, **other: SamplingParams(min_new_tokens=min(least, other["max_new_tokens"]), **other),
    least=st.just(0) | st.integers(0, 12),
    max_new_tokens=st.integers(1, 20),
    stop=st.lists(st.sampled_from(STOPS), max_size=2).map(tuple),
    stop_token_ids=st.lists(st.sampled_from([*b"a "]), max_size=1).map(tuple),
    ignore_eos=st.booleans(),
)


@settings(deadline=None)
@given(TOKEN_IDS, SAMPLING)
def test_trimming_what_is_trimmed_changes_nothing(token_ids: list[int], sampling: SamplingParams) -> None:
    once = trim(token_ids, sampling, (EOS,), decode)
    assert trim(once[0], sampling, (EOS,), decode) == once


@settings(deadline=None)
@given(TOKEN_IDS, SAMPLING)
def test_no_shorter_beginning_ends(token_ids: list[int], sampling: SamplingParams) -> None:
    kept, _, _ = trim(token_ids, sampling, (EOS,), decode)
    assert [trim(kept[:length], sampling, (EOS,), decode)[2] for length in range(len(kept))] == [None] * len(kept)


@settings(deadline=None)
@given(TOKEN_IDS, SAMPLING, TOKEN_IDS)
def test_what_comes_behind_the_end_changes_nothing(
    token_ids: list[int], sampling: SamplingParams, more: list[int]
) -> None:
    once = trim(token_ids, sampling, (EOS,), decode)
    if once[2] is not None:
        assert trim([*token_ids, *more], sampling, (EOS,), decode) == once


@settings(deadline=None)
@given(TOKEN_IDS, st.lists(st.sampled_from(STOPS), min_size=1, max_size=2), st.just(0) | st.integers(0, 14))
def test_a_check_of_the_last_tokens_finds_the_end_where_trim_cuts(
    token_ids: list[int], stop: list[str], least: int
) -> None:
    sampling = SamplingParams(stop=tuple(stop), ignore_eos=True, max_new_tokens=100, min_new_tokens=least)
    kept, _, reason = trim(token_ids, sampling, (), decode)
    lengths = range(1, len(token_ids) + 1)
    found = next((n for n in lengths if ends_with_stop(token_ids[:n], tuple(stop), decode, least)), None)
    assert found == (len(kept) if reason == "stop" else None)


@pytest.mark.parametrize(("least", "expected"), [(2, [2, 3, 4]), (3, [4]), (4, [4]), (5, [])])
def test_a_check_of_the_last_tokens_passes_over_what_was_complete_before_min_new_tokens(
    least: int, expected: list[int]
) -> None:
    found = [n for n in range(1, 5) if ends_with_stop(b"a|b|"[:n], ("|",), decode, least)]
    assert found == expected


def test_a_check_of_the_last_tokens_may_begin_behind_min_new_tokens() -> None:
    assert ends_with_stop(b"a" * 50 + b"|", ("|",), decode, 10)


def test_without_stop_strings_nothing_ends_with_one() -> None:
    assert not ends_with_stop(b"abc", (), decode)


@pytest.mark.parametrize(("ignore_eos", "expected"), [(False, {5, EOS}), (True, {5})])
def test_the_ending_tokens_are_those_asked_for_and_the_models_own(ignore_eos: bool, expected: set[int]) -> None:
    assert ending_tokens(SamplingParams(stop_token_ids=(5,), ignore_eos=ignore_eos), (EOS,)) == expected
