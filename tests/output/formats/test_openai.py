"""The lines that OpenAI's batch API would answer with, checked by the types of the `openai` package."""

import json
from pathlib import Path
from typing import Any

import pytest
from openai.types import Completion as TextCompletion
from openai.types.chat import ChatCompletion

from hpc.output.formats.openai import OpenAI
from hpc.request import Sample
from tests.conftest import write_corpus
from tests.output.made import CREATED, Complete, make_rows, usual

CHAT = {"model": "gpt", "messages": [{"role": "user", "content": "hi"}], "temperature": 1}
TEXT = {"model": "gpt", "prompt": "hi", "temperature": 1}
TOP = ((1, -0.5), (3, -1.5))
SAMPLES = (
    Sample((1, 2), "one tü", "stop", ((-0.5, TOP), (-0.25, ((2, -0.25),)))),
    Sample((3,), "\ufffd", "length", ((-1.0, ((3, -1.0),)),)),
)


def request(name: Any, body: Any, url: str = "/v1/chat/completions") -> dict[str, Any]:
    return {"custom_id": name, "method": "POST", "url": url, "body": body}


def answers(folder: Path, rows: list[Any], complete: Complete = usual, **job: Any) -> list[dict[str, Any]]:
    folder.mkdir(exist_ok=True)
    corpus = write_corpus(folder / "c.jsonl", rows)
    facts, found = make_rows(folder / "run", corpus, complete, job=job)
    output = OpenAI(facts)
    output.write(folder / "out", found)
    return [json.loads(line) for line in output.read(folder / "out")]


def text_request(name: str, **more: Any) -> dict[str, Any]:
    return request(name, {**TEXT, **more}, "/v1/completions")


@pytest.mark.parametrize("more", [{}, {"n": 2}, {"logprobs": True, "top_logprobs": 2}, {"n": 2, "logprobs": True}])
def test_a_chat_is_answered_with_a_body_of_the_apis_own_type(tmp_path: Path, more: dict[str, Any]) -> None:
    with_logprobs = "logprobs" in more
    samples = [
        Sample(each.token_ids, each.text, each.finish_reason, each.logprobs if with_logprobs else None)
        for each in SAMPLES[: more.get("n", 1)]
    ]
    [line] = answers(tmp_path, [request("a", {**CHAT, **more})], lambda row: tuple(samples))
    body = ChatCompletion.model_validate(line["response"]["body"], strict=True)
    assert [(c.index, c.message.content, c.finish_reason, c.logprobs is not None) for c in body.choices] == [
        (index, each.text, each.finish_reason, with_logprobs) for index, each in enumerate(samples)
    ]


@pytest.mark.parametrize("more", [{}, {"n": 2}, {"logprobs": 2}])
def test_a_text_is_answered_with_a_body_of_the_apis_own_type(tmp_path: Path, more: dict[str, Any]) -> None:
    samples = [
        Sample(each.token_ids, each.text, each.finish_reason, each.logprobs if "logprobs" in more else None)
        for each in SAMPLES[: more.get("n", 1)]
    ]
    [line] = answers(tmp_path, [text_request("a", **more)], lambda row: tuple(samples))
    body = TextCompletion.model_validate(line["response"]["body"], strict=True)
    assert [(c.index, c.text, c.finish_reason) for c in body.choices] == [
        (index, each.text, each.finish_reason) for index, each in enumerate(samples)
    ]


def test_the_body_says_model_time_and_tokens(tmp_path: Path) -> None:
    [line] = answers(tmp_path, [request("a", CHAT)])
    body = line["response"]["body"]
    usage = {"prompt_tokens": len("[user]hi"), "completion_tokens": 3, "total_tokens": len("[user]hi") + 3}
    assert (body["model"], body["created"], body["usage"]) == ("org/model", CREATED, usage)


def test_a_good_line_has_no_error_and_status_200(tmp_path: Path) -> None:
    [line] = answers(tmp_path, [request("a", CHAT)])
    assert (line["custom_id"], line["response"]["status_code"], line["error"]) == ("a", 200, None)


