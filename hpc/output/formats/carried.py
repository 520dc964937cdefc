"""The columns of a corpus that is a table, with their types, for an output that is one too."""

from collections.abc import Iterator, Mapping
from typing import Any

from hpc.corpus.errors import RowError
from hpc.corpus.files import Blocks
from hpc.corpus.formats import FORMATS, Block
from hpc.corpus.formats.table import Table
from hpc.output.facts import Facts
from hpc.output.formats.columns import input_columns


def arrow_columns(facts: Facts) -> Any:
    """Return a pyarrow.Schema of the columns over all files of a corpus.

    None if one of the files is no table, or one has a column of another type.
    """
    import pyarrow as pa

    if not facts.inputs or input_columns(facts) is None:
        return None
    schemas = []
    for file in facts.inputs:
        reader = FORMATS[file.format]
        if isinstance(reader, Table):
            schemas.append(reader.open(file.path).schema.remove_metadata())
        else:
            schemas.append(pa.schema([(name, pa.string()) for name in reader.columns(file) or ()]))
    try:
        return pa.unify_schemas(schemas)
    except (pa.ArrowException, TypeError):
        return None


class Carried:
    """Reads the columns of a corpus once through, for rows in their order."""

    def __init__(self, facts: Facts, schema: Any, names: Mapping[str, str]) -> None:
        """Take the schema of the corpus, and what its columns are called in the output."""
        self.at = 0
        """Index of the first row that can be taken."""
        self._names = names
        self._batches = _batches(facts, schema, names)
        self._begin, self._batch = 0, None

    def take(self, rows: list[int]) -> dict[str, Any]:
        """Return the columns of rows, which are behind all that were taken before."""
        import pyarrow as pa

        parts, at = list[Any](), 0
        self.at = rows[-1] + 1
        while at < len(rows):
            while self._batch is None or rows[at] >= self._begin + self._batch.num_rows:
                self._begin, self._batch = next(self._batches)
            end, begin = self._begin + self._batch.num_rows, at
            while at < len(rows) and rows[at] < end:
                at += 1
            found = [row - self._begin for row in rows[begin:at]]
            whole = found[-1] - found[0] + 1 == len(found)
            parts.append(self._batch.slice(found[0], len(found)) if whole else self._batch.take(pa.array(found)))
        table = pa.Table.from_batches(parts).combine_chunks()
        return {new: _one(table.column(name)) for name, new in self._names.items()}


def _batches(facts: Facts, schema: Any, names: Mapping[str, str]) -> Iterator[tuple[int, Any]]:
    """Yield record batches of one schema, and the index of the first row of each."""
    import pyarrow as pa

    wanted = pa.schema([schema.field(name) for name in names])
    # Of their own, since the rows are read at the same time and a reader remembers where it is.
    readers = {name: type(reader)() for name, reader in FORMATS.items() if isinstance(reader, Table)}
    for block in Blocks(facts.inputs, limit=facts.limit):
        arrays = _arrays(block, readers, wanted)
        yield block.first_row, pa.record_batch(arrays, schema=wanted)


def _arrays(block: Block, readers: Mapping[str, Table], wanted: Any) -> list[Any]:
    import pyarrow as pa

    if block.format in readers:
        try:
            batch = readers[block.format].batch(block)
        except (pa.ArrowException, OSError):  # its rows are error rows
            return [pa.nulls(block.num_rows, field.type) for field in wanted]
        found = dict(zip(batch.schema.names, batch.columns, strict=True))
        return [
            found[field.name].cast(field.type) if field.name in found else pa.nulls(block.num_rows, field.type)
            for field in wanted
        ]
    values = [{} if isinstance(value, RowError) else value for _, _, value in FORMATS[block.format].rows(block)]
    return [pa.array([value.get(field.name) for value in values], field.type) for field in wanted]


def _one(column: Any) -> Any:
    """Return a column of one chunk at most as an array."""
    import pyarrow as pa

    return column.chunk(0) if column.num_chunks else pa.array([], column.type)
