"""Tables: files of record batches, which each rank reads itself. A block says where its rows stand, in 100 bytes.

A file is a sequence of groups (row groups of Parquet, record batches of Arrow), a block is a part of one. Whoever reads
goes forwards through a group and remembers where it is, so that a group of any size is decoded once, a piece at a time.
"""

import base64
import contextlib
import datetime
import decimal
import json
import math
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple, Protocol

from hpc.corpus.errors import CorpusError, RowError
from hpc.corpus.formats.block import Block, Columns, CorpusFile, Digest, Piece, Row

_MIN_ROWS, _MAX_ROWS = 16, 4096
"""Rows of a block: several where they are long, since each costs a message; and not too many where columns are packed,
and their text is much longer than it says."""

_HASH_BYTES = 1 << 20


class Group(NamedTuple):
    """What is read from its beginning to its end."""

    num_rows: int
    num_bytes: int
    """Of its rows, unpacked."""
    end: int
    """Where it ends in the file."""


class OpenTable(Protocol):
    """An open file of a table format."""

    schema: Any
    """A pyarrow.Schema."""

    def groups(self) -> Iterator[Group]:
        """Yield the groups of the file."""

    def read(self, group: int, columns: list[str] | None, num_rows: int) -> Iterator[Any]:
        """Yield the rows of a group, not more than so many in each pyarrow.RecordBatch."""


