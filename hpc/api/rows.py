"""Turn the prompts or chats of a Python call into rows of a corpus. Pure."""

import json
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

Prompt = str | Mapping[str, Any] | Sequence[int] | Sequence[Mapping[str, Any]]
"""Text; a row as a corpus has it; token ids; or the turns of a chat."""
Prompts = Iterable[Prompt]
Chats = Iterable[Sequence[Mapping[str, Any]]]


def corpus_rows(prompts: Prompts | None, messages: Chats | None) -> list[dict[str, Any]]:
    """Return the rows that prompts or chats stand for; raise `TypeError` for what is no list of them.

    The rows themselves are not checked here: the check of rows makes an error of a wrong one.
    """
    if (prompts is None) == (messages is None):
        raise TypeError("give a list of prompts, or a list of chats as messages=[[…], …]; one of the two")
    if prompts is not None:
        return [_row(prompt) for prompt in _listed(prompts, "prompts", 'a list: generate(["…"], …)')]
    chats = _listed(messages, "messages", "a list of chats: messages=[[…], …]")
    if any(isinstance(chat, Mapping) for chat in chats):
        raise TypeError("messages is one chat; it must be a list of chats: messages=[[…], …]")
    return [{"messages": chat} for chat in chats]


def json_line(row: Mapping[str, Any]) -> bytes:
    """Return a row as a line of JSON; a value that JSON cannot carry becomes one that the check of rows refuses."""
    try:
        return json.dumps(row, default=_plain, skipkeys=True).encode()
    except (ValueError, RecursionError) as error:  # it contains itself
        return json.dumps(f"a row of which JSON says: {error}").encode()


def _listed(values: Any, name: str, rule: str) -> list[Any]:
    if isinstance(values, str | bytes | Mapping):
        raise TypeError(f"{name} is one {type(values).__name__}; it must be {rule}")
    if hasattr(values, "columns"):  # iterated, it would give columns or their names
        raise TypeError(
            f"{name} is a table ({type(values).__name__}); give its rows: table.to_dict('records') of pandas, "
            "table.to_pylist() of pyarrow, or one column of texts"
        )
    if callable(as_python := getattr(values, "to_pylist", None)):  # iterated, it would give scalars of pyarrow
        return list(as_python())
    try:
        return list(values)
    except TypeError:
        raise TypeError(f"{name} is {values!r}; it must be {rule}") from None


def _row(prompt: Any) -> dict[str, Any]:
    if isinstance(prompt, Mapping):
        return dict(prompt)
    if isinstance(prompt, str) or not hasattr(prompt, "__len__"):
        return {"prompt": prompt}
    values = _plain(prompt) if not isinstance(prompt, list | tuple) else list(prompt)
    is_chat = isinstance(values, list) and any(isinstance(value, Mapping) for value in values)
    return {"messages" if is_chat else "prompt_token_ids": values}


def _plain(value: Any) -> Any:
    """Return the JSON value of an object that is none: an array or number of numpy or torch, a mapping, a sequence."""
    if isinstance(value, Mapping):
        return dict(value)
    for name in ("tolist", "to_pylist"):
        if callable(method := getattr(value, name, None)):
            return method()
    return list(value) if isinstance(value, Sequence) and not isinstance(value, bytes) else {"not JSON": repr(value)}
