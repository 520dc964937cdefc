"""Rows as people have them: which columns are read, which are carried along, and what is never guessed."""

from collections.abc import Mapping
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hpc.corpus.columns import Columns, refusal
from hpc.corpus.errors import RowError
from hpc.corpus.row import PROMPT_KEYS
from hpc.job import Job

HI = {"role": "user", "content": "hi"}
YO = {"role": "assistant", "content": "yo"}
LINE = {"custom_id": "q", "method": "POST", "url": "/v1/chat/completions", "body": {"messages": [HI]}}


def of(**values: Any) -> Columns:
    return Columns.of(Job("m", ("c",), **values))


def prompt(row: Mapping[str, Any], **values: Any) -> dict[str, Any]:
    given = of(**values).read(row).value
    return {name: given[name] for name in PROMPT_KEYS if given.get(name) is not None}


def error(row: dict[str, Any], **values: Any) -> str:
    with pytest.raises(RowError) as caught:
        prompt(row, **values)
    return str(caught.value)


@pytest.mark.parametrize(
    ("row", "taken"),
    [
        ({"prompt": "a", "text": "b"}, {"prompt": "a"}),
        ({"prompt": [HI]}, {"messages": [HI]}),
        ({"messages": [HI]}, {"messages": [HI]}),
        ({"messages": '[{"role": "user", "content": "hi"}]'}, {"messages": [HI]}),
        ({"prompt_token_ids": "[1, 2]"}, {"prompt_token_ids": [1, 2]}),
        ({"prompt": "hi", "messages": [HI, YO, YO]}, {"messages": [HI]}),
        ({"conversations": [{"from": "human", "value": "hi"}]}, {"messages": [HI]}),
        (
            {"conversations": [{"from": "system", "value": "s"}, {"from": "gpt", "value": "yo", "weight": 0}]},
            {"messages": [{"role": "system", "content": "s"}, {**YO, "weight": 0}]},
        ),
        ({"conversations": [HI]}, {"messages": [HI]}),
        ({"prompt": "a", "conversations": [HI]}, {"prompt": "a"}),
        ({"prompt": "a", "sampling": '{"n": 1}'}, {"prompt": "a"}),
        ({"prompt": "a", "messages": "", "prompt_token_ids": ""}, {"prompt": "a"}),
        (LINE, {"messages": [HI]}),
    ],
)
def test_a_prompt_is_taken_from_the_columns_that_people_have(row: dict[str, Any], taken: dict[str, Any]) -> None:
    assert prompt(row) == taken


def test_a_chat_beside_a_text_prompt_is_said() -> None:
    assert '"prompt" beside "messages"' in Columns().read({"prompt": "hi", "messages": [HI]}).notes[0]


@pytest.mark.parametrize(
    ("values", "row", "taken"),
    [
        ({"column": ("prompt=question",)}, {"question": "a", "messages": [HI]}, {"prompt": "a"}),
        ({"column": ("messages=dialog",)}, {"dialog": [HI], "prompt": "b"}, {"messages": [HI]}),
        ({"column": ("messages=question",)}, {"question": "hi"}, {"messages": [HI]}),
        ({"column": ("prompt=body",)}, {"custom_id": "q", "body": "a"}, {"prompt": "a"}),
        ({"column": ("messages=",)}, {"messages": [HI], "prompt": "a"}, {"prompt": "a"}),
        ({"prompt_template": "{{{a}}}: {b}"}, {"a": "x", "b": [1, "é"], "prompt": "c"}, {"prompt": '{x}: [1, "é"]'}),
        ({"system": "s"}, {"prompt": "hi"}, {"messages": [HI]}),
    ],
)
def test_a_job_says_which_column_is_the_prompt(
    values: dict[str, Any], row: dict[str, Any], taken: dict[str, Any]
) -> None:
    assert prompt(row, **values) == taken


@pytest.mark.parametrize(
    ("row", "values", "named"),
    [
        ({"question": "a", "answer": "b"}, {}, ['["question", "answer"]', "--column prompt=question"]),
        ({"answer": "b", "problem": "a"}, {}, ["--column prompt=problem"]),
        ({"instruction": "a", "input": "b"}, {}, ["--prompt-template '{instruction} {input}'"]),
        ({"id": "a", "n": 5}, {}, ['no prompt but ["id", "n"]']),
        ({"prompt": "a"}, {"column": ("prompt=question",)}, ["--column prompt=question", '["prompt"]: name one']),
        ({"b": "x", "a": None}, {"prompt_template": "{b} {a}"}, ['has no "a"', '["b", "a"]: name these']),
    ],
)
def test_other_columns_are_never_guessed(row: dict[str, Any], values: dict[str, Any], named: list[str]) -> None:
    message = error(row, **values)
    assert [text for text in named if text not in message] == []


@pytest.mark.parametrize(
    ("rows", "refused"),
    [
        ([{"question": "a"}, {"question": "b"}], True),
        ([{"question": "a"}, {"prompt": "b"}], False),
        ([{"question": "a"}, {"prompt": ""}], False),
        ([{"question": "a"}, RowError("not_json", "x")], True),
        ([RowError("not_json", "x")], False),
        ([{"n": 5}], False),
        ([LINE], False),
    ],
)
def test_a_corpus_is_refused_if_none_of_its_first_rows_has_a_prompt(rows: list[Any], refused: bool) -> None:
    assert (refusal(rows, Columns()) is not None) == refused


