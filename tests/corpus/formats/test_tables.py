"""Parquet and Arrow: read by whoever has the block, the columns that are asked for, whatever the order of blocks."""

import datetime
import decimal
import random
import sys
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from hpc.corpus.errors import CorpusError
from hpc.corpus.find import find_format
from hpc.corpus.formats import Block, rows
from hpc.corpus.formats.parquet import Parquet
from tests.corpus.formats.written import FORMATS, arrow_stream, blocks_of, parquet, values_of, write

TABLES = ("c.parquet", "groups.parquet", "pages.parquet", "c.arrow", "c.feather")
ROWS = [{"id": index, "prompt": f"prompt {index}", "note": "x" * 50} for index in range(300)]


def table_file(folder: Path, table: pa.Table) -> Path:
    pq.write_table(table, folder / "c.parquet")
    return folder / "c.parquet"


@pytest.mark.parametrize("name", TABLES)
def test_blocks_are_read_in_any_order(tmp_path: Path, name: str) -> None:
    blocks = list(blocks_of(write(tmp_path / name, FORMATS[name](ROWS)), block_bytes=1000))
    assert len(blocks) > 4
    random.Random(1).shuffle(blocks)
    found = {row: value for block in blocks for row, _, value in rows(block)}
    assert [found[row] for row in range(300)] == ROWS


@pytest.mark.parametrize("name", TABLES)
def test_only_the_columns_that_are_asked_for_are_read(tmp_path: Path, name: str) -> None:
    path = write(tmp_path / name, FORMATS[name](ROWS[:5]))
    assert values_of(path, columns=("prompt", "messages", "id")) == [
        {"id": row["id"], "prompt": row["prompt"]} for row in ROWS[:5]
    ]


def test_without_any_of_the_columns_there_are_still_rows(tmp_path: Path) -> None:
    assert values_of(write(tmp_path / "c.parquet", parquet(ROWS[:3])), columns=("messages",)) == [{}, {}, {}]


def test_a_block_is_the_place_of_its_rows_and_not_their_text(tmp_path: Path) -> None:
    path = write(tmp_path / "c.parquet", parquet([{"prompt": "x" * 100_000}] * 20))
    assert sum(len(block.data) for block in blocks_of(path)) < 1000


def test_record_batches_have_the_columns_with_their_types(tmp_path: Path) -> None:
    table = pa.table({"a": pa.array([1, 2], pa.int8()), "when": pa.array([0, 1], pa.timestamp("ns", "UTC"))})
    [block] = blocks_of(table_file(tmp_path, table))
    assert Parquet().batch(block).schema.equals(table.schema)


MOMENT = datetime.datetime(2026, 11, 29, 2, 30, tzinfo=datetime.timezone.utc)


@pytest.mark.parametrize(
    ("values", "kind", "expected"),
    [
        ([1.5, float("nan"), float("inf")], pa.float64(), [1.5, None, None]),
        ([float("nan")], pa.float32(), [None]),
        ([1], pa.timestamp("ns"), ["1970-01-01 00:00:00.000000001"]),
        ([MOMENT], pa.timestamp("us", "UTC"), ["2026-11-29 02:30:00.000000Z"]),
        ([MOMENT.date()], pa.date32(), ["2026-11-29"]),
        ([decimal.Decimal("1.10")], pa.decimal128(5, 2), ["1.10"]),
        ([b"\0\xff"], pa.binary(), ["AP8="]),
        ([[1.0, float("nan")]], pa.list_(pa.float64()), [[1.0, None]]),
        (
            [{"a": {"when": MOMENT.date()}}],
            pa.struct({"a": pa.struct({"when": pa.date32()})}),
            [{"a": {"when": "2026-11-29"}}],
        ),
        ([[("k", 1)]], pa.map_(pa.string(), pa.int32()), [[["k", 1]]]),
        (["a", None, "a"], pa.dictionary(pa.int32(), pa.string()), ["a", None, "a"]),
        (["a"], pa.large_string(), ["a"]),
        ([None], pa.null(), [None]),
    ],
)
def test_values_that_json_has_not_are_given_as_it_has_them(
    tmp_path: Path, values: list[Any], kind: pa.DataType, expected: list[Any]
) -> None:
    path = table_file(tmp_path, pa.table({"x": pa.array(values, kind)}))
    assert [row["x"] for row in values_of(path)] == expected


