"""Every rule for a row: what breaks it is one error row that says where, what, the rule and the way out."""

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from hpc.corpus.files import Blocks, name_files
from hpc.corpus.notes import Notes
from hpc.corpus.store import Arrays
from hpc.corpus.tokenize import Encoder
from hpc.request import KEY_BYTES, completion_key
from hpc.sampling_params import SamplingParams
from tests.conftest import write_corpus
from tests.fakes import VOCABULARY, ByteTokenizer
from tests.stores import make_checker


class Templateless(ByteTokenizer):
    """The tokenizer of a base model."""

    has_template = False


class Picky(ByteTokenizer):
    """Raises for texts with a q."""

    def encode(self, texts: Sequence[str], special_tokens: bool) -> list[list[int]]:
        if any("q" in text for text in texts):
            raise RuntimeError("no q")
        return super().encode(texts, special_tokens)


class Silent(ByteTokenizer):
    """Finds no token in any text."""

    def encode(self, texts: Sequence[str], special_tokens: bool) -> list[list[int]]:
        return [[] for _ in texts]


class Beginning(ByteTokenizer):
    """Its special token is byte 1, before the text."""

    def encode(self, texts: Sequence[str], special_tokens: bool) -> list[list[int]]:
        return [[1] * special_tokens + ids for ids in super().encode(texts, special_tokens)]


def check_file(path: Path, **limits: Any) -> Arrays:
    [block] = Blocks(name_files([path]), 1 << 20)
    return make_checker(**limits).check_block(block)


def check(tmp_path: Path, *rows: Any, **limits: Any) -> Arrays:
    return check_file(write_corpus(tmp_path / "corpus.jsonl", rows), **limits)


def prompts(rows: Arrays) -> list[list[int]]:
    ends = np.cumsum(rows["lengths"])
    return [part.tolist() for part in np.split(rows["tokens"], ends[:-1])]


def errors(rows: Arrays) -> list[tuple[int, str, str]]:
    values = [json.loads(line) for line in rows["errors"].tobytes().splitlines()]
    return [(value["row"], value["error"]["kind"], value["error"]["message"]) for value in values]


def requests(rows: Arrays) -> list[Any]:
    return [json.loads(line) for line in rows["requests"].tobytes().splitlines()]


ONE_OF = 'it must have one of "prompt", "messages", "prompt_token_ids"'
ID = "it must be a string or an integer"
TURN = 'it must have "role" and "content"'
HI = {"role": "user", "content": "hi"}


