"""Lines of OpenAI's batch format: every parameter is honoured, changes nothing, or makes an error row that names it."""

import re
from pathlib import Path
from typing import Any

import pytest

from hpc.corpus.errors import RowError
from hpc.corpus.openai import (
    CHAT,
    COMPLETIONS,
    BatchRow,
    BatchRules,
    batch_id,
    is_batch_line,
    known_parameters,
    read_batch_line,
)  # fmt: skip
from tests.conftest import ROOT

HI = [{"role": "user", "content": "hi"}]


def line(body: Any, url: str | None = CHAT, **more: Any) -> dict[str, Any]:
    return {"custom_id": "q", "method": "POST", "url": url, "body": body, **more}


def chat(**parameters: Any) -> BatchRow:
    return read_batch_line(line({"messages": HI, "temperature": 0, **parameters}), BatchRules())


def completion(**parameters: Any) -> BatchRow:
    return read_batch_line(line({"prompt": "a", "temperature": 0, **parameters}, COMPLETIONS), BatchRules())


def sampling(row: BatchRow) -> dict[str, Any]:
    given = dict(row.row["sampling"])
    del given["temperature"]
    return given


def refused(value: dict[str, Any], rules: BatchRules | None = None) -> str:
    with pytest.raises(RowError) as caught:
        read_batch_line(value, rules or BatchRules())
    return str(caught.value)


@pytest.mark.parametrize(
    ("value", "is_one"),
    [
        (line({}), True),
        ({"custom_id": 3, "body": None}, True),
        ({"url": CHAT, "body": {}}, True),
        ({"custom_id": "q", "method": "POST", "url": CHAT}, True),
        ({"prompt": "a", "custom_id": "q", "body": "kept"}, False),
        ({"messages": HI, "url": "https://a", "body": "kept"}, False),
        ({"custom_id": "q", "url": "https://a"}, False),
        ({"prompt": "a"}, False),
    ],
)
def test_a_line_of_a_batch_is_known_by_its_keys(value: dict[str, Any], is_one: bool) -> None:
    assert is_batch_line(value) == is_one


@pytest.mark.parametrize("given", [3, None, ["q"], True])
def test_a_custom_id_is_a_string(given: Any) -> None:
    with pytest.raises(RowError, match=r'"custom_id" is .*; it must be a string'):
        batch_id(line({}, custom_id=given))


@pytest.mark.parametrize(
    ("parameters", "expected"),
    [
        ({"max_tokens": 5}, {"max_new_tokens": 5}),
        ({"max_tokens": 5, "max_completion_tokens": 6}, {"max_new_tokens": 6}),
        ({"min_tokens": 2, "top_k": -1, "stop": "x"}, {"min_new_tokens": 2, "top_k": -1, "stop": "x"}),
        ({"seed": None, "top_p": None}, {}),
        ({"logprobs": True}, {"logprobs": 0}),
        ({"logprobs": True, "top_logprobs": 3}, {"logprobs": 3}),
        ({"logprobs": False, "top_logprobs": 0}, {}),
        ({"n": 2, "presence_penalty": 1, "ignore_eos": True}, {"n": 2, "presence_penalty": 1, "ignore_eos": True}),
    ],
)
def test_parameters_of_a_chat_become_ours(parameters: dict[str, Any], expected: dict[str, Any]) -> None:
    assert sampling(chat(**parameters)) == expected


def test_a_completion_without_a_limit_has_sixteen_tokens() -> None:
    assert sampling(completion()) == {"max_new_tokens": 16}


def test_the_logprobs_of_a_completion_are_a_number() -> None:
    assert sampling(completion(logprobs=2))["logprobs"] == 2


@pytest.mark.parametrize(
    ("prompt", "row"),
    [
        ("a", {"prompt": "a"}),
        (["a"], {"prompt": "a"}),
        ([1, 2], {"prompt_token_ids": [1, 2]}),
        ([[1, 2]], {"prompt_token_ids": [1, 2]}),
        ([], {"prompt_token_ids": []}),
    ],
)
def test_the_prompt_of_a_completion_is_text_or_tokens(prompt: Any, row: dict[str, Any]) -> None:
    found = completion(prompt=prompt).row
    del found["sampling"]
    assert found == row


def test_only_a_length_that_the_body_says_must_fit_the_context() -> None:
    assert (chat(max_tokens=5).exact_length, chat().exact_length, completion().exact_length) == (True, False, False)


def test_a_parameter_is_called_as_the_body_calls_it() -> None:
    assert chat(max_tokens=5, logprobs=True).names == {"max_new_tokens": "max_tokens", "logprobs": "top_logprobs"}


def test_what_is_for_the_chat_template_is_passed_on() -> None:
    given = {"tools": [{}], "documents": [{}], "chat_template_kwargs": {"a": 1}, "continue_final_message": True}
    assert given.items() <= chat(**given).row.items()


@pytest.mark.parametrize(
    ("effort", "variables"),
    [
        ("none", {"reasoning_effort": "none", "enable_thinking": False}),
        ("low", {"reasoning_effort": "low", "enable_thinking": True}),
    ],
)
def test_the_effort_of_reasoning_is_a_variable_of_the_template(effort: str, variables: dict[str, Any]) -> None:
    assert chat(reasoning_effort=effort).row["chat_template_kwargs"] == variables


def test_variables_of_the_body_go_before_the_effort() -> None:
    row = chat(reasoning_effort="none", chat_template_kwargs={"enable_thinking": True}).row
    assert row["chat_template_kwargs"]["enable_thinking"] is True