@pytest.mark.parametrize(
    ("row", "values", "identity"),
    [
        ({"prompt": "a", "id": 7.0}, {}, 7),
        ({"prompt": "a", "id": "7"}, {}, "7"),
        ({"prompt": "a", "custom_id": "q"}, {}, 3),
        ({"prompt": "a", "key": "k", "id": 5}, {"column": ("id=key",)}, "k"),
        ({"prompt": "a", "id": 5}, {"column": ("id=",)}, 3),
        ({"prompt": "a", "id": None}, {}, 3),
        (LINE, {}, "q"),
    ],
)
def test_an_id_is_taken_from_its_column(row: dict[str, Any], values: dict[str, Any], identity: int | str) -> None:
    found = of(**values).id_of(row, 3)
    assert (found, type(found)) == (identity, type(identity))


def test_a_row_without_the_column_of_its_id_is_refused() -> None:
    with pytest.raises(RowError, match='has no "key"'):
        of(column=("id=key",)).id_of({"prompt": "a", "id": 5}, 3)


@pytest.mark.parametrize(
    ("row", "values", "carried"),
    [
        ({"id": 1, "prompt": "a", "messages": None, "sampling": {}, "tag": "x", "null": None}, {}, ["tag", "null"]),
        ({"prompt": "a", "tools": 5, "conversations": []}, {}, ["tools", "conversations"]),
        ({"messages": [HI], "tools": None, "tag": 1}, {}, ["tag"]),
        ({"conversations": [HI], "tag": 1}, {}, ["tag"]),
        ({"question": "a", "prompt": "b", "id": 5}, {"column": ("prompt=question", "id=key")}, ["prompt", "id"]),
        ({"a": 1, "prompt": "b"}, {"prompt_template": "{a}"}, ["a", "prompt"]),
        ({"messages": [HI], "documents": "x"}, {"column": ("documents=",)}, ["documents"]),
        ({**LINE, "tag": 1}, {}, ["tag"]),
    ],
)
def test_all_columns_that_are_not_read_are_carried_along(
    row: dict[str, Any], values: dict[str, Any], carried: list[str]
) -> None:
    assert list(of(**values).meta_of(row)) == carried


def test_a_line_of_a_completion_takes_no_system_turn_and_that_is_said() -> None:
    row = of(system="s").read({**LINE, "url": "/v1/completions", "body": {"prompt": "a"}})
    assert (row.value["prompt"], "--system" in row.notes[-1]) == ("a", True)


def test_token_ids_take_no_system_turn_and_that_is_said() -> None:
    [note] = of(system="s").read({"prompt_token_ids": [1]}).notes
    assert "--system" in note


def test_what_a_job_says_of_its_columns_comes_back_from_its_values() -> None:
    job = Job("m", ("c",), column=("prompt=a",), system="s", last_assistant="drop", chat_template_kwargs='{"a":1}')
    said = Columns.said(job.prompt_values())
    assert (said.names, said.chat) == (Columns.of(job).names, Columns.of(job).chat)


def test_a_job_that_says_nothing_of_its_columns_has_no_values_of_them() -> None:
    assert Job("m", ("c",)).prompt_values() == {}


def test_a_table_is_read_where_the_request_of_a_row_may_depend_on_it() -> None:
    wanted = of(column=("prompt=question", "id=key"), prompt_template="").wanted
    assert (wanted >= {"question", "key", "messages", "body"}, wanted & {"prompt", "id", "answer"}) == (True, set())


def test_a_table_is_read_for_the_columns_of_the_prompt_template() -> None:
    assert of(prompt_template="{a} {b}").wanted >= {"a", "b"}


@pytest.mark.parametrize(
    ("row", "text"),
    [
        ({"prompt": "a"}, "a"),
        ({"messages": [YO, HI]}, "hi"),
        (
            {"messages": [{"role": "user", "content": [{"type": "text", "text": "hi"}]}]},
            '[{"type": "text", "text": "hi"}]',
        ),
        ({"prompt_token_ids": [1]}, "[1]"),
        (LINE, "hi"),
        ({"n": 5}, '{"n": 5}'),
    ],
)
def test_the_prompt_of_a_row_can_be_shown(row: dict[str, Any], text: str) -> None:
    assert Columns().shown(row) == text


@given(
    row=st.dictionaries(
        st.sampled_from(
            ["prompt", "messages", "prompt_token_ids", "id", "sampling", "tools", "conversations", "tag", "body", "url"]
        ),
        st.sampled_from([None, "", "a", 5, [HI], [YO], [{"from": "human", "value": "a"}], [], {}]),
    )
)
def test_a_row_that_is_read_without_a_second_look_is_read_the_same(row: dict[str, Any]) -> None:
    found: list[Any] = []
    for columns in (Columns(), Columns(names={"sampling": "sampling"})):
        try:
            given = columns.read(row).value
            own = {key: given[key] for key in (*PROMPT_KEYS, "sampling", "tools") if given.get(key) is not None}
            found.append((own, columns.meta_of(row)))
        except RowError as error:
            found.append((str(error), columns.meta_of(row)))
    if isinstance(found[0][0], dict) and "messages" not in found[0][0]:
        found = [({**own, "tools": None}, meta) for own, meta in found]  # of a text they are not read
    assert found[0] == found[1]