@pytest.mark.parametrize(
    ("row", "kind", "value", "rule"),
    [
        ("{", "not_json", "{ is not JSON", "each line must be one object"),
        ('{"prompt": "a"} {}', "not_json", '{"prompt": "a"} {} is not JSON', "each line must be one object"),
        ('{"prompt": "a", "x": NaN}', "not_json", "NaN is no JSON number", "each line must be one object"),
        ('{"prompt": "a", "x": -Infinity}', "not_json", "-Infinity is no JSON number", "each line must be one object"),
        ('{"prompt": "a", "x": 1e999}', "not_json", "1e999 is too large", "each line must be one object"),
        ('{"prompt": "a", "x": -1e999}', "not_json", "-1e999 is too large", "each line must be one object"),
        ("[" * 100_000, "not_json", "nested too deeply", "each line must be one object"),
        ("[1]", "not_object", "[1] is not an object", 'a row looks like {"prompt": "…"}'),
        ("5", "not_object", "5 is not an object", 'a row looks like {"prompt": "…"}'),
        ("null", "not_object", "null is not an object", 'a row looks like {"prompt": "…"}'),
        (b'{"prompt": "\xff"}', "invalid_utf8", "byte 13 of the line is 0xff", "a corpus must be UTF-8"),
        (b'{"prompt": "a\xe2\x82"}', "invalid_utf8", "byte 14 of the line is 0xe2", "a corpus must be UTF-8"),
        (r'{"prompt": "ab\ud800"}', "invalid_utf8", "half of a surrogate pair at character 2", "not Unicode text"),
        (
            r'{"messages": [{"role": "user", "content": "\udc00"}]}',
            "invalid_utf8",
            'the "content" of "messages"[0] has half of a surrogate pair',
            "not Unicode text",
        ),
        ({"prompt": "a", "id": 1.5}, "id", '"id" is 1.5', ID),
        ({"prompt": "a", "id": True}, "id", '"id" is true', ID),
        ({"prompt": "a", "id": ["x"]}, "id", '"id" is ["x"]', ID),
        ({"prompt": "a", "id": {}}, "id", '"id" is {}', ID),
        ({}, "prompt", "no prompt", ONE_OF),
        ({"text": "a"}, "prompt", '["text"]', ONE_OF),
        ({"prompt": None}, "prompt", "no prompt", ONE_OF),
        ({"prompt": [HI], "messages": [HI]}, "prompt", '"prompt" and "messages"', ONE_OF),
        ({"prompt": "a", "prompt_token_ids": [1]}, "prompt", '"prompt" and "prompt_token_ids"', ONE_OF),
        ({"messages": [HI], "prompt_token_ids": [1]}, "prompt", '"messages" and "prompt_token_ids"', ONE_OF),
        ({"prompt": 5}, "prompt", '"prompt" is 5', "it must be a string"),
        ({"prompt": ["a"]}, "prompt", '"prompt" is ["a"]', "it must be a string"),
        ({"prompt": ""}, "empty", '"prompt" is empty', "at least one character"),
        ({"messages": []}, "empty", '"messages" is empty', "at least one turn"),
        ({"prompt_token_ids": []}, "empty", '"prompt_token_ids" is empty', "at least one token"),
        (
            {"messages": [{"role": "user", "content": []}]},
            "empty",
            'the "content" of "messages"[0] is an empty list',
            "at least one part",
        ),
        (
            {"messages": [HI, {"role": "assistant", "content": "so"}]},
            "messages",
            '"messages"[1] is the last turn',
            "--last-assistant continue",
        ),
        ({"messages": [{"role": "user", "content": None}]}, "messages", '"content": null', TURN),
        (
            {"messages": [{"role": "user", "content": [{"type": "image", "image": "x"}]}]},
            "messages",
            'part 0 of the "content" of "messages"[0] is {"type": "image"',
            "nothing but text can be read",
        ),
        ({"messages": [{"role": "user", "content": ["hi"]}]}, "messages", "part 0", "nothing but text can be read"),
        (
            {"messages": [{"role": "user", "content": [{"type": "text", "text": 5}]}]},
            "prompt",
            'the "text" of part 0 of the "content" of "messages"[0] is 5',
            "it must be a string",
        ),
        ({"messages": "hi"}, "messages", '"messages" is hi', "it must be a list"),
        ({"messages": HI}, "messages", '"messages" is {"role"', "it must be a list"),
        ({"messages": [HI, "hi"]}, "messages", '"messages"[1] is hi', TURN),
        ({"messages": [{"role": "user"}]}, "messages", '"messages"[0] is {"role": "user"}', TURN),
        ({"messages": [{"content": "hi"}]}, "messages", '"messages"[0] is {"content": "hi"}', TURN),
        ({"messages": [{"role": 1, "content": "hi"}]}, "role", "has the role 1", "it must be a word"),
        ({"messages": [HI], "tools": "x"}, "messages", '"tools" is x', "--column tools= carries it along"),
        ({"messages": [HI], "tools": [{}]}, "template", 'knows no "tools"', "--column tools="),
        ({"messages": [HI], "chat_template": "x"}, "template", '"chat_template"', "--row-chat-templates"),
        ({"messages": [HI], "chat_template_kwargs": 5}, "messages", '"chat_template_kwargs" is 5', "be an object"),
        (
            {"messages": [{"role": "user", "content": 5}]},
            "prompt",
            'the "content" of "messages"[0] is 5',
            "it must be a string",
        ),
        ({"prompt_token_ids": 5}, "token_ids", '"prompt_token_ids" is 5', "it must be a list of integers"),
        ({"prompt_token_ids": ["1"]}, "token_ids", '"prompt_token_ids" is ["1"]', "it must be a list of integers"),
        ({"prompt_token_ids": [1.0]}, "token_ids", '"prompt_token_ids" is [1.0]', "it must be a list of integers"),
        ({"prompt_token_ids": [True]}, "token_ids", '"prompt_token_ids" is [true]', "it must be a list of integers"),
        ({"prompt_token_ids": [0, VOCABULARY]}, "token_ids", '"prompt_token_ids"[1] is 256', "the model are 0 to 255"),
        ({"prompt_token_ids": [-1]}, "token_ids", '"prompt_token_ids"[0] is -1', "the model are 0 to 255"),
        ({"prompt_token_ids": [10**30]}, "token_ids", f'"prompt_token_ids"[0] is {10**30}', "the model are 0 to 255"),
        ({"prompt": "a", "sampling": 5}, "sampling", '"sampling" is 5', "it must be an object with some of max_new_"),
        ({"prompt": "a", "sampling": []}, "sampling", '"sampling" is []', "it must be an object"),
        (
            {"prompt": "a", "sampling": {"max_tokens": 5}},
            "sampling",
            '"max_tokens" is no sampling parameter',
            "the parameters are max_new_tokens, temperature",
        ),
        ({"prompt": "a", "sampling": {"top_p": 2}}, "sampling", '"top_p" is 2', "it must be above 0 and at most 1"),
        (
            {"prompt": "a", "sampling": {"max_new_tokens": -3}},
            "sampling",
            '"max_new_tokens" is -3',
            "it must be at least 1",
        ),
        ({"prompt": "a", "sampling": {"seed": [None]}}, "sampling", '"seed" is (None,)', "it must be an integer"),
        (
            {"messages": [HI, {"role": "system", "content": "late"}]},
            "template",
            "a system turn comes first",
            "the model's chat template refuses",
        ),
        (
            {"prompt": "a" * 2048},
            "too_long",
            "the prompt has 2048 tokens",
            "at most 2047 leave room for one more in the model's context of 2048; shorten it, or cut it with "
            "--truncate-prompts left or right",
        ),
    ],
)
def test_a_row_that_breaks_a_rule_is_refused(tmp_path: Path, row: Any, kind: str, value: str, rule: str) -> None:
    rows = check(tmp_path, {"prompt": "before"}, "", row, {"prompt": "after"})
    [(index, found_kind, message)] = errors(rows)
    assert (index, found_kind) == (1, kind)
    assert message.startswith("corpus.jsonl:3: ")
    assert value in message
    assert rule in message
    assert rows["refused"].tolist() == [0, 1, 0]
    assert prompts(rows) == [list(b"before"), [], list(b"after")]


