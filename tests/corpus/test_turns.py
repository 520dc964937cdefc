"""Turns as people have them: what is passed to the template, and how a chat may end."""

from typing import Any

import pytest

from hpc.corpus.errors import RowError
from hpc.corpus.turns import ChatRules, check_chat

HI = {"role": "user", "content": "hi"}
YO = {"role": "assistant", "content": "yo"}
CALL = {"id": "c", "type": "function", "function": {"name": "f", "arguments": "{}"}}


def checked(*turns: Any, rules: ChatRules | None = None, **more: Any) -> list[Any]:
    return check_chat({"messages": list(turns), **more}, rules or ChatRules())[0]


def ending(*turns: Any, rules: ChatRules | None = None, **more: Any) -> tuple[bool, bool, int]:
    kept, options = check_chat({"messages": list(turns), **more}, rules or ChatRules())
    return options.begins, options.continues, len(kept)


@pytest.mark.parametrize(
    "turn",
    [
        {"role": "developer", "content": "be brief"},
        {"role": "robot", "content": ""},
        {**HI, "name": "kim"},
        {"role": "tool", "content": "42", "tool_call_id": "c"},
        {"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]},
    ],
)
def test_any_role_and_key_goes_to_the_template(turn: dict[str, Any]) -> None:
    assert checked(turn) == [turn]


def test_a_turn_that_calls_tools_needs_no_content() -> None:
    turns = checked({"role": "assistant", "content": None, "tool_calls": [CALL]}, HI)
    assert turns[0] == {"role": "assistant", "tool_calls": [CALL]}


@pytest.mark.parametrize(
    ("rule", "expected"),
    [("continue", (False, True, 2)), ("drop", (True, False, 1)), ("keep", (True, False, 2))],
)
def test_a_last_turn_of_the_assistant_ends_as_the_job_says(rule: Any, expected: tuple[bool, bool, int]) -> None:
    assert ending(HI, YO, rules=ChatRules(rule)) == expected


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        ({"continue_final_message": True}, (False, True, 2)),
        ({"continue_final_message": True, "add_generation_prompt": False}, (False, True, 2)),
        ({"add_generation_prompt": True}, (True, False, 2)),
        ({"add_generation_prompt": False}, (False, False, 2)),
    ],
)
def test_a_row_says_itself_how_its_chat_ends(row: dict[str, Any], expected: tuple[bool, bool, int]) -> None:
    assert ending(HI, YO, **row) == expected


@pytest.mark.parametrize(
    ("row", "named"),
    [
        ({}, "--last-assistant continue"),
        ({"continue_final_message": True, "add_generation_prompt": True}, "both true"),
        ({"add_generation_prompt": 1}, '"add_generation_prompt" is 1'),
        ({"chat_template_kwargs": {"tools": []}}, '"chat_template_kwargs" has "tools"'),
    ],
)
def test_a_chat_that_may_not_end_so_is_refused(row: dict[str, Any], named: str) -> None:
    with pytest.raises(RowError) as caught:
        checked(HI, YO, **row)
    assert named in str(caught.value)


def test_a_chat_of_the_assistant_alone_has_nothing_left_without_its_turns() -> None:
    with pytest.raises(RowError, match="--last-assistant drop leaves none"):
        checked(YO, YO, rules=ChatRules("drop"))


@pytest.mark.parametrize("first", ["system", "developer"])
def test_the_jobs_system_turn_comes_first_where_a_chat_has_none(first: str) -> None:
    own = {"role": first, "content": "own"}
    system = {"role": "system", "content": "s"}
    rules = ChatRules(system="s")
    assert [checked(HI, rules=rules), checked(own, HI, rules=rules)] == [[system, HI], [own, HI]]


def test_variables_of_a_row_go_before_those_of_the_job_and_null_is_none() -> None:
    rules = ChatRules(variables={"a": 1, "b": 2})
    _, options = check_chat({"messages": [HI], "chat_template_kwargs": {"a": 3, "b": None}}, rules)
    assert options.variables == {"a": 3, "b": 2}


def test_a_row_may_bring_its_template_where_the_job_allows_it() -> None:
    _, options = check_chat({"messages": [HI], "chat_template": "x"}, ChatRules(own_templates=True))
    assert options.template == "x"


@pytest.mark.parametrize("nothing", [None, []])
def test_no_tools_are_no_tools(nothing: Any) -> None:
    assert check_chat({"messages": [HI], "tools": nothing}, ChatRules())[1].tools is None


def test_what_is_null_within_calls_and_tools_counts_as_absent() -> None:
    """A table gives each object the keys of all others."""
    call = {**CALL, "index": None}
    calling = {"role": "assistant", "tool_calls": [call]}
    row = {"messages": [calling, HI], "tools": [{"function": {"a": None}}]}
    turns, options = check_chat(row, ChatRules())
    assert (turns[0]["tool_calls"], options.tools) == ([CALL], [{"function": {}}])
