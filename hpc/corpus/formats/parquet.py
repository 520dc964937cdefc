"""Parquet: row groups are read as a stream of a few MB, whatever their size, and of the columns that are asked for."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from hpc.corpus.formats.table import Group, OpenTable, Table

_BUFFER_BYTES = 1 << 20
"""Of a column, so many are read at once: without a bound pyarrow holds all of a row group."""


class Parquet(Table):
    """A Parquet file."""

    def open(self, path: Path) -> OpenTable:
        """Open a file by its footer."""
        return _OpenParquet(path)


class _OpenParquet:
    def __init__(self, path: Path) -> None:
        from pyarrow import parquet

        self._file = parquet.ParquetFile(path, buffer_size=_BUFFER_BYTES, pre_buffer=False)
        self.schema = self._file.schema_arrow

    def groups(self) -> Iterator[Group]:
        """Yield the row groups."""
        metadata = self._file.metadata
        for number in range(metadata.num_row_groups):
            group = metadata.row_group(number)
            columns = [group.column(index) for index in range(group.num_columns)]
            end = max((_begin(column) + column.total_compressed_size for column in columns), default=0)
            yield Group(group.num_rows, sum(column.total_uncompressed_size for column in columns), end)

    def read(self, group: int, columns: list[str] | None, num_rows: int) -> Iterator[Any]:
        """Yield the rows of a row group."""
        yield from self._file.iter_batches(num_rows, row_groups=[group], columns=columns, use_threads=False)


def _begin(column: Any) -> int:
    begin: int = column.data_page_offset
    return begin if column.dictionary_page_offset is None else min(begin, column.dictionary_page_offset)
