"""CSV and TSV: the first record names the columns, and every field is text.

Rank 0 finds the records, since a line break may stand within quotes; whoever gets a block reads them once more. The
data of a block are delimiter and names, as JSON on a line, and the records as they stand in the file.
"""

import csv
import io
import itertools
import json
import re
import sys
from collections.abc import Iterator
from typing import Protocol

from hpc.corpus.decode import short
from hpc.corpus.errors import CorpusError, RowError
from hpc.corpus.formats.block import Block, CorpusFile, Digest, Piece, Row, Wanted
from hpc.corpus.formats.stream import BOM, TextStream


class Delimited:
    """A record is a row."""

    in_lines = True

    def __init__(self, delimiters: str) -> None:
        """Take the possible delimiters; a file has the one that is most frequent in its header, else the first."""
        self._delimiters = delimiters

    def blocks(self, file: CorpusFile, block_bytes: int, digest: Digest) -> Iterator[Piece]:
        """Yield pieces of whole records; raise `CorpusError` for a bad header, or a quote that is never closed."""
        with TextStream(file.path, file.name) as stream:
            lines = _Lines(stream, block_bytes, digest)
            delimiter, reader = self._begin(lines)
            head = json.dumps([delimiter, _header(file, reader)]) + "\n"
            lines.take()
            first, num_rows = reader.line_num + 1, 0
            while (record := _next(file, reader)) is not None:
                num_rows += bool(record)  # a blank line is no row
                if lines.size >= block_bytes:
                    yield Piece(first, num_rows, (head + lines.take()).encode("utf-8", "surrogateescape"))
                    first, num_rows = reader.line_num + 1, 0
            if num_rows:
                yield Piece(first, num_rows, (head + lines.take()).encode("utf-8", "surrogateescape"))

    def rows(self, block: Block, wanted: Wanted = None) -> Iterator[Row]:  # noqa: ARG002  (it costs nothing)
        """Yield the fields of each record by their names, or what is wrong with it."""
        head, _, data = block.data.partition(b"\n")
        delimiter, names = json.loads(head)
        text = data.decode("utf-8", "surrogateescape")
        reader = _reader(io.StringIO(text, newline="\n"), delimiter)
        row, end = block.first_row, block.first_row + block.num_rows
        while row < end:
            place, record = block.place(block.first + reader.line_num), _next(None, reader)
            if record is None:
                return
            if record:
                yield row, place, _value(names, record)
                row += 1

    def columns(self, file: CorpusFile) -> list[str]:
        """Return the names of the columns."""
        with TextStream(file.path, file.name) as stream:
            return _header(file, self._begin(_Lines(stream, 1 << 16))[1])

    def _begin(self, lines: "_Lines") -> "tuple[str, _Reader]":
        """Return the delimiter, on which the first line decides, and what makes records of lines."""
        header = next(lines, "")
        delimiter = max(self._delimiters, key=re.sub(r'"[^"]*"', "", header).count)
        return delimiter, _reader(itertools.chain([header], lines), delimiter)


class _Reader(Protocol):
    """A reader of the csv module."""

    @property
    def line_num(self) -> int:
        """How many lines it has read."""

    def __next__(self) -> list[str]:
        """Return the fields of the next record."""


def _reader(lines: Iterator[str], delimiter: str) -> _Reader:
    csv.field_size_limit(sys.maxsize)  # a prompt may be long; Python's own bound is 128 KiB
    return csv.reader(lines, delimiter=delimiter, strict=True)


class _Lines:
    """Iterate over lines with their line breaks, and keep them. Bytes that are not UTF-8 become lone surrogates."""

    def __init__(self, stream: TextStream, block_bytes: int, digest: Digest | None = None) -> None:
        self._lines = self._read(stream, block_bytes, digest)
        self._held: list[str] = []
        self.size = 0
        """Characters that `take` would return."""

    def __iter__(self) -> "_Lines":
        return self

    def __next__(self) -> str:
        line = next(self._lines)
        self._held.append(line)
        self.size += len(line)
        return line

    def take(self) -> str:
        """Return the lines that have been read since this was called last."""
        text = "".join(self._held)
        self._held, self.size = [], 0
        return text

    @staticmethod
    def _read(stream: TextStream, block_bytes: int, digest: Digest | None) -> Iterator[str]:
        mark = BOM
        while data := stream.read(block_bytes):
            data += stream.readline()
            if digest is not None:
                digest.update(data)
            text, mark = data.removeprefix(mark).decode("utf-8", "surrogateescape"), b""
            yield from io.StringIO(text, newline="\n")


def _header(file: CorpusFile, reader: _Reader) -> list[str]:
    names = _next(file, reader)
    if isinstance(names, str):
        raise CorpusError(f"{file.name}:1: the header cannot be read ({names}); it must name the columns")
    twice = sorted({name for name in names or [] if (names or []).count(name) > 1})
    if twice:
        raise CorpusError(f"{file.name}:1: the header names the column {short(twice[0])} twice; names must differ")
    return names or []


def _next(file: CorpusFile | None, reader: _Reader) -> list[str] | str | None:
    """Return the fields of the next record, or what is wrong with it; None at the end."""
    before = reader.line_num
    try:
        return next(reader)
    except StopIteration:
        return None
    except csv.Error as error:
        if file is not None and str(error) == "unexpected end of data":
            raise CorpusError(
                f"{file.name}:{before + 1}: a quote that is opened in this record is never closed, so that all behind "
                'it would be one field; close it, or double a quote that is a part of the text ("")'
            ) from None
        return f"the record cannot be read ({error}); put quotes around the field, and double those within it"


def _value(names: list[str], record: list[str] | str) -> dict[str, str] | RowError:
    """Return the fields of a record by their names, or what is wrong with it."""
    if isinstance(record, str):
        return RowError("csv", record)
    if len(record) != len(names):
        return RowError(
            "csv", f"the record has {len(record)} fields and the header {len(names)}; quote what holds the delimiter"
        )
    value = dict(zip(names, record, strict=True))
    bad = next((name for name, text in value.items() if not (text.isascii() or _is_unicode(text))), None)
    if bad is not None:
        return RowError("csv", f"the field {short(bad)} has bytes that are not UTF-8; convert it: iconv -f CP1252")
    return value


def _is_unicode(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True
