"""The text of more tokens begins with the text of fewer, and prompt and completion read on."""

import itertools

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hpc.model.detokenizer import ByText, ByToken, detokenizer
from tests.decoders import KINDS, SPECIAL, WITH_BYTES, byte_token, tokenizer

DECODE = {kind: detokenizer(tokenizer(kind)) for kind in KINDS}
BYTES = {kind: [byte_token(kind, byte) for byte in range(256)] for kind in WITH_BYTES}


def ids(kind: str, *tokens: str) -> list[int]:
    """Return the ids of tokens."""
    found = [tokenizer(kind).token_to_id(token) for token in tokens]
    assert None not in found
    return found


def whole_tokens(kind: str) -> st.SearchStrategy[list[int]]:
    """Return any tokens but those of single bytes beyond ASCII, with special ones and ids that no token has."""
    size = tokenizer(kind).get_vocab_size()
    cut = set(BYTES[kind][0x80:]) if kind in WITH_BYTES else set()
    return st.lists(st.sampled_from([token for token in range(size + 3) if token not in cut]), max_size=8)


def any_tokens(kind: str) -> st.SearchStrategy[list[int]]:
    """Return any tokens; of bytes those of which characters are made, more often."""
    parts = whole_tokens(kind)
    if kind in WITH_BYTES:
        characters = st.lists(st.sampled_from([*"é日😀\ufffd".encode(), 0xFF, 0xED, 0xA0, 0x41]), max_size=8)
        parts |= characters.map(lambda some: [BYTES[kind][byte] for byte in some])
    return st.lists(parts, max_size=3).map(lambda lists: [token for some in lists for token in some])


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "bpe"])
def test_the_bytes_of_tokens_are_looked_up_for_decoders_that_take_each_alone(kind: str) -> None:
    assert isinstance(DECODE[kind], ByToken)


def test_texts_are_compared_for_a_decoder_that_does_not() -> None:
    assert isinstance(DECODE["bpe"], ByText)


@pytest.mark.parametrize("kind", KINDS)
@settings(deadline=None, max_examples=40)
@given(st.data())
def test_the_text_of_whole_characters_is_the_librarys(kind: str, data: st.DataObject) -> None:
    tokens = data.draw(whole_tokens(kind))
    assert DECODE[kind](tokens) == tokenizer(kind).decode(tokens, skip_special_tokens=True)


@pytest.mark.parametrize("kind", KINDS)
@settings(deadline=None, max_examples=40)
@given(st.data())
def test_prompt_and_completion_read_on(kind: str, data: st.DataObject) -> None:
    prompt, tokens = data.draw(any_tokens(kind)), data.draw(any_tokens(kind))
    decode = DECODE[kind]
    assert decode(prompt) + decode(tokens, prompt) == decode([*prompt, *tokens])


def is_cut(raw: bytes) -> bool:
    """Say whether more bytes can make a character of the last ones."""
    more = [bytes(some) for length in (1, 2, 3) for some in itertools.product((0x80, 0x90, 0xA0), repeat=length)]
    return any(is_character(raw[-size:] + behind) for size in range(1, min(3, len(raw)) + 1) for behind in more)


def is_character(raw: bytes) -> bool:
    """Say whether bytes are one character."""
    try:
        return len(raw.decode()) == 1
    except UnicodeDecodeError:
        return False


@pytest.mark.parametrize("kind", WITH_BYTES)
@settings(deadline=None, max_examples=40)
@given(st.lists(st.sampled_from([*"é日😀\ufffd".encode(), 0xFF, 0xC0, 0x41])).map(bytes))
def test_the_text_of_any_bytes_is_theirs_up_to_the_last_whole_character(kind: str, raw: bytes) -> None:
    text = DECODE[kind]([BYTES[kind][byte] for byte in raw], ids(kind, "a"))
    expected = raw.decode(errors="replace")
    assert text == (expected[:-1] if is_cut(raw) else expected)


@pytest.mark.parametrize(("cut", "text"), [(4, "é"), (5, "é日"), (6, "é日"), (8, "é日"), (9, "é日😀")])
@pytest.mark.parametrize("kind", WITH_BYTES)
def test_of_a_character_that_is_cut_nothing_is_there_and_all_before_it_stays(kind: str, cut: int, text: str) -> None:
    assert DECODE[kind]([BYTES[kind][byte] for byte in "é日😀".encode()[:cut]]) == text


@pytest.mark.parametrize("kind", WITH_BYTES)
def test_bytes_that_are_no_character_leave_those_around_them(kind: str) -> None:
    assert DECODE[kind]([BYTES[kind][byte] for byte in b"\xc3\xa9\xff\xf0\x9f\xe6\x97\xa5"]) == "é\ufffd\ufffd日"


@pytest.mark.parametrize("kind", WITH_BYTES)
def test_a_character_that_begins_in_the_prompt_is_in_the_completion(kind: str) -> None:
    raw = [BYTES[kind][byte] for byte in "a日".encode()]
    assert DECODE[kind](raw[2:], raw[:2]) == "日"


@pytest.mark.parametrize("kind", ["llama", "metaspace"])
@pytest.mark.parametrize(
    ("prompt", "text"), [(["▁a"], " is b"), (["<s>"], "is b"), ([], "is b"), (["<s>", "▁"], " is b")]
)
def test_a_completion_begins_with_its_space_where_something_stands_before_it(
    kind: str, prompt: list[str], text: str
) -> None:
    assert DECODE[kind](ids(kind, "▁is", "</s>", "▁b"), ids(kind, *prompt)) == text


def test_a_word_that_goes_on_with_the_prompts_last_has_no_space() -> None:
    assert DECODE["wordpiece"](ids("wordpiece", "##b", "is"), ids("wordpiece", "a")) == "b is"


def test_special_tokens_far_back_in_a_prompt_do_not_hide_its_text() -> None:
    prompt = ids("bpe", "a</w>", *["<|im_end|>"] * 100)
    assert DECODE["bpe"](ids("bpe", "is</w>"), prompt) == " is"


@pytest.mark.parametrize("kind", KINDS)
def test_special_tokens_are_known_by_name(kind: str) -> None:
    assert DECODE[kind].special_tokens == dict(zip(SPECIAL, ids(kind, *SPECIAL), strict=True))


def test_a_tokenizer_of_which_nothing_is_known_gives_text_up_to_its_last_whole_character() -> None:
    decode = ByText(lambda tokens: bytes(tokens).decode(errors="replace"), {})
    raw = list("aé日".encode())
    assert [decode(raw[1:end], raw[:1]) for end in range(1, 7)] == ["", "", "é", "é", "é", "é日"]
