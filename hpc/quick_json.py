"""Decode and encode JSON by orjson where that gives what the json module gives.

orjson makes a float of an integer above 64 bits, writes floats otherwise, and refuses half surrogate pairs, which the
json module takes. Here no value comes out other than from the json module: where it could, an error is raised, and the
caller asks the json module.
"""

import json
from typing import Any

import orjson

_JSON = json.JSONEncoder(ensure_ascii=False, allow_nan=False)
_MAX_DIGITS = 18
"""Integers with so many digits have 64 bits at most."""
_AS_ZEROS = bytes(ord("0") if ord("0") <= byte <= ord("9") else ord(" ") for byte in range(256))
_LONG = b"0" * (_MAX_DIGITS + 1)
_MANY = 16
"""From so many items on the json module takes less time than a call for each of them."""


def decode(data: bytes) -> Any:
    """Return the value of UTF-8 JSON; raise `ValueError` where it is none, or where the json module may say another."""
    value = orjson.loads(data)
    if _LONG in data.translate(_AS_ZEROS):  # digits of a string too: seldom, and no loss but of time
        raise ValueError("a number of it may be an integer above 64 bits")
    return value


def decode_string(data: bytes) -> str:
    """Return the value of a string of JSON."""
    try:
        text: str = orjson.loads(data)
    except ValueError:
        text = json.loads(data)
    return text


def encode(value: Any) -> bytes:
    """Return what the json module writes in UTF-8, with a space behind comma and colon.

    Raises `TypeError` or `ValueError` for what it does not write, half of a surrogate pair among it. The json
    module needs longer to begin than a small value takes.
    """
    kind = type(value)
    if kind is str:
        return orjson.dumps(value)
    if kind is dict and len(value) < _MANY:
        return b"{" + b", ".join([orjson.dumps(key) + b": " + encode(item) for key, item in value.items()]) + b"}"
    if kind is list and len(value) < _MANY:
        return b"[" + b", ".join([encode(item) for item in value]) + b"]"
    if kind is int:
        return b"%d" % value
    if value is None:
        return b"null"
    if kind is float and value - value == 0:  # finite
        return repr(value).encode()
    return _JSON.encode(value).encode()
