"""Rows for an encoder-decoder: limits of source and output, languages, the token that an output begins with."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from hpc.corpus.files import Blocks, name_files
from hpc.corpus.limits import OutputLimits, PromptLimits
from hpc.corpus.store import Arrays
from hpc.corpus.tokenize import Checker
from hpc.corpus.translation import Translation
from hpc.sampling_params import SamplingParams
from tests.conftest import write_corpus
from tests.fakes import ByteTokenizer

SIDES = OutputLimits(vocab_size=100, tokens=8)
END = 9


class Ending(ByteTokenizer):
    """Its special token is byte 9, behind the text."""

    def encode(self, texts: Sequence[str], special_tokens: bool) -> list[list[int]]:
        return [[*ids, *[END] * special_tokens] for ids in super().encode(texts, special_tokens)]


class Templateless(Ending):
    """The tokenizer of a base model."""

    has_template = False


class Numbered:
    """Languages that are numbers, before the source and at the beginning of the output."""

    in_source = False

    def encode(self, texts: Sequence[str], source: str) -> list[list[int]]:
        return [[int(source or 0), *text.encode(), END] for text in texts]

    def mark(self, text: str, target: str) -> str:
        return text

    def target_token(self, target: str) -> int | None:
        return int(target)

    def problem(self, name: str, code: object) -> str | None:
        return None if str(code).isdigit() else f'"{name}" is {code!r}; it must be a number'


class Marked(Numbered):
    """Languages that the source text names."""

    in_source = True

    def mark(self, text: str, target: str) -> str:
        return f">>{target}<<{text}"

    def target_token(self, target: str) -> int | None:
        return None


def blocks_of(tmp_path: Path, rows: Sequence[Any]) -> Blocks:
    return Blocks(name_files([write_corpus(tmp_path / "corpus.jsonl", rows)]))


def check(tmp_path: Path, *rows: Any, cut: str = "none", output: OutputLimits | None = SIDES, **more: Any) -> Arrays:
    [block] = blocks_of(tmp_path, rows)
    limits = PromptLimits(256, 6, cut, output=output)
    must_name = output is not None and not output.begins
    translation = Translation(**more, must_name_target=must_name)
    return Checker(SamplingParams(), limits, Ending(), translation=translation).check_block(block)


def prompts(rows: Arrays) -> list[list[int]]:
    ends = rows["lengths"].cumsum()
    return [rows["tokens"][end - length : end].tolist() for end, length in zip(ends, rows["lengths"], strict=True)]


def errors(rows: Arrays) -> list[str]:
    found = [json.loads(line) for line in rows["errors"].tobytes().splitlines()]
    return [f"{each['error']['kind']}: {each['error']['message']}" for each in found]


def sampling(rows: Arrays) -> list[dict[str, Any]]:
    return [json.loads(line).get("sampling", {}) for line in rows["requests"].tobytes().splitlines()]


# Limits.


def test_a_source_may_fill_the_encoder_and_leaves_the_output_its_own_limit(tmp_path: Path) -> None:
    rows = check(tmp_path, {"prompt": "abcde"}, {"prompt": "a"})
    assert prompts(rows) == [[*b"abcde", END], [*b"a", END]]
    assert rows["new_tokens"].tolist() == [8, 8]


def test_an_output_without_a_limit_is_as_long_as_asked_for(tmp_path: Path) -> None:
    rows = check(tmp_path, {"prompt": "a"}, output=OutputLimits(100, None))
    assert rows["new_tokens"].tolist() == [256]


def test_min_new_tokens_is_clamped_with_max_new_tokens(tmp_path: Path) -> None:
    rows = check(tmp_path, {"prompt": "a", "sampling": {"max_new_tokens": 20, "min_new_tokens": 10}})
    assert sampling(rows) == [{"max_new_tokens": 8, "min_new_tokens": 8}]


def test_a_source_that_the_encoder_cannot_take_is_refused(tmp_path: Path) -> None:
    [error] = errors(check(tmp_path, {"prompt": "abcdef"}))
    assert error.startswith(
        "too_long: corpus.jsonl:1: the prompt has 7 tokens; the encoder of the model takes at most 6"
    )
    assert "--truncate-prompts" in error


@pytest.mark.parametrize(("side", "text"), [("right", b"abcde"), ("left", b"cdefg")])
def test_a_source_that_is_cut_keeps_its_special_tokens(tmp_path: Path, side: str, text: bytes) -> None:
    assert prompts(check(tmp_path, {"prompt": "abcdefg"}, cut=side)) == [[*text, END]]


@pytest.mark.parametrize(("side", "text"), [("right", b"abcd"), ("left", b"defg")])
def test_a_source_that_is_cut_keeps_its_language(tmp_path: Path, side: str, text: bytes) -> None:
    row = {"prompt": "abcdefg", "source_lang": "5", "target_lang": "7"}
    assert prompts(check(tmp_path, row, cut=side, languages=Numbered())) == [[5, *text, END]]


def test_token_ids_that_are_cut_have_no_special_tokens(tmp_path: Path) -> None:
    assert prompts(check(tmp_path, {"prompt_token_ids": [*range(1, 9)]}, cut="right")) == [[1, 2, 3, 4, 5, 6]]


# The first token of the output.


@pytest.mark.parametrize(("output", "token"), [(None, 5), (SIDES, 100)])
def test_a_first_token_that_the_output_cannot_have_is_refused(
    tmp_path: Path, output: OutputLimits | None, token: int
) -> None:
    row = {"prompt": "a", "sampling": {"forced_bos_token_id": token}}
    [error] = errors(check(tmp_path, row, output=output))
    assert error.startswith(f'sampling: corpus.jsonl:1: "forced_bos_token_id" is {token}')


# Languages.


def test_a_rows_languages_go_before_the_jobs(tmp_path: Path) -> None:
    rows = [{"prompt": "a"}, {"prompt": "a", "source_lang": "5", "target_lang": "7"}]
    found = check(tmp_path, *rows, languages=Numbered(), source_lang="1", target_lang="2")
    assert prompts(found) == [[1, *b"a", END], [5, *b"a", END]]
    assert [each["forced_bos_token_id"] for each in sampling(found)] == [2, 7]


def test_the_languages_are_a_part_of_the_key(tmp_path: Path) -> None:
    pairs = [("1", "2"), ("1", "3"), ("4", "2"), ("1", "2")]
    rows = [{"prompt": "a", "source_lang": source, "target_lang": target} for source, target in pairs]
    keys = [key.tobytes() for key in check(tmp_path, *rows, languages=Numbered())["keys"]]
    assert (len(set(keys)), keys[0]) == (3, keys[3])


def test_a_first_token_of_the_rows_own_goes_before_its_language(tmp_path: Path) -> None:
    row = {"prompt": "a", "target_lang": "7", "sampling": {"forced_bos_token_id": 8}}
    assert sampling(check(tmp_path, row, languages=Numbered()))[0]["forced_bos_token_id"] == 8


def test_a_target_that_the_source_names_stands_before_it(tmp_path: Path) -> None:
    rows = check(tmp_path, {"prompt": "", "prompt_token_ids": None, "target_lang": "7"}, languages=Marked())
    assert errors(rows)[0].startswith("empty")
    texts = [{"prompt": "abcdef", "target_lang": "7"}, {"prompt": ">>8<<f"}]
    assert prompts(check(tmp_path, *texts, cut="left", languages=Marked())) == [[0, *b"cdef", END], [0, *b"8<<f", END]]


@pytest.mark.parametrize("languages", [Numbered(), Marked()], ids=["token", "source"])
def test_a_row_that_names_no_target_is_refused(tmp_path: Path, languages: Any) -> None:
    [error] = errors(check(tmp_path, {"prompt": "a"}, languages=languages))
    assert error.startswith("language: ")
    assert '"target_lang"' in error
    assert "--target-lang" in error


def test_a_model_that_writes_one_language_needs_no_target(tmp_path: Path) -> None:
    assert (
        errors(check(tmp_path, {"prompt": "a"}, languages=Numbered(), output=OutputLimits(100, 8, begins=True))) == []
    )


@pytest.mark.parametrize("name", ["source_lang", "target_lang"])
def test_a_language_that_the_model_has_not_is_refused(tmp_path: Path, name: str) -> None:
    row = {"prompt": "a", "target_lang": "7", name: "x"}
    assert errors(check(tmp_path, row, languages=Numbered())) == [
        f"language: corpus.jsonl:1: \"{name}\" is 'x'; it must be a number"
    ]


def test_a_marian_model_takes_any_source_language(tmp_path: Path) -> None:
    class AnySource(Marked):
        def problem(self, name: str, code: object) -> str | None:
            return None

        def encode(self, texts: Sequence[str], source: str) -> list[list[int]]:
            return [list(text.encode()) for text in texts]

    rows = check(tmp_path, {"prompt": ">>8<<", "source_lang": ["any"]}, languages=AnySource())
    assert (prompts(rows), errors(rows)) == ([[*b">>8<<"]], [])


def test_languages_of_rows_mean_nothing_to_a_model_without_any(tmp_path: Path) -> None:
    rows = check(tmp_path, {"prompt": "a", "target_lang": ["any"]})
    assert (prompts(rows), errors(rows)) == ([[*b"a", END]], [])


@pytest.mark.parametrize(
    ("languages", "given", "problem"),
    [
        (None, {}, None),
        (Numbered(), {"source_lang": "1", "target_lang": "2"}, None),
        (None, {"target_lang": "2"}, "\"target_lang\" is '2', and the tokenizer of the model knows no languages"),
        (Numbered(), {"source_lang": "x"}, "\"source_lang\" is 'x'; it must be a number"),
    ],
)
def test_the_jobs_languages_must_be_the_models(languages: Any, given: dict[str, str], problem: str | None) -> None:
    found = Translation(languages, **given).problem()
    assert found == problem or (found is not None and problem is not None and found.startswith(problem))


# Instructions, for models without an encoder.

ASKED = "Into {target_lang}: {prompt}"


@pytest.mark.parametrize(
    ("encoder", "text"), [(Ending(), b"[user]Into xx: a"), (Templateless(), bytes([*b"Into xx: a", END]))]
)
def test_a_prompt_is_put_into_the_instruction(tmp_path: Path, encoder: Ending, text: bytes) -> None:
    [block] = blocks_of(tmp_path, [{"prompt": "a", "target_lang": "xx"}])
    translation = Translation(instruction=ASKED, target_lang="yy")
    checker = Checker(SamplingParams(), PromptLimits(256, 99), encoder, translation=translation)
    assert prompts(checker.check_block(block)) == [list(text)]
    assert translation.problem() is None


def test_what_a_prompt_says_of_places_stays_as_it_is(tmp_path: Path) -> None:
    [block] = blocks_of(tmp_path, [{"prompt": "{prompt}{target_lang}"}])
    translation = Translation(instruction=ASKED, target_lang="y")
    checker = Checker(SamplingParams(), PromptLimits(256, 99), Ending(), translation=translation)
    assert prompts(checker.check_block(block)) == [list(b"[user]Into y: {prompt}{target_lang}")]


def test_a_row_whose_language_an_instruction_lacks_is_refused(tmp_path: Path) -> None:
    [error] = errors(check(tmp_path, {"prompt": "a"}, output=None, instruction=ASKED))
    assert error.startswith("language: ")
    assert "--target-lang" in error


def test_token_ids_are_no_business_of_an_instruction(tmp_path: Path) -> None:
    rows = check(tmp_path, {"prompt_token_ids": [1, 2]}, output=None, instruction=ASKED)
    assert prompts(rows) == [[1, 2]]
