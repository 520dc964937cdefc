"""What goes into an output comes out of it, types too, from a corpus of any format."""

import csv
import json
import math
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hpc.output.formats import FORMATS, Format, packed
from hpc.output.row import OutputRow
from hpc.request import Sample
from tests.corpus.formats.written import FORMATS as WRITTEN
from tests.output.made import make_rows, usual, values
from tests.output.test_journal import LOGPROB

TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=8)
TOKEN = st.integers(0, 2**31 - 1)
LOGPROBS = st.tuples(LOGPROB, st.lists(st.tuples(TOKEN, LOGPROB), max_size=2).map(tuple))
TOKENS = st.lists(st.tuples(TOKEN, LOGPROBS), max_size=4)
SAMPLE = st.tuples(TOKENS, TEXT, st.sampled_from(["stop", "length"]), st.booleans()).map(
    lambda given: Sample(
        tuple(token for token, _ in given[0]), given[1], given[2],
        tuple(logprobs for _, logprobs in given[0]) if given[3] else None,
    )
)  # fmt: skip
ANSWER = st.lists(SAMPLE, min_size=1, max_size=3).map(tuple) | TEXT.map(lambda text: f"engine: {text}")
NUMBER = st.integers(-(2**40), 2**40) | st.floats(allow_nan=False, allow_infinity=False)
VALUE = st.none() | st.booleans() | NUMBER | TEXT
META = st.dictionaries(TEXT.filter(lambda name: name not in ("id", "prompt", "body", "url")), VALUE, max_size=3)


@st.composite
def corpora(draw: st.DrawFn) -> tuple[list[dict[str, Any]], list[Any]]:
    """Draw rows of a corpus of JSON, and an answer to each."""
    ids = draw(st.lists(st.integers(-(2**63), 2**63 - 1) | TEXT.filter(bool), min_size=1, max_size=5, unique_by=str))
    rows = [{**draw(META), "id": name, "prompt": draw(TEXT), "sampling": {"n": 3, "temperature": 1, "logprobs": 2}}
            for name in ids]  # fmt: skip
    return rows, [draw(ANSWER) for _ in rows]


def written(
    folder: Path, name: str, corpus: Path, complete: Callable[[int], Any], packing: str = "", **job: Any
) -> tuple[Format, Path, list[OutputRow]]:
    facts, rows = make_rows(folder, corpus, complete, job=job)
    output = FORMATS[name][2](facts, packing)
    path = folder / "out"
    output.write(path, [row for row in rows if row.answer is not None or output.has_missing])
    return output, path, rows


@settings(deadline=None, max_examples=25)
@given(corpora())
@pytest.mark.parametrize("name", FORMATS)
def test_the_entries_of_a_file_are_those_that_must_stand_there(
    tmp_path_factory: pytest.TempPathFactory, name: str, given_rows: tuple[list[dict[str, Any]], list[Any]]
) -> None:
    rows, answers = given_rows
    folder = tmp_path_factory.mktemp("out")
    corpus = folder / "c.jsonl"
    corpus.write_bytes(WRITTEN["c.jsonl"](rows))
    output, path, found = written(folder, name, corpus, answers.__getitem__, return_token_ids=True)
    assert [*output.read(path)] == [output.entry(row) for row in found]
    assert [output.name(output.value(entry)) for entry in output.read(path)] == [
        output.name_of(row.id, row.error) for row in found
    ]


def as_values(table: pa.Table) -> list[dict[str, Any]]:
    """Return the rows of a Parquet output in the shape that JSONL has."""
    found = []
    for row in table.to_pylist():
        value = {name: kept for name, kept in row.items() if kept is not None or name in ("id", "text", "error")}
        if "meta" in value:
            value["meta"] = json.loads(value["meta"])
        for sample in (value, *value.get("samples", ())):
            if sample.get("logprobs") is None:
                sample.pop("logprobs", None)
            elif (tops := sample["logprobs"]["top_logprobs"]) is None:
                del sample["logprobs"]["top_logprobs"]
            else:
                sample["logprobs"]["top_logprobs"] = [[(t["token_id"], t["logprob"]) for t in top] for top in tops]
        found.append(value)
    return found


@settings(deadline=None, max_examples=40)
@given(corpora())
def test_parquet_of_a_corpus_of_json_says_all_that_jsonl_does(
    tmp_path_factory: pytest.TempPathFactory, given_rows: tuple[list[dict[str, Any]], list[Any]]
) -> None:
    rows, answers = given_rows
    folder = tmp_path_factory.mktemp("out")
    corpus = folder / "c.jsonl"
    corpus.write_bytes(WRITTEN["c.jsonl"](rows))
    _, path, found = written(folder, "parquet", corpus, answers.__getitem__, return_token_ids=True)
    expected = values(found)
    if any(isinstance(row["id"], str) for row in expected):
        expected = [{**row, "id": str(row["id"])} for row in expected]
    for row in expected:
        for sample in (row, *row.get("samples", ())):
            if tops := sample.get("logprobs", {}).get("top_logprobs"):
                sample["logprobs"]["top_logprobs"] = [[*map(tuple, top)] for top in tops]
    assert as_values(pq.read_table(path)) == expected


