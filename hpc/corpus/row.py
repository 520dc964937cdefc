"""Check a row: the rules for a decoded value that need no model.

Knows nothing of formats, models, ranks or run directories. A row that breaks a rule raises `RowError`; the rules stand
in docs/formats.md under "Input".
"""

import dataclasses
from dataclasses import dataclass
from typing import Any

from hpc.corpus.decode import short
from hpc.corpus.errors import RowError
from hpc.request import RowId
from hpc.sampling_params import SamplingParams

PROMPT_KEYS = ("prompt", "messages", "prompt_token_ids")
ROLES = ("system", "user", "assistant", "tool")
ROW_KEYS = (*PROMPT_KEYS, "id", "sampling")


@dataclass(frozen=True)
class Row:
    """A checked row. Exactly one of `prompt`, `messages` and `token_ids` is not None."""

    id: RowId
    prompt: str | None
    messages: list[dict[str, Any]] | None
    """Turns of role and content: a string, or a list of text parts."""
    token_ids: list[int] | None
    sampling: SamplingParams


def row_id(value: dict[str, Any], row: int) -> RowId:
    """Return the id of a row: the one it names, else its index."""
    given = value.get("id")
    if given is None:
        return row
    if isinstance(given, bool) or not isinstance(given, int | str):
        raise RowError("id", f'"id" is {short(given)}; it must be a string or an integer')
    return given


def row_meta(value: dict[str, Any]) -> dict[str, Any]:
    """Return what a row carries besides the keys that mean something here."""
    return {key: kept for key, kept in value.items() if key not in ROW_KEYS}


def check_row(value: dict[str, Any], identity: RowId, defaults: SamplingParams) -> Row:
    """Check a decoded row against every rule that needs no model."""
    given = [key for key in PROMPT_KEYS if value.get(key) is not None]
    if len(given) != 1:
        found = " and ".join(f'"{key}"' for key in given) or f"no prompt but {short(list(value))}"
        raise RowError("prompt", f'the row has {found}; it must have one of "prompt", "messages", "prompt_token_ids"')
    prompt = messages = token_ids = None
    if given == ["prompt"]:
        prompt = _text(value["prompt"], '"prompt"')
        if not prompt:
            raise RowError("empty", '"prompt" is empty; it must have at least one character')
    elif given == ["messages"]:
        messages = _messages(value["messages"])
    else:
        token_ids = _token_ids(value["prompt_token_ids"])
    return Row(identity, prompt, messages, token_ids, _sampling(value.get("sampling"), defaults))


def _text(value: object, name: str) -> str:
    if not isinstance(value, str):
        raise RowError("prompt", f"{name} is {short(value)}; it must be a string")
    try:
        value.encode("utf-8")
    except UnicodeEncodeError as error:
        raise RowError(
            "invalid_utf8", f"{name} has half of a surrogate pair at character {error.start}; it is not Unicode text"
        ) from None
    return value


def _messages(value: object) -> list[dict[str, Any]]:
    if not isinstance(value, list):
        raise RowError("messages", f'"messages" is {short(value)}; it must be a list of {{"role", "content"}}')
    if not value:
        raise RowError("empty", '"messages" is empty; it must have at least one turn')
    turns = []
    for index, given in enumerate(value):
        name = f'"messages"[{index}]'
        turn = {key: kept for key, kept in given.items() if kept is not None} if isinstance(given, dict) else {}
        if set(turn) != {"role", "content"}:
            raise RowError("messages", f'{name} is {short(given)}; it must have "role" and "content", nothing else')
        if turn["role"] not in ROLES:
            raise RowError("role", f"{name} has the role {short(turn['role'])}; the roles are {', '.join(ROLES)}")
        turns.append({"role": turn["role"], "content": _content(turn["content"], f'the "content" of {name}')})
    if turns[-1]["role"] == "assistant":
        raise RowError(
            "messages",
            f"{name} is the last turn and the assistant's, which a chat template closes: nothing would go on with it; "
            'end with another role, or write the whole prompt as "prompt"',
        )
    return turns


def _content(value: object, name: str) -> str | list[dict[str, str]]:
    """Check the content of a turn, which may be empty: a string, or a list of text parts."""
    if not isinstance(value, list):
        return _text(value, name)
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
        parts.append({"type": "text", "text": _text(part["text"], f'the "text" of part {index} of {name}')})
    return parts


def _token_ids(value: object) -> list[int]:
    if not isinstance(value, list) or not all(isinstance(t, int) and not isinstance(t, bool) for t in value):
        raise RowError("token_ids", f'"prompt_token_ids" is {short(value)}; it must be a list of integers')
    if not value:
        raise RowError("empty", '"prompt_token_ids" is empty; it must have at least one token')
    return value


def _sampling(value: object, defaults: SamplingParams) -> SamplingParams:
    if value is None:
        return defaults
    if not isinstance(value, dict):
        names = ", ".join(field.name for field in dataclasses.fields(defaults))
        raise RowError("sampling", f'"sampling" is {short(value)}; it must be an object with some of {names}')
    try:
        return defaults.overridden(value)
    except ValueError as error:
        raise RowError("sampling", str(error)) from None