class Table:
    """What the formats of tables have in common."""

    in_lines = False

    def __init__(self) -> None:
        self._reading: _Reading | None = None

    def open(self, path: Path) -> OpenTable:
        """Open a file; raise what pyarrow raises where it is not of this format."""
        raise NotImplementedError

    def blocks(self, file: CorpusFile, block_bytes: int, digest: Digest) -> Iterator[Piece]:
        """Yield where the pieces of each group are."""
        first = 1
        with open(file.path, "rb") as hashed:
            for number, group in enumerate(self._groups(file)):
                step = block_bytes * group.num_rows // max(1, group.num_bytes)
                step = min(max(step, _MIN_ROWS), _MAX_ROWS)
                begin = hashed.tell()
                for at in range(0, group.num_rows, step):
                    num_rows = min(step, group.num_rows - at)
                    _hash(hashed, begin + (group.end - begin) * (at + num_rows) // group.num_rows, digest)
                    part = {"path": str(file.path), "group": number, "at": at, "rows": num_rows}
                    yield Piece(first, num_rows, json.dumps(part).encode())
                    first += num_rows
            _hash(hashed, os.fstat(hashed.fileno()).st_size, digest)

    def rows(self, block: Block, columns: Columns = None) -> Iterator[Row]:
        """Yield the rows of a block, or for each the reason why its group cannot be read."""
        import pyarrow

        try:
            batch = self.batch(block, columns)
            values = [plain_column(column) for column in batch.columns]
        except (pyarrow.ArrowException, OSError) as error:
            if isinstance(error, OSError) and error.errno is not None:  # of the file system, and not of the file
                raise
            group = json.loads(block.data)["group"]
            broken = RowError("unreadable", f"group {group} of the file cannot be read ({error}); write the file again")
            for index in range(block.num_rows):
                yield block.first_row + index, block.place(block.first + index), broken
            return
        names = batch.schema.names
        for index, fields in enumerate(zip(*values, strict=True) if values else [()] * batch.num_rows):
            yield block.first_row + index, block.place(block.first + index), dict(zip(names, fields, strict=True))

    def batch(self, block: Block, columns: Columns = None) -> Any:
        """Return the rows of a block as they are in the file, a pyarrow.RecordBatch of all columns or of some."""
        part = json.loads(block.data)
        path, group = Path(part["path"]), part["group"]
        stat = path.stat()
        version = (path, stat.st_ino, stat.st_size, stat.st_mtime_ns)
        wanted = None if columns is None else frozenset(columns)
        reading = self._reading
        if reading is None or reading.version != version:
            reading = _Reading(version, self.open(path))
        elif (reading.group, reading.columns) != (group, wanted) or reading.at > part["at"]:
            reading = _Reading(version, reading.table)
        self._reading = reading
        if reading.batches is None:
            names = None if wanted is None else [name for name in reading.table.schema.names if name in wanted]
            reading.begin(group, wanted, reading.table.read(group, names, part["rows"]))
        return reading.take(part["at"], block.num_rows)

    def columns(self, file: CorpusFile) -> list[str] | None:
        """Return the names of the columns."""
        names: list[str] = self._open(file).schema.names
        return names

    def _groups(self, file: CorpusFile) -> Iterator[Group]:
        with _telling(file.path):
            yield from self._open(file).groups()

    def _open(self, file: CorpusFile) -> OpenTable:
        with _telling(file.path):
            table = self.open(file.path)
        twice = sorted({name for name in table.schema.names if table.schema.names.count(name) > 1})
        if twice:
            raise CorpusError(f'corpus "{file.path}" has two columns "{twice[0]}"; names must differ')
        return table


@contextlib.contextmanager
def _telling(path: Path) -> Iterator[None]:
    """Raise `CorpusError` where pyarrow is not installed, or finds that it cannot read a file."""
    try:
        import pyarrow
    except ImportError:
        raise CorpusError(
            f'corpus "{path}" is Parquet or Arrow, and the package that reads it is not installed: '
            'pip install "scattergen[parquet]"'
        ) from None
    try:
        yield
    except (pyarrow.ArrowException, OSError) as error:
        raise CorpusError(
            f'corpus "{path}" cannot be read ({error}); it is cut, or not what its beginning says: get it again, or '
            "write it again"
        ) from error


class _Reading:
    """How far a group of a file has been read."""

    def __init__(self, version: Any, table: OpenTable) -> None:
        self.version, self.table = version, table
        self.group, self.columns = -1, frozenset[str]() or None
        self.batches: Iterator[Any] | None = None
        self.at = 0
        """The row of the group that comes next."""
        self._held: Any = None

    def begin(self, group: int, columns: frozenset[str] | None, batches: Iterator[Any]) -> None:
        """Begin to read a group."""
        self.group, self.columns, self.batches = group, columns, batches

    def take(self, begin: int, num_rows: int) -> Any:
        """Return rows of the group, as one record batch; those before them are passed over."""
        parts = []
        while num_rows:
            if self._held is None:
                assert self.batches is not None
                self._held = next(self.batches, None)
                if self._held is None:
                    raise OSError(f"the group ends behind {self.at} rows")
            skipped = min(max(0, begin - self.at), self._held.num_rows)
            part = self._held.slice(skipped, num_rows if self.at + skipped == begin else 0)
            rest = self._held.slice(skipped + part.num_rows)
            self.at += skipped + part.num_rows
            begin += part.num_rows
            num_rows -= part.num_rows
            self._held = rest if rest.num_rows else None
            if part.num_rows:
                parts.append(part)
        return _joined(parts)


def _joined(batches: list[Any]) -> Any:
    if len(batches) == 1:
        return batches[0]
    import pyarrow

    return pyarrow.Table.from_batches(batches).unify_dictionaries().combine_chunks().to_batches()[0]


def _hash(file: Any, end: int, digest: Digest) -> None:
    """Add the bytes of a file up to `end`."""
    while (left := end - file.tell()) > 0 and (data := file.read(min(left, _HASH_BYTES))):
        digest.update(data)


def plain_column(column: Any) -> list[Any]:
    """Return the values of a column as JSON has them."""
    import pyarrow as pa

    kind = column.type
    if pa.types.is_timestamp(kind) or pa.types.is_date(kind) or pa.types.is_time(kind):
        column = column.cast(pa.string())  # as Python's own, a timestamp of nanoseconds is refused
    values: list[Any] = column.to_pylist()
    return values if _is_plain(kind) else [_plain(value) for value in values]


def _is_plain(kind: Any) -> bool:
    """Say whether values of a type are JSON's, as Python has them."""
    import pyarrow as pa

    if pa.types.is_dictionary(kind):
        return _is_plain(kind.value_type)
    if pa.types.is_struct(kind):
        return all(_is_plain(kind.field(index).type) for index in range(kind.num_fields))
    if pa.types.is_list(kind) or pa.types.is_large_list(kind):
        return _is_plain(kind.value_type)
    plain = (pa.types.is_string, pa.types.is_large_string, pa.types.is_integer, pa.types.is_boolean, pa.types.is_null)
    return any(check(kind) for check in plain)


def _plain(value: Any) -> Any:
    """Return a value as JSON has it: no number that is none, dates and decimals as text, bytes as base64."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if value is None or isinstance(value, bool | int | str):
        return value
    if isinstance(value, dict):
        return {key: _plain(kept) for key, kept in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(kept) for kept in value]
    if isinstance(value, bytes):
        return base64.b64encode(value).decode()
    if isinstance(value, datetime.date | datetime.time):
        return value.isoformat()
    if isinstance(value, decimal.Decimal):
        return str(value)
    return str(value)