@pytest.mark.parametrize(
    ("encoder", "row", "kind", "text"),
    [
        (Templateless(), {"messages": [HI]}, "template", 'no chat template for "messages"; give the text as "prompt"'),
        (Picky(), {"prompt": "q"}, "tokenize", "the tokenizer refuses this text: no q"),
        (Silent(), {"prompt": "a"}, "empty", "the prompt has no tokens; it must have at least one"),
    ],
)
def test_a_row_that_the_tokenizer_cannot_take_is_refused(
    tmp_path: Path, encoder: Encoder, row: Any, kind: str, text: str
) -> None:
    [(_, found_kind, message)] = errors(check(tmp_path, row, encoder=encoder))
    assert found_kind == kind
    assert message.startswith("corpus.jsonl:1: ")
    assert text in message


def test_a_text_that_the_tokenizer_refuses_does_not_cost_the_others(tmp_path: Path) -> None:
    rows = check(tmp_path, {"prompt": "a"}, {"prompt": "q"}, {"prompt": "c"}, encoder=Picky())
    assert prompts(rows) == [list(b"a"), [], list(b"c")]


def test_a_refused_row_has_an_empty_key(tmp_path: Path) -> None:
    assert check(tmp_path, "{")["keys"].tolist() == [[0] * KEY_BYTES]


def test_the_value_in_a_message_is_short_however_long_it_is(tmp_path: Path) -> None:
    [(_, _, message)] = errors(check(tmp_path, {"prompt": ["a" * 10_000]}))
    assert len(message) < 200


def test_every_key_that_is_null_counts_as_absent(tmp_path: Path) -> None:
    row = {"id": None, "prompt": "a", "messages": None, "prompt_token_ids": None, "sampling": None}
    rows = check(tmp_path, row)
    assert (requests(rows), prompts(rows), errors(rows)) == ([{"id": 0}], [list(b"a")], [])


def test_an_id_that_is_not_given_is_the_rows_index(tmp_path: Path) -> None:
    rows = check(tmp_path, {"prompt": "a", "id": "x"}, "", {"prompt": "b"})
    assert [request["id"] for request in requests(rows)] == ["x", 1]


