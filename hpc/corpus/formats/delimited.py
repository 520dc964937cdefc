"""CSV and TSV: the first record names the columns, and every field is text.

Rank 0 finds the records, since a line break may stand within quotes, and sends them as JSON: an object, or a string
that says what is wrong. Behind a record of several lines come as many blank ones, so that line numbers are those of the
file.
"""

import csv
import io
import itertools
import json
import re
import sys
from collections.abc import Iterator
from typing import Any, Protocol

from hpc.corpus.decode import decode_row, short
from hpc.corpus.errors import CorpusError, RowError
from hpc.corpus.formats.block import Block, Columns, CorpusFile, Digest, Piece, Row
from hpc.corpus.formats.lines import rows_of_lines
from hpc.corpus.formats.stream import BOM, TextStream


class Delimited:
    """A record is a row."""

    in_lines = True

    def __init__(self, delimiters: str) -> None:
        """Take the delimiters that a file may have; that which its header has most of counts, else the first."""
        self._delimiters = delimiters

    def blocks(self, file: CorpusFile, block_bytes: int, digest: Digest) -> Iterator[Piece]:
        """Yield pieces of JSON lines; raise `CorpusError` for a header that names a column twice, or an open quote."""
        with TextStream(file.path, file.name) as stream:
            reader = self._reader(_lines(stream, block_bytes, digest))
            names = _header(file, reader)
            number = first = reader.line_num + 1
            records, num_rows, size = list[bytes](), 0, 0
            while (record := _next(file, reader, number)) is not None:
                line = _as_json(names, record) if record else b""  # a blank line is no row
                records += [line] + [b""] * (reader.line_num - number)
                number, num_rows, size = reader.line_num + 1, num_rows + bool(record), size + len(line)
                if size >= block_bytes:
                    yield Piece(first, num_rows, b"\n".join(records))
                    first, records, num_rows, size = number, [], 0, 0
            if num_rows:
                yield Piece(first, num_rows, b"\n".join(records))

    def rows(self, block: Block, columns: Columns = None) -> Iterator[Row]:  # noqa: ARG002  (it costs nothing)
        """Yield the object of each record, or what is wrong with it."""
        return rows_of_lines(block, _decode)

    def columns(self, file: CorpusFile) -> list[str]:
        """Return the names of the columns."""
        with TextStream(file.path, file.name) as stream:
            return _header(file, self._reader(_lines(stream, 1 << 16)))

    def _reader(self, lines: Iterator[str]) -> "_Reader":
        """Return what makes records of lines; the first line decides on the delimiter."""
        csv.field_size_limit(sys.maxsize)  # a prompt may be long; Python's own bound is 128 KiB
        header = next(lines, "")
        delimiter = max(self._delimiters, key=re.sub(r'"[^"]*"', "", header).count)
        return csv.reader(itertools.chain([header], lines), delimiter=delimiter, strict=True)


class _Reader(Protocol):
    """A reader of the csv module."""

    @property
    def line_num(self) -> int:
        """How many lines it has read."""

    def __next__(self) -> list[str]:
        """Return the fields of the next record."""


def _lines(stream: TextStream, block_bytes: int, digest: Digest | None = None) -> Iterator[str]:
    """Yield lines with their line breaks; bytes that are not UTF-8 become halves of surrogate pairs."""
    mark = BOM
    while data := stream.read(block_bytes):
        data += stream.readline()
        if digest is not None:
            digest.update(data)
        text, mark = data.removeprefix(mark).decode("utf-8", "surrogateescape"), b""
        yield from io.StringIO(text, newline="\n")


def _header(file: CorpusFile, reader: _Reader) -> list[str]:
    names = _next(file, reader, 1)
    if isinstance(names, str):
        raise CorpusError(f"{file.name}:1: the header cannot be read ({names}); it must name the columns")
    twice = sorted({name for name in names or [] if (names or []).count(name) > 1})
    if twice:
        raise CorpusError(f"{file.name}:1: the header names the column {short(twice[0])} twice; names must differ")
    return names or []


def _next(file: CorpusFile, reader: _Reader, number: int) -> list[str] | str | None:
    """Return the fields of the next record, or what is wrong with it; None at the end."""
    try:
        return next(reader)
    except StopIteration:
        return None
    except csv.Error as error:
        if str(error) == "unexpected end of data":
            raise CorpusError(
                f"{file.name}:{number}: a quote that is opened in this record is never closed, so that all behind it "
                'would be one field; close it, or double a quote that is a part of the text ("")'
            ) from None
        return f"the record cannot be read ({error}); put quotes around the field, and double those within it"


def _as_json(names: list[str], record: list[str] | str) -> bytes:
    if isinstance(record, str):
        return json.dumps(record).encode()
    if len(record) != len(names):
        reason = f"the record has {len(record)} fields and the header {len(names)}; quote what holds the delimiter"
        return json.dumps(reason).encode()
    try:
        return json.dumps(dict(zip(names, record, strict=True)), ensure_ascii=False).encode()
    except UnicodeEncodeError:
        name = next(name for name, text in zip(names, record, strict=True) if not _is_unicode(text))
        reason = f"the field {short(name)} has bytes that are not UTF-8; convert the file: iconv -f CP1252 -t UTF-8"
        return json.dumps(reason).encode()


def _is_unicode(text: str) -> bool:
    return not any("\ud800" <= character <= "\udfff" for character in text)


def _decode(line: bytes) -> dict[str, Any]:
    if line.startswith(b'"'):
        raise RowError("csv", json.loads(line))
    return decode_row(line)
