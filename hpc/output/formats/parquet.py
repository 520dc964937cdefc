"""Parquet: a row a row, nested where the output is, beside the columns of a corpus that is a table."""

import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from hpc.corpus.formats.table import plain_column
from hpc.exit import Refusal
from hpc.output.facts import Facts
from hpc.output.formats.carried import Carried, arrow_columns
from hpc.output.formats.columns import META, IdType, renamed
from hpc.output.row import OutputRow
from hpc.request import RowId

GROUP_ROWS, GROUP_BYTES = 1 << 16, 128 << 20
"""A row group has so many rows, or is so long in memory: groups that are smaller are read slowly."""
_PIECE_ROWS = 1 << 12
"""Rows that are held as objects, before they are Arrow's."""


class Parquet:
    """A table with a column for each field of a row."""

    unit = "row"
    has_missing = False

    def __init__(self, facts: Facts) -> None:
        """Look at the columns of the corpus; raise `Refusal` where pyarrow is not installed."""
        try:
            import pyarrow
        except ImportError:
            raise Refusal(
                'an output in Parquet needs a package that is not installed: pip install "scattergen[parquet]"'
            ) from None
        self._facts, self._pa = facts, pyarrow
        self._columns = arrow_columns(facts)
        self._names = None if self._columns is None else renamed(self._columns.names)
        self._ids = IdType.of(facts)
        self.own = pyarrow.schema(self._own_fields())
        """The columns that are not the corpus'."""
        self._carried: Carried | None = None

    def write(self, path: Path, rows: Iterable[OutputRow]) -> None:
        """Write rows in groups."""
        from pyarrow import parquet

        pa, fields = self._pa, list(self.own)
        if self._columns is not None and self._names is not None:
            fields[1:1] = [self._columns.field(name).with_name(new) for name, new in self._names.items()]
        schema = pa.schema([field.with_nullable(True) for field in fields])
        with parquet.ParquetWriter(path, schema) as writer:
            pieces: list[Any] = []
            for piece in self._pieces(rows, schema):
                pieces.append(piece)
                full = sum(each.num_rows for each in pieces) >= GROUP_ROWS
                if full or sum(each.nbytes for each in pieces) >= GROUP_BYTES:
                    writer.write_table(pa.Table.from_batches(pieces, schema), row_group_size=GROUP_ROWS)
                    pieces = []
            if pieces:
                writer.write_table(pa.Table.from_batches(pieces, schema), row_group_size=GROUP_ROWS)

    def read(self, path: Path) -> Iterator[dict[str, Any]]:
        """Yield the rows as JSON has them."""
        from pyarrow import parquet

        with parquet.ParquetFile(path, buffer_size=1 << 20, pre_buffer=False) as file:
            for batch in file.iter_batches(_PIECE_ROWS, use_threads=False):
                columns = [plain_column(column) for column in batch.columns]
                for fields in zip(*columns, strict=True):
                    yield dict(zip(batch.schema.names, fields, strict=True))

    def entry(self, row: OutputRow) -> dict[str, Any]:
        """Return the row as JSON has it."""
        stored = self._stored(row)
        entry = {}
        for field in self.own:
            kept = stored[field.name]
            entry[field.name] = kept if kept is None else self._pa.array([kept], field.type).to_pylist()[0]
        for name, new in (self._names or {}).items():
            entry[new] = (row.source or {}).get(name)
        return entry

    def value(self, entry: dict[str, Any]) -> dict[str, Any]:
        """Return the row."""
        return entry

    def name_of(self, identity: RowId | None, error: dict[str, str] | None) -> str:
        """Return the id as its column has it, or the message of the error of a row without."""
        return json.dumps([error["message"]] if identity is None and error is not None else self._ids.stored(identity))

    def name(self, value: dict[str, Any] | None) -> str:
        """Return the name that a row says."""
        return self.name_of((value or {}).get("id"), (value or {}).get("error"))

    def without_meta(self, entry: dict[str, Any]) -> dict[str, Any]:
        """Return a row without the columns of the corpus."""
        return {name: entry.get(name) for name in self.own.names if name != META}

    def _pieces(self, rows: Iterable[OutputRow], schema: Any) -> Iterator[Any]:
        """Yield the rows as record batches."""
        held: list[dict[str, Any]] = []
        indices: list[int] = []

        def piece() -> Any:
            own = {field.name: self._pa.array([row[field.name] for row in held], field.type) for field in self.own}
            if self._columns is not None and self._names is not None:
                if self._carried is None or self._carried.at > indices[0]:  # else a file goes on behind the one before
                    self._carried = Carried(self._facts, self._columns, self._names)
                own.update(self._carried.take(indices))
            arrays = [own[name] for name in schema.names]
            held.clear()
            indices.clear()
            return self._pa.record_batch(arrays, schema=schema)

        for row in rows:
            held.append(self._stored(row))
            indices.append(row.row)
            if len(held) >= _PIECE_ROWS:
                yield piece()
        if held:
            yield piece()

    def _stored(self, row: OutputRow) -> dict[str, Any]:
        """Return the values of a row's own columns."""
        value = row.value
        value["id"] = self._ids.stored(row.id)
        value["text"] = _clean(value["text"])
        if value["error"] is not None:
            value["error"] = {key: _clean(text) for key, text in value["error"].items()}
        if self._names is None:
            value[META] = _as_json(row.meta) if row.meta else None
        for sample in (value, *value.get("samples", ())):
            if tops := (sample.get("logprobs") or {}).get("top_logprobs"):
                named = [[{"token_id": token, "logprob": logprob} for token, logprob in top] for top in tops]
                sample["logprobs"] = {**sample["logprobs"], "top_logprobs": named}
        return {field.name: value.get(field.name) for field in self.own}

    def _own_fields(self) -> list[Any]:
        pa, facts = self._pa, self._facts
        text, number, token = pa.string(), pa.int64(), pa.int32()
        top = pa.list_(pa.list_(pa.struct({"token_id": token, "logprob": pa.float64()})))
        logprobs = pa.struct(
            {"token_ids": pa.list_(token), "token_logprobs": pa.list_(pa.float64()), "top_logprobs": top}
        )
        token_ids = [pa.field("token_ids", pa.list_(token))] * facts.return_token_ids
        with_logprobs = [pa.field("logprobs", logprobs)] * facts.logprobs
        sample = [pa.field("text", text), pa.field("finish_reason", text)]
        sample += [pa.field("usage", pa.struct({"completion_tokens": number})), *token_ids, *with_logprobs]
        return [
            pa.field("id", self._ids.arrow(None if self._columns is None else self._columns)),
            pa.field("text", text),
            pa.field("finish_reason", text),
            pa.field("usage", pa.struct({"prompt_tokens": number, "completion_tokens": number})),
            pa.field("error", pa.struct({"kind": text, "message": text})),
            *token_ids,
            *with_logprobs,
            *[pa.field("samples", pa.list_(pa.struct(sample)))] * facts.several,
            *[pa.field(META, text)] * (self._columns is None),
        ]


def _clean(text: str | None) -> str | None:
    """Return a text without halves of surrogate pairs, which UTF-8 does not have."""
    return text if text is None or text.isascii() else text.encode("utf-8", "replace").decode()


def _as_json(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False)
    try:
        text.encode()
    except UnicodeEncodeError:
        return json.dumps(value)
    return text
