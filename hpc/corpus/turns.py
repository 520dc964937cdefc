"""Check the turns of a chat, and how it ends. Pure: which roles and keys there are, the chat template decides."""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from hpc.corpus.chat import PLAIN, ChatOptions
from hpc.corpus.decode import short
from hpc.corpus.errors import RowError
from hpc.prompts import RESERVED

CHAT_KEYS = ("tools", "documents", "chat_template_kwargs", "chat_template", "add_generation_prompt",
             "continue_final_message")  # fmt: skip
"""Keys that say how a chat is written, beside its turns."""

FROM_ROLES: Mapping[str, str] = {
    "human": "user", "gpt": "assistant", "function": "tool", "observation": "tool", "function_call": "assistant",
}  # fmt: skip
"""Roles of "conversations" under their own names; others stay as they are."""


@dataclass(frozen=True)
class ChatRules:
    """The options of a job for chats."""

    last_assistant: Literal["refuse", "continue", "drop", "keep"] = "refuse"
    variables: Mapping[str, Any] = field(default_factory=dict)
    """Variables of the template; those of a row take precedence."""
    own_templates: bool = False
    """Whether a row may bring its chat template."""
    system: str = ""
    """System turn for chats that have none."""


def check_chat(value: Mapping[str, Any], rules: ChatRules) -> tuple[list[dict[str, Any]], ChatOptions]:
    """Return the turns of a row with "messages" and the options of its template; raise `RowError` for a broken rule."""
    turns = _turns(value["messages"])
    if rules.system and turns[0]["role"] not in ("system", "developer"):
        turns.insert(0, {"role": "system", "content": rules.system})
    options = PLAIN
    if rules.variables or not value.keys().isdisjoint(CHAT_KEYS):
        options = ChatOptions(
            _objects(value, "tools"), _objects(value, "documents"), _variables(value, rules), _template(value, rules)
        )
    return _end(turns, options, value, rules)


def is_chat(value: object) -> bool:
    """Return whether a value is a list of objects, as turns are."""
    return isinstance(value, list) and bool(value) and all(isinstance(turn, dict) for turn in value)


def from_conversations(value: object) -> object:
    """Convert turns of "from" and "value" to turns of "role" and "content"; leave anything else as it is."""
    return [_from_value(turn) for turn in value] if isinstance(value, list) else value


def without_answer(turns: list[Any]) -> list[Any]:
    """Return turns without the assistant's turns at their end."""
    end = len(turns)
    while end and isinstance(turns[end - 1], dict) and turns[end - 1].get("role") == "assistant":
        end -= 1
    return turns[:end]


def without_nulls(value: Any) -> Any:
    """Return a value without keys that are null, at any depth: a table gives each object the keys of all others."""
    if isinstance(value, dict):
        return {key: without_nulls(kept) for key, kept in value.items() if kept is not None}
    return [without_nulls(each) for each in value] if isinstance(value, list) else value


def check_text(value: object, name: str) -> str:
    """Return a string of Unicode text; raise `RowError` for anything else."""
    if not isinstance(value, str):
        raise RowError("prompt", f"{name} is {short(value)}; it must be a string")
    try:
        value.encode("utf-8")
    except UnicodeEncodeError as error:
        raise RowError(
            "invalid_utf8", f"{name} has half of a surrogate pair at character {error.start}; it is not Unicode text"
        ) from None
    return value


def _from_value(turn: object) -> object:
    if not isinstance(turn, dict) or "from" not in turn or "value" not in turn:
        return turn
    role = turn["from"]
    own = {name: kept for name, kept in turn.items() if name not in ("from", "value")}
    return {"role": FROM_ROLES.get(role, role) if isinstance(role, str) else role, "content": turn["value"], **own}


def _turns(value: object) -> list[dict[str, Any]]:
    if not isinstance(value, list):
        raise RowError("messages", f'"messages" is {short(value)}; it must be a list of {{"role", "content"}}')
    if not value:
        raise RowError("empty", '"messages" is empty; it must have at least one turn')
    return [_turn(given, f'"messages"[{index}]') for index, given in enumerate(value)]