def test_a_refused_row_keeps_the_id_it_names(tmp_path: Path) -> None:
    assert requests(check(tmp_path, {"prompt": "", "id": "x"})) == [{"id": "x"}]


@pytest.mark.parametrize("row", ["{", {"prompt": "b", "id": 1.5}])
def test_a_row_whose_id_cannot_be_read_has_none(tmp_path: Path, row: Any) -> None:
    assert requests(check(tmp_path, {"prompt": "a"}, row)) == [{"id": 0}, {"id": None}]


@pytest.mark.parametrize(
    "data",
    [
        b'{"prompt": "a"}\r\n{"prompt": "b"}\r\n',
        b'\xef\xbb\xbf{"prompt": "a"}\n{"prompt": "b"}\n',
        b'{"prompt": "a"}\n{"prompt": "b"}',
        b'\n{"prompt": "a"}\n \t\n\r\n{"prompt": "b"}\n\n',
        b' {"prompt": "a"} \n\t{"prompt": "b"}\t\n',
    ],
    ids=["CRLF", "byte-order mark", "no last newline", "blank lines", "spaces"],
)
def test_what_editors_do_to_a_file_changes_no_row(tmp_path: Path, data: bytes) -> None:
    path = tmp_path / "corpus.jsonl"
    path.write_bytes(data)
    rows = check_file(path)
    assert (prompts(rows), errors(rows)) == ([list(b"a"), list(b"b")], [])


def test_messages_are_written_by_the_chat_template(tmp_path: Path) -> None:
    turns = [{"role": "system", "content": "s"}, {"role": "user", "content": "hi"}]
    assert prompts(check(tmp_path, {"messages": turns})) == [list(b"[system]s[user]hi")]


@pytest.mark.parametrize(
    ("row", "stop_token_ids"),
    [
        ({"messages": [HI]}, [9]),
        ({"messages": [HI], "sampling": {"stop_token_ids": [4]}}, [4, 9]),
        ({"messages": [HI], "sampling": {"stop_token_ids": [9]}}, [9]),
        ({"messages": [HI], "sampling": {"ignore_eos": True}}, None),
        ({"prompt": "hi"}, None),
        ({"prompt_token_ids": [104]}, None),
    ],
)
def test_a_chat_ends_at_the_token_that_ends_a_turn_too(
    tmp_path: Path, row: dict[str, Any], stop_token_ids: list[int] | None
) -> None:
    [request] = requests(check(tmp_path, row, chat_ending=9))
    assert request.get("sampling", {}).get("stop_token_ids") == stop_token_ids


def test_the_token_that_ends_a_turn_is_a_part_of_the_key_of_a_chat(tmp_path: Path) -> None:
    rows = [{"messages": [HI]}, {"prompt": "[user]hi"}]
    without, ends = check(tmp_path, *rows)["keys"], check(tmp_path, *rows, chat_ending=9)["keys"]
    assert [bool((old == new).all()) for old, new in zip(without, ends, strict=True)] == [False, True]


def test_prompt_token_ids_are_taken_as_they_are(tmp_path: Path) -> None:
    assert prompts(check(tmp_path, {"prompt_token_ids": [0, 255, 7]})) == [[0, 255, 7]]


def test_a_prompt_gets_special_tokens_and_a_chat_does_not(tmp_path: Path) -> None:
    rows = check(tmp_path, {"prompt": "a"}, {"messages": [HI]}, encoder=Beginning())
    assert prompts(rows) == [[1, *b"a"], list(b"[user]hi")]


def test_a_row_overrides_the_jobs_sampling(tmp_path: Path) -> None:
    row = {"prompt": "a", "sampling": {"temperature": 1, "max_new_tokens": 5}}
    rows = check(tmp_path, row, sampling=SamplingParams(max_new_tokens=7, seed=3))
    assert requests(rows) == [{"id": 0, "sampling": {"max_new_tokens": 5, "temperature": 1.0}}]


def test_sampling_that_says_what_the_job_says_is_no_override(tmp_path: Path) -> None:
    assert requests(check(tmp_path, {"prompt": "a", "sampling": {"max_new_tokens": 256}})) == [{"id": 0}]