def test_log_probabilities_of_a_chat_have_tokens_and_their_bytes(tmp_path: Path) -> None:
    [line] = answers(tmp_path, [request("a", {**CHAT, "logprobs": True, "top_logprobs": 2})], lambda row: SAMPLES[:1])
    first, second = line["response"]["body"]["choices"][0]["logprobs"]["content"]
    assert (first["token"], first["logprob"], second["bytes"]) == ("one", -0.5, list(" tü".encode()))
    assert [(top["token"], top["bytes"]) for top in first["top_logprobs"]] == [("one", [*b"one"]), ("\ufffd", [0xC3])]


def test_log_probabilities_of_a_text_have_places_in_it(tmp_path: Path) -> None:
    [line] = answers(tmp_path, [text_request("a", logprobs=2)], lambda row: SAMPLES[:1])
    assert line["response"]["body"]["choices"][0]["logprobs"] == {
        "tokens": ["one", " tü"],
        "token_logprobs": [-0.5, -0.25],
        "top_logprobs": [{"one": -0.5, "\ufffd": -1.5}, {" tü": -0.25}],
        "text_offset": [0, 3],
    }


def test_a_token_that_nobody_knows_is_written_by_its_number(tmp_path: Path) -> None:
    samples = (Sample((77,), "?", "stop", ((-0.5, ()),)),)
    [line] = answers(tmp_path, [request("a", {**CHAT, "logprobs": True})], lambda row: samples)
    [token] = line["response"]["body"]["choices"][0]["logprobs"]["content"]
    assert (token["token"], token["bytes"]) == ("token_id:77", None)


def test_a_line_that_is_refused_has_the_apis_error(tmp_path: Path) -> None:
    [line] = answers(tmp_path, [request("a", {**CHAT, "temperature": "hot"})])
    about = line["response"]["body"]["error"]
    assert (line["error"], line["response"]["status_code"], about["type"], about["code"]) == (
        None, 400, "invalid_request_error", "sampling",
    )  # fmt: skip
    assert "hot" in about["message"]


def test_an_error_of_the_engine_is_the_servers(tmp_path: Path) -> None:
    [line] = answers(tmp_path, [request("a", CHAT)], lambda row: "out of memory")
    assert (line["response"]["status_code"], line["response"]["body"]["error"]["type"]) == (500, "server_error")


def test_a_line_that_has_not_been_run_says_so(tmp_path: Path) -> None:
    lines = answers(tmp_path, [request("a", CHAT), text_request("b")], lambda row: None if row else usual(row))
    assert [line["custom_id"] for line in lines] == ["a", "b"]
    assert (lines[1]["response"], lines[1]["error"]["code"]) == (None, "not_run")


def test_every_line_has_its_place_whatever_it_is(tmp_path: Path) -> None:
    rows: list[Any] = [request("a", CHAT), request("a", CHAT), "no JSON", text_request("b"), request(3, CHAT)]
    lines = answers(tmp_path, rows)
    assert [(line["custom_id"], (line["response"] or {})["status_code"]) for line in lines] == [
        ("a", 200), ("a", 400), (None, 400), ("b", 200), ("3", 400),
    ]  # fmt: skip


def test_ids_differ_and_stay_the_same(tmp_path: Path) -> None:
    rows: list[Any] = [request(name, CHAT) for name in "abc"] + ["no JSON", "nor this"]
    first, again = (answers(tmp_path / name, rows) for name in ("1", "2"))
    assert [line["id"] for line in first] == [line["id"] for line in again]
    assert len({line["id"] for line in first} | {line["response"]["request_id"] for line in first}) == 2 * len(rows)


def test_rows_of_other_kinds_are_answered_as_what_they_ask_for(tmp_path: Path) -> None:
    rows = [{"id": 7, "prompt": "hi"}, {"messages": [{"role": "user", "content": "hi"}]}]
    lines = answers(tmp_path, rows)
    assert [(line["custom_id"], line["response"]["body"]["object"]) for line in lines] == [
        ("7", "text_completion"), ("1", "chat.completion"),
    ]  # fmt: skip


def test_the_id_of_a_line_follows_from_what_it_asks_for(tmp_path: Path) -> None:
    asked = [CHAT, {**CHAT, "max_tokens": 9}]
    first, other = (answers(tmp_path / str(at), [request("a", body)])[0] for at, body in enumerate(asked))
    assert first["id"] != other["id"]