def _turn(given: object, name: str) -> dict[str, Any]:
    """Check one turn. The assistant's may have no content beside other keys: calls of tools, reasoning."""
    turn = {key: kept for key, kept in given.items() if kept is not None} if isinstance(given, dict) else {}
    says_more = turn.get("role") == "assistant" and len(turn) > 1
    if "role" not in turn or not ("content" in turn or says_more):
        raise RowError("messages", f'{name} is {short(given)}; it must have "role" and "content"')
    if not isinstance(turn["role"], str) or not turn["role"]:
        raise RowError("role", f"{name} has the role {short(turn['role'])}; it must be a word, such as user")
    check_text(turn["role"], f'the "role" of {name}')
    for key in turn.keys() - {"role", "content"}:
        turn[key] = without_nulls(turn[key])
    if "content" in turn:
        turn["content"] = _content(turn["content"], f'the "content" of {name}')
    return turn


def _content(value: object, name: str) -> str | list[dict[str, str]]:
    """Check the content of a turn, which may be empty: a string, or a list of text parts."""
    if not isinstance(value, list):
        return check_text(value, name)
    if not value:
        raise RowError("empty", f"{name} is an empty list; it must be a string or have at least one part")
    parts = []
    for index, given in enumerate(value):
        part = {key: kept for key, kept in given.items() if kept is not None} if isinstance(given, dict) else {}
        if set(part) != {"type", "text"} or part["type"] != "text":
            raise RowError(
                "messages",
                f'part {index} of {name} is {short(given)}; a part must be {{"type": "text", "text": "…"}}, for '
                "nothing but text can be read",
            )
        parts.append({"type": "text", "text": check_text(part["text"], f'the "text" of part {index} of {name}')})
    return parts


def _objects(value: Mapping[str, Any], name: str) -> list[dict[str, Any]] | None:
    """Return the tools or documents of a row, if there are any."""
    given = value.get(name)
    if given in (None, [], ""):
        return None
    given = without_nulls(given)
    if not isinstance(given, list) or not all(isinstance(each, dict) for each in given):
        raise RowError(
            "messages",
            f'"{name}" is {short(given)}; it must be a list of objects. If it is nothing for the chat template: '
            f"--column {name}= carries it along",
        )
    return given


def _variables(value: Mapping[str, Any], rules: ChatRules) -> Mapping[str, Any]:
    given = value.get("chat_template_kwargs")
    if given is None:
        return rules.variables
    if not isinstance(given, dict):
        raise RowError("messages", f'"chat_template_kwargs" is {short(given)}; it must be an object')
    if taken := sorted(RESERVED & given.keys()):
        raise RowError(
            "messages", f'"chat_template_kwargs" has "{taken[0]}", which a row says beside it, or not at all'
        )
    return {**rules.variables, **{name: kept for name, kept in given.items() if kept is not None}}


def _template(value: Mapping[str, Any], rules: ChatRules) -> str | None:
    given = value.get("chat_template")
    if given is None:
        return None
    if not rules.own_templates:
        raise RowError(
            "template",
            'the row brings a "chat_template", a program that may never end; --row-chat-templates lets rows do so, '
            "--chat-template FILE gives one to all",
        )
    return check_text(given, '"chat_template"')


def _end(
    turns: list[dict[str, Any]], options: ChatOptions, value: Mapping[str, Any], rules: ChatRules
) -> tuple[list[dict[str, Any]], ChatOptions]:
    """Decide whether the completion is a new turn of the assistant or continues the last one."""
    continues = _flag(value, "continue_final_message")
    begins = _flag(value, "add_generation_prompt")
    if continues and begins:
        raise RowError(
            "messages", '"continue_final_message" and "add_generation_prompt" are both true; one of them must be false'
        )
    if continues:
        return turns, replace(options, begins=False, continues=True)
    if begins is not None:
        return turns, replace(options, begins=begins)
    if turns[-1]["role"] != "assistant" or rules.last_assistant == "keep":
        return turns, options
    if rules.last_assistant == "continue":
        return turns, replace(options, begins=False, continues=True)
    if rules.last_assistant == "drop":
        if not (kept := without_answer(turns)):
            raise RowError("empty", '"messages" has turns of the assistant alone; --last-assistant drop leaves none')
        return kept, options
    name = f'"messages"[{len(value["messages"]) - 1}]'
    raise RowError(
        "messages",
        f"{name} is the last turn and the assistant's; the last turn must be one that the model is to answer: "
        "--last-assistant continue goes on with the assistant's turn, drop leaves it out, keep lets another follow",
    )


def _flag(value: Mapping[str, Any], name: str) -> bool | None:
    given = value.get(name)
    if given is not None and not isinstance(given, bool):
        raise RowError("messages", f'"{name}" is {short(given)}; it must be true or false')
    return given
