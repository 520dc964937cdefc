"""Where a completion ends is decided by its tokens and parameters alone."""

from collections.abc import Sequence
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hpc.model.detokenizer import detokenizer
from hpc.sampling_params import SamplingParams
from hpc.trim import Decode, ending_tokens, ends_with_stop, trim
from tests.decoders import KINDS, WITH_BYTES, byte_token, tokenizer
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


# Stop strings that name special tokens, which have no text.


@pytest.mark.parametrize(
    ("stop", "kept", "text"),
    [
        ("</s>", [*b"ok", EOS], "ok"),
        ("k</s>", [*b"ok", EOS], "o"),
        ("</s>b", [*b"ok", EOS, *b"b"], "ok"),
        ("k</s>b", [*b"ok", EOS, *b"b"], "o"),
        ("kb", [*b"ok", EOS, *b"b"], "o"),
        ("</s></s>", [*b"ok", EOS, *b"b", EOS, EOS], "okb"),
    ],
)
@pytest.mark.parametrize("eos", [(), (9,)], ids=["no ending token", "another ending token"])
def test_a_stop_string_that_names_a_special_token_ends_with_it(
    stop: str, kept: list[int], text: str, eos: tuple[int, ...]
) -> None:
    token_ids = [*b"ok", EOS, *b"b", EOS, EOS, *b"c"]
    assert trim(token_ids, SamplingParams(stop=(stop,)), eos, decode) == (tuple(kept), text, "stop")


def test_a_stop_string_that_names_the_ending_token_is_cut_with_what_stands_before_it() -> None:
    assert trimmed([*b"ok", EOS, *b"c"], stop=("k</s>",)) == ((*b"ok", EOS), "o", "stop")


def test_a_stop_string_that_is_the_ending_token_ends_even_where_eos_is_ignored() -> None:
    assert trimmed([*b"ok", EOS, *b"c"], stop=("</s>",), ignore_eos=True) == ((*b"ok", EOS), "ok", "stop")


def test_the_name_of_a_special_token_that_is_written_out_is_a_stop_string_too() -> None:
    assert trimmed(b"ok</s>c", stop=("</s>",)) == (tuple(b"ok</s>"), "ok", "stop")


@pytest.mark.parametrize("stop", ["/s", "s>", "<", "k</", "</s>>"])
def test_a_part_of_a_special_tokens_name_is_not_in_the_token(stop: str) -> None:
    token_ids = [*b"ok", EOS, *b"c"]
    assert trimmed(token_ids, stop=(stop,), ignore_eos=True, max_new_tokens=4) == (tuple(token_ids), "okc", "length")


@pytest.mark.parametrize(("least", "count"), [(0, 2), (2, 2), (3, 4), (5, 5)])
def test_a_special_token_before_min_new_tokens_completes_no_stop_string(least: int, count: int) -> None:
    token_ids = [*b"a", EOS, *b"b", EOS, *b"c"]
    kept, _, _ = trimmed(token_ids, stop=("</s>",), ignore_eos=True, min_new_tokens=least, max_new_tokens=5)
    assert kept == tuple(token_ids[:count])


def test_of_two_special_tokens_the_longer_name_is_meant() -> None:
    named = ByteText(**{"</s>": 300, "</s>x": 301})
    assert trim([97, 300, 98, 301], SamplingParams(stop=("</s>x",)), (), named) == ((97, 300, 98, 301), "ab", "stop")


def test_a_special_token_between_the_bytes_of_a_character_leaves_it_whole() -> None:
    assert trimmed([0xC3, EOS, 0xA9, EOS, 98], stop=("é</s>b",), ignore_eos=True)[1:] == ("", "stop")


# With the decoders of language models.

DECODE = {kind: detokenizer(tokenizer(kind)) for kind in KINDS}


def ids(kind: str, *tokens: str) -> list[int]:
    """Return the ids of tokens, bytes written as 0xA9."""
    made = tokenizer(kind)
    return [byte_token(kind, int(token, 16)) if token.startswith("0x") else made.token_to_id(token) for token in tokens]


def first_end(
    token_ids: Sequence[int], sampling: SamplingParams, eos: Sequence[int], read: Decode, prompt: Sequence[int]
) -> tuple[list[int], str, str | None]:
    """Return what `trim` does, found token by token."""
    names = {token: chr(0x10FF00 + at) for at, token in enumerate(read.special_tokens.values())}

    def named(tokens: Sequence[int]) -> str:
        parts = [names.get(t) or read([t], [*prompt, *tokens[:at]]) for at, t in enumerate(tokens)]
        return "".join(parts)

    def without_names(text: str) -> str:
        return "".join(char for char in text if char not in names.values())

    stops = list(sampling.stop)
    for name, token in read.special_tokens.items():
        stops += [string.replace(name, names[token]) for string in sampling.stop if name in string]
    done = (0, 0)
    for count in range(1, min(len(token_ids), sampling.max_new_tokens) + 1):
        ends = token_ids[count - 1] in ending_tokens(sampling, eos)
        texts = (named(token_ids[:count]), read(token_ids[:count], prompt))
        if ends and token_ids[count - 1] not in names:
            texts = (named(token_ids[: count - 1]), read(token_ids[: count - 1], prompt))
        if count >= sampling.min_new_tokens:
            begins = [
                len(without_names(text[:at]))
                for text, before in zip(texts, done, strict=True)
                for stop in stops
                for at in range(len(text))
                if text.startswith(stop, at) and at + len(stop) > before
            ]
            if begins:
                return list(token_ids[:count]), read(token_ids[:count], prompt)[: min(begins)], "stop"
            if ends and count > sampling.min_new_tokens:
                return list(token_ids[:count]), read(token_ids[: count - 1], prompt), "stop"
        else:
            done = (len(texts[0]), len(texts[1]))
    kept = list(token_ids[: sampling.max_new_tokens])
    return kept, read(kept, prompt), "length" if len(kept) == sampling.max_new_tokens else None


