"""Arrow IPC, mapped into memory: streams, as `datasets` saves them, and files (Feather)."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from hpc.corpus.formats.table import Group, OpenTable, Table

FILE_MAGIC = b"ARROW1"
_END = b"\xff\xff\xff\xff\0\0\0\0"
"""The last bytes of a stream; pyarrow takes one that is cut between two batches for whole."""


class Arrow(Table):
    """An Arrow file; its groups are its record batches."""

    def open(self, path: Path) -> OpenTable:
        """Open a file by its schema; raise `OSError` for a stream that has no end."""
        with open(path, "rb") as file:
            if file.read(len(FILE_MAGIC)) == FILE_MAGIC:
                return _OpenFile(path)
            file.seek(-len(_END), 2)
            if file.read() != _END:
                raise OSError("the stream has no end mark")
        return _OpenStream(path)


class _OpenFile:
    def __init__(self, path: Path) -> None:
        import pyarrow

        self._path = path
        self._size = path.stat().st_size
        self._file = pyarrow.ipc.open_file(pyarrow.memory_map(str(path)))
        self.schema = self._file.schema

    def groups(self) -> Iterator[Group]:
        """Yield the record batches."""
        number = self._file.num_record_batches
        for index in range(number):
            batch = self._file.get_batch(index)
            yield Group(batch.num_rows, batch.nbytes, self._size * (index + 1) // number)

    def read(self, group: int, columns: list[str] | None, num_rows: int) -> Iterator[Any]:  # noqa: ARG002  (mapped)
        """Yield the rows of a record batch."""
        batch = self._file.get_batch(group)
        yield batch if columns is None else batch.select(columns)


class _OpenStream:
    def __init__(self, path: Path) -> None:
        self._path = path
        self._source, self._stream, self._next = self._begin()
        self.schema = self._stream.schema

    def groups(self) -> Iterator[Group]:
        """Yield the record batches, of which nothing but the heads is read."""
        source, stream, _ = self._begin()
        while (batch := _next(stream)) is not None:
            yield Group(batch.num_rows, batch.nbytes, source.tell())

    def read(self, group: int, columns: list[str] | None, num_rows: int) -> Iterator[Any]:  # noqa: ARG002  (mapped)
        """Yield the rows of a record batch; those before it are passed over."""
        if group < self._next:
            self._source, self._stream, self._next = self._begin()
        batch = None
        while self._next <= group:
            batch = _next(self._stream)
            self._next += 1
        if batch is not None:
            yield batch if columns is None else batch.select(columns)

    def _begin(self) -> tuple[Any, Any, int]:
        import pyarrow

        source = pyarrow.memory_map(str(self._path))
        return source, pyarrow.ipc.open_stream(source), 0


def _next(stream: Any) -> Any:
    try:
        return stream.read_next_batch()
    except StopIteration:
        return None
