"""Read a corpus: find its files, cut it into blocks of lines, check rows.

Knows nothing of models, ranks or run directories. A row that breaks a rule raises `RowError`; the
rules stand in the README under "Input".
"""

import dataclasses
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hpc.request import RowId
from hpc.sampling_params import SamplingParams

STDIN = Path("/dev/stdin")
"""The corpus file that "-" stands for."""

PROMPT_KEYS = ("prompt", "messages", "prompt_token_ids")
ROLES = ("system", "user", "assistant", "tool")
ROW_KEYS = (*PROMPT_KEYS, "id", "sampling")
MAX_DEPTH = 100


class RowError(ValueError):
    """One row breaks a rule. `kind` is a word for programs, the text says value, rule and way out."""

    def __init__(self, kind: str, message: str) -> None:
        super().__init__(message)
        self.kind = kind


@dataclass(frozen=True)
class Row:
    """A checked row. Exactly one of `prompt`, `messages` and `token_ids` is not None."""

    id: RowId
    prompt: str | None
    messages: list[dict[str, Any]] | None
    """Turns of role and content: a string, or a list of text parts."""
    token_ids: list[int] | None
    sampling: SamplingParams


def decode_row(line: bytes) -> dict[str, Any]:
    """Return the JSON object of a line; raise `RowError` if it is none."""
    try:
        text = line.decode("utf-8").strip()
    except UnicodeDecodeError as error:
        byte = line[error.start]
        raise RowError(
            "invalid_utf8", f"byte {error.start + 1} of the line is 0x{byte:02x}; a corpus must be UTF-8"
        ) from None
    try:
        value = _JSON.decode(text)
    except (ValueError, RecursionError) as error:
        reason = "it is nested too deeply" if isinstance(error, RecursionError) else str(error)
        raise RowError("not_json", f"{_short(text)} is not JSON ({reason}); each line must be one object") from None
    if text.count("[") + text.count("{") > MAX_DEPTH and _depth(value) > MAX_DEPTH:
        raise RowError("not_json", f"{_short(text)} is nested too deeply; at most {MAX_DEPTH} levels can be carried")
    if not isinstance(value, dict):
        raise RowError("not_object", f'{_short(text)} is not an object; a row looks like {{"prompt": "…"}}')
    return value


def row_id(value: dict[str, Any], row: int) -> RowId:
    """Return the id of a row: the one it names, else its index."""
    given = value.get("id")
    if given is None:
        return row
    if isinstance(given, bool) or not isinstance(given, int | str):
        raise RowError("id", f'"id" is {_short(given)}; it must be a string or an integer')
    return given


def row_meta(value: dict[str, Any]) -> dict[str, Any]:
    """Return what a row carries besides the keys that mean something here."""
    return {key: kept for key, kept in value.items() if key not in ROW_KEYS}


def check_row(value: dict[str, Any], identity: RowId, defaults: SamplingParams) -> Row:
    """Check a decoded row against every rule that needs no model."""
    given = [key for key in PROMPT_KEYS if value.get(key) is not None]
    if len(given) != 1:
        found = " and ".join(f'"{key}"' for key in given) or f"no prompt but {_short(list(value))}"
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


def _no_constant(name: str) -> Any:
    raise ValueError(f"{name} is no JSON number")


def _finite(number: str) -> float:
    value = float(number)
    if value in (float("inf"), float("-inf")):
        raise ValueError(f"{number} is too large for a number")
    return value


_JSON = json.JSONDecoder(parse_constant=_no_constant, parse_float=_finite)
"""Made once: making it takes as long as reading a short row."""


def _depth(value: object) -> int:
    """Return how deeply lists and objects are nested, without recursion."""
    depth, level = 0, [value]
    while level := [value for value in level if isinstance(value, dict | list)]:
        depth += 1
        level = [inner for value in level for inner in (value.values() if isinstance(value, dict) else value)]
    return depth


def _short(value: object) -> str:
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)
    return text if len(text) <= 60 else f"{text[:57]}..."


def _text(value: object, name: str) -> str:
    if not isinstance(value, str):
        raise RowError("prompt", f"{name} is {_short(value)}; it must be a string")
    try:
        value.encode("utf-8")
    except UnicodeEncodeError as error:
        raise RowError(
            "invalid_utf8", f"{name} has half of a surrogate pair at character {error.start}; it is not Unicode text"
        ) from None
    return value


def _messages(value: object) -> list[dict[str, Any]]:
    if not isinstance(value, list):
        raise RowError("messages", f'"messages" is {_short(value)}; it must be a list of {{"role", "content"}}')
    if not value:
        raise RowError("empty", '"messages" is empty; it must have at least one turn')
    turns = []
    for index, given in enumerate(value):
        name = f'"messages"[{index}]'
        turn = {key: kept for key, kept in given.items() if kept is not None} if isinstance(given, dict) else {}
        if set(turn) != {"role", "content"}:
            raise RowError("messages", f'{name} is {_short(given)}; it must have "role" and "content", nothing else')
        if turn["role"] not in ROLES:
            raise RowError("role", f"{name} has the role {_short(turn['role'])}; the roles are {', '.join(ROLES)}")
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
                f'part {index} of {name} is {_short(given)}; a part must be {{"type": "text", "text": "…"}}, for '
                "nothing but text can be read",
            )
        parts.append({"type": "text", "text": _text(part["text"], f'the "text" of part {index} of {name}')})
    return parts


def _token_ids(value: object) -> list[int]:
    if not isinstance(value, list) or not all(isinstance(t, int) and not isinstance(t, bool) for t in value):
        raise RowError("token_ids", f'"prompt_token_ids" is {_short(value)}; it must be a list of integers')
    if not value:
        raise RowError("empty", '"prompt_token_ids" is empty; it must have at least one token')
    return value


def _sampling(value: object, defaults: SamplingParams) -> SamplingParams:
    if value is None:
        return defaults
    if not isinstance(value, dict):
        names = ", ".join(field.name for field in dataclasses.fields(defaults))
        raise RowError("sampling", f'"sampling" is {_short(value)}; it must be an object with some of {names}')
    try:
        return defaults.overridden(value)
    except ValueError as error:
        raise RowError("sampling", str(error)) from None