@settings(deadline=None, max_examples=25)
@given(corpora())
def test_csv_has_texts_as_they_are_and_the_rest_as_json(
    tmp_path_factory: pytest.TempPathFactory, given_rows: tuple[list[dict[str, Any]], list[Any]]
) -> None:
    rows, answers = given_rows
    folder = tmp_path_factory.mktemp("out")
    corpus = folder / "c.jsonl"
    corpus.write_bytes(WRITTEN["c.jsonl"](rows))
    _, path, found = written(folder, "csv", corpus, answers.__getitem__)
    csv.field_size_limit(sys.maxsize)
    with open(path, encoding="utf-8", newline="") as file:
        records = list(csv.DictReader(file))
    for record, value in zip(records, values(found), strict=True):
        assert (record["id"], record["text"]) == (str(value["id"]), value["text"] or "")
        assert json.loads(record["error"] or "null") == value["error"]
        assert json.loads(record["meta"] or "{}") == value.get("meta", {})
        assert json.loads(record.get("samples") or "null") == json.loads(json.dumps(value.get("samples")))
        assert int(record["completion_tokens"]) == value["usage"]["completion_tokens"]


TABLE = pa.table(
    {
        "key": pa.array([b"a", None, b"c"], pa.binary()),
        "id": pa.array([7, 8, 9], pa.int16()),
        "when": pa.array([1, None, 1_700_000_000_123_456_789], pa.timestamp("ns", "UTC")),
        "prompt": ["a", "b", "c"],
        "text": ["old", None, "é"],
        "label": pa.array(["x", "y", "x"]).dictionary_encode(),
        "score": pa.array([1.5, None, math.inf], pa.float32()),
        "nested": pa.array([[{"a": 1}], None, []], pa.list_(pa.struct({"a": pa.int8()}))),
    }
)
CARRIED = ["key", "when", "prompt", "label", "score", "nested"]


@pytest.fixture
def table(tmp_path: Path) -> Path:
    pq.write_table(TABLE, tmp_path / "c.parquet", row_group_size=2)
    return tmp_path / "c.parquet"


def test_the_columns_of_a_table_are_carried_with_their_types(tmp_path: Path, table: Path) -> None:
    _, path, _ = written(tmp_path / "run", "parquet", table, usual)
    found = pq.read_table(path)
    assert found.select(CARRIED).equals(TABLE.select(CARRIED))


def test_a_column_that_is_called_as_one_of_the_output_has_another_name(tmp_path: Path, table: Path) -> None:
    _, path, _ = written(tmp_path / "run", "parquet", table, usual)
    found = pq.read_table(path)
    assert found["input_text"].equals(TABLE["text"])
    assert found["text"].to_pylist() == [usual(row)[0].text for row in range(3)]


def test_the_ids_of_a_table_keep_their_type(tmp_path: Path, table: Path) -> None:
    _, path, _ = written(tmp_path / "run", "parquet", table, usual)
    assert pq.read_table(path)["id"].equals(TABLE["id"])


@pytest.mark.parametrize("group_rows", [1, 2, 3])
def test_rows_that_are_missing_leave_no_gap_between_columns_and_completions(tmp_path: Path, group_rows: int) -> None:
    table = tmp_path / "c.parquet"
    pq.write_table(TABLE, table, row_group_size=group_rows)
    _, path, _ = written(tmp_path / "run", "parquet", table, lambda row: None if row == 1 else usual(row))
    found = pq.read_table(path)
    assert found["prompt"].to_pylist() == ["a", "c"]
    assert found["text"].to_pylist() == [usual(0)[0].text, usual(2)[0].text]


@pytest.mark.parametrize("name", ["c.parquet", "c.arrow", "c.feather", "c.csv", "c.tsv", "c.jsonl", "c.json"])
@pytest.mark.parametrize("form", FORMATS)
def test_every_format_goes_into_every_other(tmp_path: Path, name: str, form: str) -> None:
    rows = [{"id": f"r{row}", "prompt": f"p{row}", "kept": f"k{row}"} for row in range(7)]
    corpus = tmp_path / name
    corpus.write_bytes(WRITTEN[name](rows))
    output, path, found = written(tmp_path / "run", form, corpus, usual)
    assert [*output.read(path)] == [output.entry(row) for row in found]
    assert len(found) == 7


@pytest.mark.parametrize("name", ["c.parquet", "c.csv"])
@pytest.mark.parametrize("form", ["parquet", "csv"])
def test_a_table_out_has_the_columns_of_a_table_in(tmp_path: Path, name: str, form: str) -> None:
    rows = [{"id": f"r{row}", "prompt": f"p{row}", "kept": f"k{row}"} for row in range(3)]
    corpus = tmp_path / name
    corpus.write_bytes(WRITTEN[name](rows))
    output, path, _ = written(tmp_path / "run", form, corpus, usual)
    assert [{key: entry[key] for key in rows[0]} for entry in output.read(path)] == rows


@pytest.mark.parametrize("packing", packed.PACKINGS)
@pytest.mark.parametrize("name", ["jsonl", "csv", "openai"])
def test_packed_text_is_read_back(tmp_path: Path, packing: str, name: str) -> None:
    corpus = tmp_path / "c.jsonl"
    corpus.write_bytes(WRITTEN["c.jsonl"]([{"prompt": "a", "x": 1}, {"prompt": "b"}]))
    output, path, found = written(tmp_path / "run", name, corpus, usual, packing)
    assert [*output.read(path)] == [output.entry(row) for row in found]


@pytest.mark.parametrize("packing", packed.PACKINGS)
def test_a_packed_file_is_the_same_whenever_it_is_written(tmp_path: Path, packing: str) -> None:
    for name in ("one", "two"):
        with packed.create(tmp_path / name, packing) as file:
            file.write(b"text\n" * 99)
    assert (tmp_path / "one").read_bytes() == (tmp_path / "two").read_bytes()
    assert (tmp_path / "one").stat().st_size < 99


def test_a_gzip_file_says_neither_name_nor_time(tmp_path: Path) -> None:
    with packed.create(tmp_path / "a.gz", ".gz") as file:
        file.write(b"text")
    assert (tmp_path / "a.gz").read_bytes()[3:8] == bytes(5)