@pytest.mark.parametrize(("length", "new_tokens"), [(1, 5), (5, 5), (6, 4), (9, 1)])
def test_max_new_tokens_is_clamped_to_what_the_context_leaves(tmp_path: Path, length: int, new_tokens: int) -> None:
    rows = check(tmp_path, {"prompt": "a" * length}, sampling=SamplingParams(max_new_tokens=5), context_tokens=10)
    assert rows["new_tokens"].tolist() == [new_tokens]


@pytest.mark.parametrize(("length", "least"), [(5, 4), (7, 3), (9, 1)])
def test_min_new_tokens_is_clamped_with_max_new_tokens(tmp_path: Path, length: int, least: int) -> None:
    sampling = SamplingParams(max_new_tokens=5, min_new_tokens=4)
    rows = check(tmp_path, {"prompt": "a" * length}, sampling=sampling, context_tokens=10)
    assert (errors(rows), requests(rows)[0].get("sampling", {}).get("min_new_tokens", 4)) == ([], least)


def test_min_new_tokens_above_max_new_tokens_is_refused(tmp_path: Path) -> None:
    row = {"prompt": "a", "sampling": {"max_new_tokens": 3, "min_new_tokens": 4}}
    [(_, kind, message)] = errors(check(tmp_path, row))
    assert (kind, "it must be from 0 (off) to max_new_tokens (3)" in message) == ("sampling", True)


def test_a_row_says_how_many_samples_it_asks_for(tmp_path: Path) -> None:
    several = {"prompt": "a", "sampling": {"n": 4, "temperature": 1}}
    assert check(tmp_path, {"prompt": "a"}, several)["samples"].tolist() == [1, 4]


def test_a_row_may_ask_for_more_log_probabilities(tmp_path: Path) -> None:
    rows = check(tmp_path, {"prompt": "a", "sampling": {"logprobs": 3}}, sampling=SamplingParams(logprobs=1))
    assert requests(rows)[0]["sampling"] == {"logprobs": 3}


def test_sampling_that_is_null_is_the_jobs(tmp_path: Path) -> None:
    dumped = {field.name: None for field in dataclasses.fields(SamplingParams)}
    rows = check(tmp_path, {"prompt": "a", "sampling": dumped}, sampling=SamplingParams(logprobs=1, max_new_tokens=9))
    assert (requests(rows), errors(rows)) == ([{"id": 0}], [])


def test_what_is_null_in_a_turn_counts_as_absent(tmp_path: Path) -> None:
    turn = {**HI, "name": None, "tool_calls": None}
    assert prompts(check(tmp_path, {"messages": [turn]})) == [list(b"[user]hi")]


def test_an_empty_turn_is_written_by_the_chat_template(tmp_path: Path) -> None:
    assert prompts(check(tmp_path, {"messages": [{"role": "system", "content": ""}, HI]})) == [
        list(b"[system][user]hi")
    ]


class Wide(ByteTokenizer):
    """Has a token, 300, that the model has not: a q."""

    def encode(self, texts: Sequence[str], special_tokens: bool) -> list[list[int]]:
        return [[300 if token == ord("q") else token for token in ids] for ids in super().encode(texts, special_tokens)]


@pytest.mark.parametrize("row", [{"prompt": "aqb"}, {"messages": [{"role": "user", "content": "q"}]}])
def test_a_text_with_a_token_that_the_model_has_not_is_refused(tmp_path: Path, row: Any) -> None:
    rows = check(tmp_path, {"prompt": "a"}, row, {"prompt": "b"}, encoder=Wide())
    [(index, kind, message)] = errors(rows)
    assert (index, kind) == (1, "token_ids")
    assert "makes token 300 ('token 300') of this text, and the token ids of the model are 0 to 255" in message
    assert prompts(rows) == [list(b"a"), [], list(b"b")]


def test_a_model_without_a_context_limit_takes_any_prompt(tmp_path: Path) -> None:
    rows = check(tmp_path, {"prompt": "a" * 5000}, context_tokens=None)
    assert (rows["lengths"].tolist(), rows["new_tokens"].tolist()) == ([5000], [256])


@pytest.mark.parametrize(("side", "kept"), [("left", b"defghij"), ("right", b"abcdefg")])
def test_a_prompt_that_does_not_fit_is_cut_where_asked(tmp_path: Path, side: str, kept: bytes) -> None:
    limits = {"sampling": SamplingParams(max_new_tokens=3), "context_tokens": 10, "truncate_prompts": side}
    assert prompts(check(tmp_path, {"prompt": "abcdefghij"}, **limits)) == [list(kept)]


