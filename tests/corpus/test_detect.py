"""The content of a file says what it is; what is clearly not read is refused with the way out."""

import json

import pytest

from hpc.corpus.detect import HEAD_BYTES, named_format, recognise
from hpc.corpus.errors import CorpusError

ROWS = [{"id": index, "prompt": f"prompt {index}, and more"} for index in range(3)]
JSONL = "".join(json.dumps(row) + "\n" for row in ROWS)
BATCH = json.dumps({"custom_id": "q", "method": "POST", "url": "/v1/chat/completions", "body": {"messages": []}}) + "\n"


def found(data: bytes, name: str = "F") -> str:
    return recognise(data[:HEAD_BYTES], name, len(data) < HEAD_BYTES)


@pytest.mark.parametrize(
    ("data", "what", "way_out"),
    [
        (b"\x04\x22\x4d\x18" + b"\x91" * 50, "packed with lz4", "unpack it"),
        (b"PK\x03\x04\x14\0", "zip", "as JSONL or Parquet"),
        (b"Obj\x01", "Avro", "as JSONL or Parquet"),
        (b"PAR1\x15\x04\x15", "Parquet or Arrow, packed once more", "unpack it"),
        (b"a.jsonl".ljust(257, b"\0") + b"ustar\x0000", "tar", "unpack it"),
        (b"[1, 2]\n[3, 4]\n", "no objects", "one object on each line"),
        (b"id,prompt\n0,cat\n1,dog\n", "CSV", "--format csv"),
        (b"id;prompt\n0;cat\n", "CSV", "--format csv"),
        (b"id\tprompt\n0\tcat\n", "TSV", "--format tsv"),
        (b"What is a cat?\nWhat is a dog?\n", "plain text", "--format text"),
        (b"\xef\xbb\xbfWhat is a cat?\n", "plain text", "--format text"),
        (b'"What is a cat?"\n"What is a dog?"\n', "plain text", "one object on each line"),
        (b"x" * HEAD_BYTES, "plain text", "--format text"),
    ],
)
def test_what_is_not_read_is_named_with_the_way_out(data: bytes, what: str, way_out: str) -> None:
    with pytest.raises(CorpusError) as caught:
        found(data)
    assert what in str(caught.value)
    assert way_out in str(caught.value)


@pytest.mark.parametrize(
    "data",
    [
        json.dumps(ROWS).encode(),
        json.dumps(ROWS, indent=2).encode(),
        b"[\n" + b",\n".join(json.dumps(row).encode() for row in ROWS) + b"\n]\n",
        b"[" + b"\n,".join(json.dumps(row).encode() for row in ROWS) + b"]",
        json.dumps(ROWS * 1000).encode(),
        json.dumps(ROWS * 1000, indent=1).encode(),
        json.dumps([{"prompt": "x" * 2 * HEAD_BYTES}]).encode(),
        json.dumps([{"prompt": "x" * 2 * HEAD_BYTES}], indent=1).encode(),
        json.dumps({"rows": ROWS}, indent=1).encode(),
        "".join(json.dumps(row, indent=1) for row in ROWS).encode(),
    ],
)
def test_an_array_and_objects_over_several_lines_are_json(data: bytes) -> None:
    assert found(data) == "json"


@pytest.mark.parametrize(
    "text",
    [
        "[]",
        "[\n]\n",
        json.dumps(ROWS)[:-5],
        json.dumps(ROWS, indent=2)[:-5],
        json.dumps(ROWS) + " x",
        json.dumps([*ROWS, 3, None]),
        json.dumps([*ROWS, {"x": float("nan")}, 3]),
        json.dumps([3, *ROWS]),
    ],
)
def test_a_broken_array_of_objects_is_json_whose_reader_tells_what_is_broken(text: str) -> None:
    assert found(text.encode()) == "json"


@pytest.mark.parametrize(
    ("data", "name", "expected"),
    [
        ("id,prompt\n0,cat\n", "c.csv", "csv"),
        ("id,prompt\n0,cat\n", "c.CSV.gz", "csv"),
        ("id\tprompt\n0\tcat\n", "c.tsv", "tsv"),
        ("a, b\n", "c.txt", "text"),
        ("not JSON\n" + JSONL, "c.txt", "text"),
        ("", "c.csv", "csv"),
        (JSONL, "c.csv", "jsonl"),
        (JSONL, "c.txt", "jsonl"),
        (json.dumps(ROWS), "c.csv", "json"),
        ("{broken\n", "c.csv", "csv"),
    ],
)
def test_the_name_decides_only_where_text_may_be_one_or_the_other(data: str, name: str, expected: str) -> None:
    assert found(data.encode(), name) == expected


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("a.jsonl", "jsonl"),
        ("a.b.JSON.zst", "json"),
        ("a.parquet", "parquet"),
        ("a.gz", ""),
        ("README.md", ""),
        ("a", ""),
    ],
)
def test_a_name_promises_a_format(name: str, expected: str) -> None:
    assert named_format(name) == expected


@pytest.mark.parametrize(
    "text",
    [
        JSONL,
        "\ufeff" + JSONL,
        "\n \r\n" + JSONL,
        JSONL.replace("\n", "\r\n"),
        JSONL.rstrip("\n"),
        "",
        "\n\n",
        "{",
        "{}",
        '{"prompt": "cut of\n',
        '{"prompt": "cut of\n' + JSONL,
        "not JSON\n" + JSONL,
        "id,prompt\n" + JSONL,
        "5\n" + JSONL,
        "[1]\n" + JSONL,
        '[{"prompt": "a"}]\n' + JSONL,
        '[{"prompt": "a"},\n' + JSONL,
        '[{"a": 1}\n' + JSONL,
        "[\n" + JSONL,
        "{\n" + JSONL,
        '{"prompt": "a", "id": 5.0}\n' * 3,
        BATCH * 2,
        BATCH + JSONL,
        '{"prompt": "a", "custom_id": 5, "body": "kept as meta"}\n',
        json.dumps({"prompt": "x" * 2 * HEAD_BYTES}),
        json.dumps({"prompt": "é" * HEAD_BYTES}, ensure_ascii=False),
        JSONL + "x" * HEAD_BYTES,
    ],
)
def test_what_may_be_jsonl_is_read_as_jsonl(text: str) -> None:
    assert found(text.encode()) == "jsonl"