@st.composite
def ended(draw: st.DrawFn, kind: str) -> tuple[list[int], list[int], SamplingParams]:
    """Return prompt and tokens of a kind of tokenizer, and where to end, a stop string often cut out of the text."""
    some = [*range(tokenizer(kind).get_vocab_size())]
    if kind in WITH_BYTES:
        some = [*ids(kind, *(f"0x{byte:02X}" for byte in "é日😀".encode())), *some[-25:]]
    tokens = st.lists(st.sampled_from(some), max_size=10)
    prompt, token_ids = draw(tokens), draw(tokens)
    written = tokenizer(kind).decode([*prompt[-1:], *token_ids], skip_special_tokens=False)
    at, length = draw(st.integers(0, max(0, len(written) - 1))), draw(st.integers(1, 12))
    strings = draw(st.lists(st.sampled_from([written[at : at + length] or "a", " ", "</s>", "日", "s>"]), max_size=2))
    least, most = sorted((draw(st.just(0) | st.integers(0, 6)), draw(st.integers(1, 12))))
    return prompt, token_ids, SamplingParams(stop=tuple(strings), min_new_tokens=least, max_new_tokens=max(1, most))


def test_a_stop_string_that_names_a_special_token_does_not_go_on_behind_another() -> None:
    token_ids = ids("words", "<s>", "</s>", "<unk>")
    kept, text, reason = trim(token_ids, SamplingParams(stop=("<s> ",)), (), DECODE["words"], ids("words", "<unk>"))
    assert (list(kept), text, reason) == (token_ids, " <unk>", None)


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "bpe"])
@settings(deadline=None, max_examples=100)
@given(st.data())
def test_trim_cuts_where_a_check_of_every_token_does(kind: str, data: st.DataObject) -> None:
    prompt, token_ids, sampling = data.draw(ended(kind))
    eos, read = ids(kind, "<|im_end|>"), DECODE[kind]
    kept, text, reason = trim(token_ids, sampling, eos, read, prompt)
    assert (list(kept), text, reason) == first_end(token_ids, sampling, eos, read, prompt)


@pytest.mark.parametrize("kind", KINDS)
@settings(deadline=None, max_examples=40)
@given(st.data())
def test_the_check_of_the_last_tokens_ends_where_trim_does(kind: str, data: st.DataObject) -> None:
    prompt, token_ids, sampling = data.draw(ended(kind))
    kept, _, reason = trim(token_ids, replace(sampling, max_new_tokens=20), (), DECODE[kind], prompt)
    found = [
        count
        for count in range(1, len(token_ids) + 1)
        if ends_with_stop(token_ids[:count], sampling.stop, DECODE[kind], sampling.min_new_tokens, prompt)
    ]
    assert found[:1] == ([len(kept)] if reason == "stop" else [])


@pytest.mark.parametrize("kind", WITH_BYTES)
def test_a_stop_string_among_bytes_that_are_no_characters_ends(kind: str) -> None:
    token_ids = ids(kind, "0xFF", "0xC3", "0xC3", "0xA9", "0x80", "0xE6", "0x97", "0xA5", "0xFF")
    kept, text, _ = trim(token_ids, SamplingParams(stop=("日",)), (), DECODE[kind], ids(kind, "a"))
    assert (kept, text) == (tuple(token_ids[:8]), "\ufffd\ufffdé\ufffd")


def test_a_stop_string_begins_with_the_first_space_of_the_completion() -> None:
    token_ids = ids("llama", "▁is", "▁b")
    found = trim(token_ids, SamplingParams(stop=(" is",)), (), DECODE["llama"], ids("llama", "▁a"))
    assert found == (tuple(token_ids[:1]), "", "stop")


def test_a_check_of_the_last_tokens_sees_the_first_space_of_the_completion() -> None:
    assert ends_with_stop(ids("llama", "▁is"), (" is",), DECODE["llama"], 0, ids("llama", "▁a"))


def test_without_stop_strings_nothing_ends_with_one() -> None:
    assert not ends_with_stop(b"abc", (), decode)


@pytest.mark.parametrize(("ignore_eos", "expected"), [(False, {5, EOS}), (True, {5})])
def test_the_ending_tokens_are_those_asked_for_and_the_models_own(ignore_eos: bool, expected: set[int]) -> None:
    assert ending_tokens(SamplingParams(stop_token_ids=(5,), ignore_eos=ignore_eos), (EOS,)) == expected
