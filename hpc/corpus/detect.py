"""Say what a corpus file is that is not JSONL, from its first bytes. Pure.

A row that is broken is an error row and no reason to refuse a corpus. So a file is refused only where it is
clear: by the signature of its format, or where none of its first lines is an object and the first does not look as
if it were to be one.
"""

import json

from hpc.corpus.decode import decode_row
from hpc.corpus.errors import RowError
from hpc.corpus.row import PROMPT_KEYS

HEAD_BYTES = 1 << 16
"""How much of a file is looked at."""

_MAX_LINES = 100

_PACKED = {
    b"\x1f\x8b": ("gzip", "gunzip -c"),
    b"\x28\xb5\x2f\xfd": ("zstd", "zstd -dc"),
    b"BZh": ("bzip2", "bunzip2 -c"),
    b"\xfd7zXZ\0": ("xz", "xz -dc"),
    b"\x04\x22\x4d\x18": ("lz4", "lz4 -dc"),
}
_BINARY = {
    b"PAR1": "Parquet",
    b"ARROW1": "Arrow",
    b"\xff\xff\xff\xff": "Arrow",
    b"Obj\x01": "Avro",
    b"PK\x03\x04": "a zip archive (or .xlsx, .npz)",
    b"SQLite format 3\0": "an SQLite database",
    b"\x89HDF": "HDF5",
    b"\x93NUMPY": "a numpy array",
    b"\x80\x04": "a Python pickle",
    b"\x80\x05": "a Python pickle",
    b"%PDF-": "a PDF",
}
_ROW = 'a corpus is JSONL, one object on each line such as {"prompt": "…"}'


def foreign(head: bytes, name: str) -> str | None:
    """Return what a file is that begins with `head`, and the way out; None for what may be JSONL.

    `head` is the whole file if it is shorter than `HEAD_BYTES`; `name` is its name in the commands that are given.
    """
    for magic, (packed, command) in _PACKED.items():
        if head.startswith(magic):
            return f"it is packed with {packed}; unpack it: {command} {name} | scattergen run --corpus - --name …"
    if head[257:262] == b"ustar":
        return f"it is a tar archive; unpack it, {_ROW}"
    for magic, what in _BINARY.items():
        if head.startswith(magic):
            return f"it is {what}; write its rows as JSONL (to_json(…, orient='records', lines=True) of pandas): {_ROW}"
    if (encoding := _wide(head)) is not None:
        return f"it is {encoding}, and a corpus is UTF-8; convert it: iconv -f {encoding} -t UTF-8 {name}"
    return _text(head, name)


def _wide(head: bytes) -> str | None:
    """Return the encoding of text whose characters have two or four bytes."""
    if head.startswith((b"\xff\xfe\0\0", b"\0\0\xfe\xff")):
        return "UTF-32"
    if head.startswith((b"\xff\xfe", b"\xfe\xff")):
        return "UTF-16"
    even, odd = head[:64:2], head[1:64:2]
    if len(head) >= 4 and not head.startswith(b"\0\0"):
        if not any(odd) and all(even):
            return "UTF-16LE"
        if not any(even) and all(odd):
            return "UTF-16BE"
    return None


def _text(head: bytes, name: str) -> str | None:
    text = head.removeprefix(b"\xef\xbb\xbf").strip()
    if not text:
        return None
    whole = len(head) < HEAD_BYTES
    if text.startswith(b"[") and _is_array(text.decode("utf-8", "replace"), whole):
        return f"it is a JSON array; write each of its objects on a line: jq -c '.[]' {name}"
    if text.startswith(b"{") and _is_spread(text.decode("utf-8", "replace")):
        return f"it holds an object that goes over several lines; write each on one line: jq -c . {name}"
    lines = [line for line in text.split(b"\n") if line.strip()]
    if not whole and len(lines) > 1:
        lines.pop()  # it may go on
    objects = []
    for line in lines[:_MAX_LINES]:
        try:
            objects.append(decode_row(line))
        except RowError:
            continue
    if objects and all("custom_id" in row and "body" in row and not set(row) & set(PROMPT_KEYS) for row in objects):
        return (
            "it is a batch file of OpenAI's API, which is not read yet; write its rows as a corpus has them: "
            f"jq -c '{{id: .custom_id, messages: .body.messages}}' {name}"
        )
    if objects or text.startswith(b"{"):
        return None
    if text.startswith(b"["):
        return f"its lines are JSON, but no objects; {_ROW}"
    first = lines[0]
    table = next((kind for mark, kind in ((b"\t", "TSV"), (b",", "CSV"), (b";", "CSV")) if mark in first), None)
    return f"it looks like {table or 'plain text'}: its first line is no JSON object, nor is one after it; {_ROW}"


def _is_array(text: str, whole: bool) -> bool:
    """Say whether a text is one array of objects, or the beginning of one."""
    decoder, at, found = json.JSONDecoder(), 1, 0
    while True:
        at = _behind_spaces(text, at)
        if found and text[at : at + 1] == "]":
            return not text[at + 1 :].strip()
        try:
            value, at = decoder.raw_decode(text, at)
        except (ValueError, RecursionError):
            return found > 0 and not whole
        if not isinstance(value, dict):
            return False
        found += 1
        at = _behind_spaces(text, at)
        if at == len(text):
            return not whole
        if text[at] == ",":
            at += 1
        elif text[at] != "]":
            return False


def _is_spread(text: str) -> bool:
    """Say whether a text begins with an object of several lines."""
    try:
        _, end = json.JSONDecoder().raw_decode(text)
    except (ValueError, RecursionError):
        return False
    return "\n" in text[:end]


def _behind_spaces(text: str, at: int) -> int:
    return len(text) - len(text[at:].lstrip())
