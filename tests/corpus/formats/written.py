"""The same rows as a file of each format."""

import bz2
import csv
import gzip
import io
import json
import lzma
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from hpc.corpus.errors import RowError
from hpc.corpus.files import Blocks, name_files
from hpc.corpus.find import find_format
from hpc.corpus.formats import Block, rows

try:
    from compression import zstd
except ImportError:
    from backports import zstd

Rows = Sequence[dict[str, Any]]


def jsonl(values: Rows) -> bytes:
    return "".join(json.dumps(value, ensure_ascii=False) + "\n" for value in values).encode()


def delimited(values: Rows, delimiter: str = ",", terminator: str = "\r\n") -> bytes:
    file = io.StringIO(newline="")
    names = list(values[0]) if values else ["prompt"]
    writer = csv.DictWriter(file, names, delimiter=delimiter, lineterminator=terminator, quoting=csv.QUOTE_ALL)
    writer.writeheader()
    writer.writerows(values)
    return file.getvalue().encode()


def table(values: Rows) -> pa.Table:
    return pa.Table.from_pylist(list(values)) if values else pa.table({"prompt": pa.array([], pa.string())})


def parquet(values: Rows, **options: Any) -> bytes:
    file = io.BytesIO()
    pq.write_table(table(values), file, **options)
    return file.getvalue()


def arrow_stream(values: Rows, batch_rows: int = 3) -> bytes:
    file = io.BytesIO()
    made = table(values)
    with pa.ipc.new_stream(file, made.schema) as writer:
        writer.write_table(made, max_chunksize=batch_rows)
    return file.getvalue()


def arrow_file(values: Rows, batch_rows: int = 3) -> bytes:
    file = io.BytesIO()
    made = table(values)
    with pa.ipc.new_file(file, made.schema) as writer:
        writer.write_table(made, max_chunksize=batch_rows)
    return file.getvalue()


def data_set(folder: Path, values: Rows) -> Path:
    """Write a folder as `save_to_disk` of `datasets` does."""
    folder.mkdir(parents=True)
    half = len(values) // 2
    names = [f"data-{index:05}-of-00002.arrow" for index in range(2)]
    for name, part in zip(names, (values[:half], values[half:]), strict=True):
        (folder / name).write_bytes(arrow_stream(part) if part else arrow_stream(values)[:0] or empty(values))
    (folder / "state.json").write_text(json.dumps({"_data_files": [{"filename": name} for name in names]}))
    (folder / "dataset_info.json").write_text("{}")
    return folder


def empty(values: Rows) -> bytes:
    """Return an Arrow stream of the columns of some rows, without any."""
    file = io.BytesIO()
    with pa.ipc.new_stream(file, table(values).schema):
        pass
    return file.getvalue()


FORMATS: dict[str, Callable[[Rows], bytes]] = {
    "c.jsonl": jsonl,
    "bom.jsonl": lambda values: b"\xef\xbb\xbf" + jsonl(values),
    "c.jsonl.gz": lambda values: gzip.compress(jsonl(values)),
    "c.jsonl.bz2": lambda values: bz2.compress(jsonl(values)),
    "c.jsonl.zst": lambda values: zstd.compress(jsonl(values)),
    "c.jsonl.xz": lambda values: lzma.compress(jsonl(values)),
    "utf16.jsonl": lambda values: jsonl(values).decode().encode("utf-16"),
    "utf16.jsonl.gz": lambda values: gzip.compress(jsonl(values).decode().encode("utf-16")),
    "utf16le.jsonl": lambda values: jsonl(values).decode().encode("utf-16-le"),
    "utf16be.jsonl": lambda values: jsonl(values).decode().encode("utf-16-be"),
    "utf32.jsonl": lambda values: jsonl(values).decode().encode("utf-32"),
    "c.json": lambda values: json.dumps(list(values), ensure_ascii=False).encode(),
    "spread.json": lambda values: json.dumps(list(values), indent=1, ensure_ascii=False).encode(),
    "c.csv": delimited,
    "unix.csv": lambda values: delimited(values, terminator="\n"),
    "semicolon.csv": lambda values: delimited(values, ";"),
    "utf16.csv": lambda values: delimited(values).decode().encode("utf-16"),
    "c.csv.zst": lambda values: zstd.compress(delimited(values)),
    "c.tsv": lambda values: delimited(values, "\t"),
    "c.parquet": parquet,
    "groups.parquet": lambda values: parquet(values, row_group_size=2, compression="zstd"),
    "pages.parquet": lambda values: parquet(values, use_dictionary=False, data_page_size=8, data_page_version="2.0"),
    "c.arrow": arrow_stream,
    "c.feather": arrow_file,
}
"""What each file is called, and how rows are written to it."""


def write(path: Path, data: bytes) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)
    return path


def blocks_of(
    *paths: Path, block_bytes: int = 1 << 18, limit: int | None = None, asked: str = "auto"
) -> Iterator[Block]:
    """Yield the blocks of files, whose format is detected."""
    return iter(Blocks(name_files(paths, [find_format(path, asked) for path in paths]), block_bytes, limit))


def read(*paths: Path, columns: Any = None, **options: Any) -> list[tuple[int, str, Any]]:
    """Return index, place and value of each row; for a broken one the kind and the message."""
    return [
        (row, str(place), (value.kind, str(value)) if isinstance(value, RowError) else value)
        for block in blocks_of(*paths, **options)
        for row, place, value in rows(block, columns)
    ]


def values_of(*paths: Path, **options: Any) -> list[Any]:
    return [value for _, _, value in read(*paths, **options)]