@pytest.mark.parametrize(
    "harmless",
    [
        {"stream": True, "user": "u", "metadata": {"a": "b"}, "service_tier": "flex", "store": False},
        {"response_format": {"type": "text"}, "logit_bias": {}, "tool_choice": "auto", "modalities": ["text"]},
        {"use_beam_search": False, "length_penalty": 1.0, "best_of": 1, "add_special_tokens": False},
        {"n": 3, "best_of": 3},
        {"guided_json": None, "foo": None},
    ],
)
def test_what_asks_for_nothing_changes_nothing(harmless: dict[str, Any]) -> None:
    plain = chat(**({"n": 3} if "n" in harmless else {}))
    assert chat(**harmless) == plain


@pytest.mark.parametrize(
    ("parameters", "named"),
    [
        (
            {"response_format": {"type": "json_object"}},
            '"response_format" is {"type": "json_object"}; it is not served',
        ),
        ({"structured_outputs": {"choice": ["a"]}}, '"structured_outputs" is'),
        ({"guided_choice": ["a", "b"]}, '"guided_choice" is ["a", "b"]'),
        ({"tool_choice": "required"}, '"tool_choice" is required'),
        ({"tool_choice": {"type": "function", "function": {"name": "f"}}}, '"tool_choice" is'),
        ({"logit_bias": {"5": 1}}, '"logit_bias" is {"5": 1}'),
        ({"return_token_ids": True}, "--return-token-ids"),
        ({"truncate_prompt_tokens": 5}, "--truncate-prompts"),
        ({"length_penalty": True}, '"length_penalty" is true'),
        (
            {"temprature": 1},
            '"temprature" is no parameter of /v1/chat/completions that is known here; the nearest is "te',
        ),
        ({"max_new_tokens": 1}, 'the nearest is "max_tokens"'),
        ({"prompt": "a"}, '"prompt" is no parameter of /v1/chat/completions'),
        ({"top_logprobs": 2}, '"top_logprobs" is 2; it needs "logprobs": true'),
        ({"logprobs": 2}, '"logprobs" is 2; of a chat it must be true or false'),
        ({"reasoning_effort": 3}, '"reasoning_effort" is 3'),
    ],
)
def test_what_is_not_served_is_an_error_that_names_it(parameters: dict[str, Any], named: str) -> None:
    assert named in refused(line({"messages": HI, **parameters}))


@pytest.mark.parametrize(
    ("value", "named"),
    [
        (line({"messages": HI}, url="/v1/embeddings"), f'"url" is /v1/embeddings; it must be {CHAT} or {COMPLETIONS}'),
        (line({"messages": HI}, method="GET"), '"method" is GET; it must be POST'),
        (line(None), '"body" is null; it must be an object'),
        (line([]), '"body" is []; it must be an object'),
        (line({"input": "a"}, url="/v1/responses"), '"url" is /v1/responses'),
        (line({"model": "m"}), '"body" has no "messages" but ["model"]'),
        (line({"model": "m"}, url=COMPLETIONS), '"body" has no "prompt" but ["model"]'),
        (line({"prompt": ["a", "b"]}, url=COMPLETIONS), '"prompt" is a list of 2 prompts'),
        (line({"prompt": "a", "echo": True}, url=COMPLETIONS), '"echo" is true'),
        (line({"prompt": "a", "tools": []}, url=COMPLETIONS), '"tools" is no parameter of /v1/completions'),
    ],
)
def test_a_line_that_cannot_be_read_is_an_error_that_says_why(value: dict[str, Any], named: str) -> None:
    assert named in refused(value)


def test_a_line_without_a_url_is_what_its_body_says() -> None:
    assert read_batch_line(line({"prompt": "a"}, url=None), BatchRules()).row["prompt"] == "a"


def test_unknown_parameters_are_ignored_where_the_job_says_so_and_that_is_said() -> None:
    row = read_batch_line(line({"messages": HI, "temperature": 0, "foo": 1}), BatchRules("ignore"))
    assert (row.row, '"foo"' in row.notes[0]) == (chat().row, True)


def test_a_parameter_that_is_known_and_not_served_is_never_ignored() -> None:
    assert '"guided_regex"' in refused(line({"messages": HI, "guided_regex": "a"}), BatchRules("ignore"))


def test_a_line_without_a_temperature_says_what_holds() -> None:
    [note] = read_batch_line(line({"messages": HI}), BatchRules(temperature=0.5)).notes
    assert "take the job's, 0.5" in note


@pytest.mark.parametrize(("model", "said"), [("gpt-4o", True), ("models/tiny", False), ("tiny", False)])
def test_a_model_that_is_not_the_jobs_is_said_and_no_error(model: str, said: bool) -> None:
    rules = BatchRules(served=frozenset({"models/tiny", "tiny"}))
    notes = read_batch_line(line({"messages": HI, "temperature": 0, "model": model}), rules).notes
    assert [("gpt-4o" in note, "tiny" in note) for note in notes] == [(True, True)] * said


def test_token_ids_may_be_asked_for_where_the_job_returns_them() -> None:
    value = line({"messages": HI, "return_token_ids": True})
    assert read_batch_line(value, BatchRules(token_ids=True)).row["messages"] == HI


def test_every_parameter_that_is_known_stands_in_the_table_of_the_docs() -> None:
    [table] = re.findall(r"\| parameter of a body \|.*?\n\n", (Path(ROOT) / "docs/formats.md").read_text(), re.DOTALL)
    known = known_parameters(CHAT) | known_parameters(COMPLETIONS)
    assert set(re.findall(r"`([a-z_]+)`", table)) >= known