def test_a_cut_prompt_leaves_half_of_the_context_at_most_to_the_completion(tmp_path: Path) -> None:
    rows = check(tmp_path, {"prompt": "a" * 20}, context_tokens=10, truncate_prompts="left")
    assert (rows["lengths"].tolist(), rows["new_tokens"].tolist()) == ([5], [5])


@pytest.mark.parametrize("side", ["left", "right"])
def test_a_prompt_that_fits_is_not_cut(tmp_path: Path, side: str) -> None:
    assert prompts(check(tmp_path, {"prompt": "abcdefghi"}, context_tokens=10, truncate_prompts=side)) == [
        list(b"abcdefghi")
    ]


def test_a_key_is_that_of_the_clamped_request(tmp_path: Path) -> None:
    rows = check(tmp_path, {"prompt": "aaaaaaaa"}, context_tokens=10)
    expected = completion_key(np.frombuffer(b"a" * 8, np.uint8), SamplingParams(max_new_tokens=2), 0)
    assert rows["keys"].tobytes() == expected


def test_a_block_without_rows_has_no_rows(tmp_path: Path) -> None:
    rows = check(tmp_path, "")
    assert {name: len(array) for name, array in rows.items()} == dict.fromkeys(rows, 0)


@pytest.mark.parametrize(("one", "other", "same"), [(1, 1, True), ("1", "1", True), (1, "1", False), ("a", "b", False)])
def test_ids_are_hashed_by_type_and_value(tmp_path: Path, one: Any, other: Any, same: bool) -> None:
    hashes = check(tmp_path, {"prompt": "a", "id": one}, {"prompt": "a", "id": other})["id_hashes"]
    assert (hashes[0] == hashes[1]) == same


def of_batch(body: dict[str, Any], url: str = "/v1/chat/completions") -> dict[str, Any]:
    return {"custom_id": "q", "method": "POST", "url": url, "body": {"temperature": 0, **body}}


def test_a_line_of_a_batch_is_a_request_under_its_custom_id(tmp_path: Path) -> None:
    rows = check(tmp_path, of_batch({"messages": [HI], "max_tokens": 5}))
    assert (prompts(rows), requests(rows)) == ([list(b"[user]hi")], [{"id": "q", "sampling": {"max_new_tokens": 5}}])


def test_a_wrong_parameter_of_a_body_is_called_by_its_name_there(tmp_path: Path) -> None:
    [(_, kind, message)] = errors(check(tmp_path, of_batch({"messages": [HI], "max_tokens": -3})))
    assert (kind, '"max_tokens" is -3; it must be at least 1' in message) == ("sampling", True)


@pytest.mark.parametrize(
    ("new_tokens", "side", "lengths"),
    [(4, "none", [6]), (5, "none", [0]), (5, "left", [5]), (9, "left", [1]), (10, "left", [0])],
)
def test_a_body_gets_all_the_tokens_that_it_asks_for_or_an_error(
    tmp_path: Path, new_tokens: int, side: str, lengths: list[int]
) -> None:
    row = of_batch({"prompt": "a" * 6, "max_tokens": new_tokens}, "/v1/completions")
    rows = check(tmp_path, row, context_tokens=10, truncate_prompts=side)
    assert rows["lengths"].tolist() == lengths
    assert [kind for _, kind, _ in errors(rows)] == (["too_long"] if lengths == [0] else [])


def test_a_body_that_says_no_length_gets_what_the_context_leaves(tmp_path: Path) -> None:
    rows = check(tmp_path, of_batch({"messages": [HI]}), context_tokens=10)
    assert rows["new_tokens"].tolist() == [2]


def test_what_is_true_of_many_rows_is_said_once_with_the_first_place(tmp_path: Path) -> None:
    rows = check(tmp_path, {"prompt": "a"}, *[{"messages": [{**HI, "name": "kim"}]}] * 3)
    notes = Notes()
    notes.add(rows["notes"].tobytes())
    notes.add(rows["notes"].tobytes())
    [note] = notes
    assert note.startswith('corpus.jsonl:2 and 5 more rows: "name" is in chats')


def test_what_is_true_of_refused_rows_is_not_said(tmp_path: Path) -> None:
    rows = check(tmp_path, {"messages": [{**HI, "name": "kim"}], "sampling": 5})
    assert len(rows["notes"]) == 0
