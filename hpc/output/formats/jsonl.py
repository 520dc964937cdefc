"""JSONL: a line a row, the bytes of which are promised."""

import json
from typing import Any

from hpc import quick_json
from hpc.output.formats.lines import Lines
from hpc.output.journal import Spans
from hpc.output.row import OutputRow

_JSON = json.JSONEncoder(ensure_ascii=False, allow_nan=False)
_ROW = (
    b'{"id": %b, "text": %b, "finish_reason": "%b", '
    b'"usage": {"prompt_tokens": %d, "completion_tokens": %d}, "error": null%b}\n'
)


class Jsonl(Lines):
    """The output row as a JSON object."""

    def entry(self, row: OutputRow) -> bytes:
        """Return the line of a row, put together from the pieces of its record where it has no more than those."""
        answer = row.answer
        if type(answer) is Spans:
            try:
                return _spliced(row, answer)
            except (TypeError, ValueError):  # half a surrogate pair: JSON can carry it, UTF-8 cannot
                pass
        return encode(row.value)

    def name(self, value: dict[str, Any] | None) -> str:
        """Return the name that a line says."""
        if value is None:
            return self.name_of(None, None)
        error = value.get("error")
        known = isinstance(error, dict) and isinstance(error.get("message"), str)
        return self.name_of(value.get("id"), error if known else None)

    def without_meta(self, entry: bytes) -> bytes:
        """Return a line without its `meta`."""
        value = self.value(entry)
        return entry if value is None or value.pop("meta", None) is None else encode(value)


def encode(value: dict[str, Any]) -> bytes:
    """Return the line of an object."""
    try:
        return _JSON.encode(value).encode() + b"\n"
    except UnicodeEncodeError:  # half a surrogate pair in "id" or "meta": JSON can carry it, UTF-8 cannot
        return json.dumps(value, allow_nan=False).encode() + b"\n"


def _spliced(row: OutputRow, answer: Spans) -> bytes:
    """Return the line of a row; raise `TypeError` or `ValueError` for half of a surrogate pair in it."""
    text, more = answer.text, b""
    if b"\\u" in text:  # not ASCII, as journals escape it
        text = quick_json.encode(quick_json.decode_string(text))
    if row.meta:
        more = b', "meta": ' + quick_json.encode(row.meta)
    if row.return_token_ids:
        more += b', "token_ids": [%b]' % answer.token_ids.replace(b",", b", ")
    return _ROW % (
        quick_json.encode(row.id), text, answer.finish_reason, row.prompt_tokens, answer.num_tokens, more,
    )  # fmt: skip