def test_a_parquet_file_that_is_cut_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CorpusError, match=r'c\.parquet" cannot be read .*; it is cut'):
        find_format(write(tmp_path / "c.parquet", parquet(ROWS)[:-20]))


@pytest.mark.parametrize("kept", [0.5, -8, -9, 60])
def test_an_arrow_stream_that_is_cut_is_refused(tmp_path: Path, kept: float) -> None:
    data = arrow_stream(ROWS)
    path = write(tmp_path / "c.arrow", data[: int(len(data) * kept) if 0 < kept < 1 else int(kept)])
    with pytest.raises(CorpusError, match=r'c\.arrow" cannot be read .*; it is cut'):
        list(blocks_of(path))


def test_an_arrow_stream_that_is_damaged_in_the_middle_is_refused(tmp_path: Path) -> None:
    data = bytearray(arrow_stream(ROWS))
    at = data.index(b"\xff\xff\xff\xff", len(data) // 2)
    data[at : at + 8] = b"\xff\xff\xff\xff\x40\0\0\0"
    with pytest.raises(CorpusError, match="cannot be read"):
        list(blocks_of(write(tmp_path / "c.arrow", bytes(data))))


def test_rows_of_a_damaged_row_group_are_error_rows_and_no_others(tmp_path: Path) -> None:
    path = write(tmp_path / "c.parquet", parquet(ROWS, row_group_size=100, compression="snappy", use_dictionary=False))
    column = pq.ParquetFile(path).metadata.row_group(1).column(1)
    data = bytearray(path.read_bytes())
    begin = column.data_page_offset + 40
    data[begin : begin + 200] = b"\xff" * 200
    path.write_bytes(data)
    values = values_of(path)
    assert values[:100] + values[200:] == ROWS[:100] + ROWS[200:]
    assert {kind for kind, _ in values[100:200]} == {"unreadable"}
    assert "group 1 of the file cannot be read" in values[100][1]


def test_a_table_with_two_columns_of_one_name_is_refused(tmp_path: Path) -> None:
    schema = pa.schema([("prompt", pa.string()), ("prompt", pa.string())])
    path = table_file(tmp_path, pa.table([pa.array(["a"]), pa.array(["b"])], schema=schema))
    with pytest.raises(CorpusError, match='two columns "prompt"'):
        find_format(path)


def test_what_is_no_table_is_refused_where_it_is_called_one(tmp_path: Path) -> None:
    with pytest.raises(CorpusError, match="cannot be read"):
        find_format(write(tmp_path / "c.jsonl", b'{"prompt": "a"}\n'), "parquet")


def test_a_file_that_has_been_written_again_is_read_again(tmp_path: Path) -> None:
    path = tmp_path / "c.parquet"
    for text in ("one", "other"):
        write(path, parquet([{"prompt": text}]))
        assert values_of(path) == [{"prompt": text}]


def test_parquet_without_its_package_is_refused_with_what_to_install(tmp_path: Path) -> None:
    path = write(tmp_path / "c.parquet", parquet(ROWS[:1]))
    kept = {name: module for name, module in sys.modules.items() if name.split(".")[0] == "pyarrow"}
    sys.modules.update(dict.fromkeys(kept))  # type: ignore[arg-type]  # None: it cannot be imported
    try:
        with pytest.raises(CorpusError, match=r'not installed: pip install "scattergen\[parquet\]"'):
            find_format(path)
    finally:
        sys.modules.update(kept)


def test_a_row_group_of_any_size_is_read_in_bounded_memory(tmp_path: Path) -> None:
    path = write(
        tmp_path / "c.parquet", parquet([{"prompt": "x" * 1000 + str(i)} for i in range(20_000)], compression="none")
    )
    blocks: list[Block] = list(blocks_of(path))
    before = pa.total_allocated_bytes()
    peak = 0
    for block in blocks:
        for _ in rows(block):
            pass
        peak = max(peak, pa.total_allocated_bytes() - before)
    assert path.stat().st_size > 20_000_000
    assert peak < 8_000_000
