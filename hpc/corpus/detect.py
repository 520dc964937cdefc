"""Detect the format of a corpus file from its first bytes; its name decides between CSV, TSV and plain text. Pure.

A broken row becomes an error row and is no reason to refuse a corpus. A file is refused only if it has the signature of
a format that is not read, or if it is text in which neither content nor name tells the rows apart.
"""

import json
import re

from hpc.corpus.decode import decode_row
from hpc.corpus.errors import CorpusError, RowError
from hpc.corpus.formats import FORMATS
from hpc.corpus.formats.arrow import FILE_MAGIC
from hpc.corpus.formats.stream import BOM

HEAD_BYTES = 1 << 16
"""Bytes of a file that are examined: a few rows, even long ones."""

_MAX_LINES = 100
"""Lines among which one must be an object: a corpus may begin with some broken ones."""

PACKED = (".gz", ".bz2", ".zst", ".xz")
SUFFIXES = {
    ".jsonl": "jsonl", ".ndjson": "jsonl", ".json": "json", ".csv": "csv", ".tsv": "tsv", ".tab": "tsv",
    ".txt": "text", ".text": "text", ".parquet": "parquet", ".arrow": "arrow", ".feather": "arrow",
}  # fmt: skip
"""The usual names of files. They choose the files of a folder, and tell CSV, TSV and plain text apart."""

_TABLES = {b"PAR1": "parquet", FILE_MAGIC: "arrow", b"\xff\xff\xff\xff": "arrow"}
_REFUSED = {
    b"\x04\x22\x4d\x18": "packed with lz4",
    b"Obj\x01": "Avro",
    b"PK\x03\x04": "a zip archive (or .xlsx, .npz)",
    b"SQLite format 3\0": "an SQLite database",
    b"\x89HDF": "HDF5",
    b"\x93NUMPY": "a numpy array",
    b"\x80\x04": "a Python pickle",
    b"\x80\x05": "a Python pickle",
    b"%PDF-": "a PDF",
    b"FEA1": "an old Feather file",
}
_ROW = 'a corpus is JSONL, one object on each line such as {"prompt": "…"}'


def named_format(name: str) -> str:
    """Return the format that a name promises; an empty string if it promises none."""
    stem, dot, suffix = name.lower().rpartition(".")
    if dot + suffix in PACKED:
        stem, dot, suffix = stem.rpartition(".")
    return SUFFIXES.get(dot + suffix, "")


def table_format(head: bytes) -> str:
    """Return the format of the table that begins with `head`; an empty string if it is no table."""
    return next((found for magic, found in _TABLES.items() if head.startswith(magic)), "")


def recognise(head: bytes, name: str, whole: bool) -> str:
    """Return the format of the text that begins with `head`; raise `CorpusError` with the way out for another.

    `whole` says that the file ends there. `name` stands in messages; its suffix decides where the text does not.
    """
    reason = _refusal(head)
    if not reason:
        found = _text_format(head, named_format(name), whole)
        if found in FORMATS:
            return found
        reason = found
    raise CorpusError(f'corpus "{name}" cannot be read: {reason}')


def _refusal(head: bytes) -> str:
    if head[257:262] == b"ustar":
        return f"it is a tar archive; unpack it, {_ROW}"
    for magic, what in _REFUSED.items():
        if head.startswith(magic):
            return f"it is {what}; unpack it, or write its rows as JSONL or Parquet: {_ROW}"
    if table_format(head):
        return "it is Parquet or Arrow, packed once more; unpack it"
    return ""


def _text_format(head: bytes, named: str, whole: bool) -> str:
    """Return the format of a text, or the reason to refuse it."""
    text = head.removeprefix(BOM).strip()
    if not text:
        return named if named in ("csv", "tsv", "text") else "jsonl"
    if text.startswith(b"[") and _is_array(text.decode("utf-8", "replace"), whole):
        return "json"
    if text.startswith(b"{") and _is_spread(text.decode("utf-8", "replace")):
        return "json"
    lines = [line for line in text.split(b"\n") if line.strip()]
    if not whole and len(lines) > 1:
        lines.pop()  # it may go on
    objects = [_object(line) for line in lines[:_MAX_LINES]]
    rows = [value for value in objects if value is not None]
    if named in ("csv", "tsv", "text"):
        return "jsonl" if objects[0] is not None else named
    if rows or text.startswith(b"{"):
        return "jsonl"
    if text.startswith(b"["):  # the reader of arrays tells what is broken, and where
        return "json" if _is_broken_array(lines[0]) else f"its lines are JSON, but no objects; {_ROW}"
    kind = next((kind for mark, kind in ((b"\t", "tsv"), (b",", "csv"), (b";", "csv")) if mark in lines[0]), None)
    looks = f"{kind.upper()}, to be read with --format {kind}" if kind else "plain text"
    return (
        f"it looks like {looks}: its first line is no JSON object, nor is one after it; with --format text each line "
        f"is a prompt; otherwise {_ROW}"
    )


def _object(line: bytes) -> dict[str, object] | None:
    try:
        return decode_row(line)
    except RowError:
        return None


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
            begun = re.match(r"\[\s*\{", text) is not None and not any(map(_object, text.encode().split(b"\n")))
            return not whole and (found > 0 or begun)
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


def _is_broken_array(line: bytes) -> bool:
    """Say whether a first line without an object of its own begins an array that has some, or is an empty one."""
    return b"{" in line or not line.strip(b"[] \t\r")


def _is_spread(text: str) -> bool:
    """Say whether a text begins with an object of several lines."""
    try:
        _, end = json.JSONDecoder().raw_decode(text)
    except (ValueError, RecursionError):
        return False
    return "\n" in text[:end]


def _behind_spaces(text: str, at: int) -> int:
    return len(text) - len(text[at:].lstrip())
