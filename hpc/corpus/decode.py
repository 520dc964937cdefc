"""Decode a line of JSON to the object of its row. No other module decodes the JSON of a corpus. Pure."""

import json
from typing import Any

from hpc import quick_json
from hpc.corpus.errors import RowError

MAX_DEPTH = 100
"""Maximum depth of lists and objects in a row: Python decodes deeper ones, but cannot encode them for the output."""


def decode_row(line: bytes) -> dict[str, Any]:
    """Return the JSON object of a line; raise `RowError` if it is none."""
    try:
        value = quick_json.decode(line)
        if type(value) is dict and (
            (line.find(b"{", 1) < 0 and line.find(b"[") < 0)  # looked for in a fifth of the time that counting takes
            or line.count(b"[") + line.count(b"{") <= MAX_DEPTH
        ):
            return value
    except ValueError:
        pass  # what is wrong with it, or what the quick decoder does not take, is told below
    text = decode_text(line).strip()
    try:
        value = _JSON.decode(text)
    except (ValueError, RecursionError) as error:
        reason = "it is nested too deeply" if isinstance(error, RecursionError) else str(error)
        raise RowError("not_json", f"{short(text)} is not JSON ({reason}); each line must be one object") from None
    if text.count("[") + text.count("{") > MAX_DEPTH and _depth(value) > MAX_DEPTH:
        raise RowError("not_json", f"{short(text)} is nested too deeply; at most {MAX_DEPTH} levels can be carried")
    if not isinstance(value, dict):
        raise RowError("not_object", f'{short(text)} is not an object; a row looks like {{"prompt": "…"}}')
    return value


def decode_text(data: bytes, what: str = "line") -> str:
    """Return the text of a line, or of what else it is called; raise `RowError` if it is not UTF-8."""
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        byte = data[error.start]
        raise RowError(
            "invalid_utf8", f"byte {error.start + 1} of the {what} is 0x{byte:02x}; a corpus must be UTF-8"
        ) from None


def short(value: object) -> str:
    """Return a value for a message: a string as it is, anything else as JSON, cut to 60 characters."""
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)
    return text if len(text) <= 60 else f"{text[:57]}..."


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
