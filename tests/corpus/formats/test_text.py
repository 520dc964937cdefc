"""CSV, JSON arrays and plain text: what is broken is an error at its place."""

import gzip
import json
from pathlib import Path
from typing import Any

import pytest

from hpc.corpus.errors import CorpusError
from hpc.corpus.files import BLOCK_BYTES
from tests.corpus.formats.written import blocks_of, read, values_of, write


def csv_rows(tmp_path: Path, text: str | bytes, **options: Any) -> list[tuple[str, Any]]:
    path = write(tmp_path / "c.csv", text if isinstance(text, bytes) else text.encode())
    return [(place, value) for _, place, value in read(path, **options)]


def test_all_fields_are_text(tmp_path: Path) -> None:
    assert csv_rows(tmp_path, "id,prompt,n\n007,cat,1.50\n") == [
        ("c.csv:2", {"id": "007", "prompt": "cat", "n": "1.50"})
    ]


@pytest.mark.parametrize("block_bytes", [1, 50, BLOCK_BYTES])
def test_a_record_stands_at_its_first_line(tmp_path: Path, block_bytes: int) -> None:
    text = 'id,"a\nprompt"\n1,"one\ntwo\nthree"\n\n2,x\n\r\n3,"y\r\n"\n4,z\n'
    places = [place for place, _ in csv_rows(tmp_path, text, block_bytes=block_bytes)]
    assert places == ["c.csv:3", "c.csv:7", "c.csv:9", "c.csv:11"]


@pytest.mark.parametrize(
    ("record", "reason"),
    [
        ("1", "has 1 fields and the header 2"),
        ("1,a,b", "has 3 fields and the header 2"),
        ('1,"a"b', "cannot be read"),
        (b"1,caf\xe9", "the field prompt has bytes that are not UTF-8; convert the file: iconv"),
    ],
)
def test_a_broken_record_is_one_error_row(tmp_path: Path, record: str | bytes, reason: str) -> None:
    data = record if isinstance(record, bytes) else record.encode()
    good, broken, last = csv_rows(tmp_path, b"id,prompt\n0,a\n" + data + b"\n2,c\n")
    assert (good, last) == (("c.csv:2", {"id": "0", "prompt": "a"}), ("c.csv:4", {"id": "2", "prompt": "c"}))
    place, (kind, message) = broken
    assert (place, kind) == ("c.csv:3", "csv")
    assert reason in message


def test_a_quote_that_is_never_closed_is_refused_at_its_record(tmp_path: Path) -> None:
    with pytest.raises(CorpusError, match=r"c\.csv:3: a quote .* is never closed"):
        csv_rows(tmp_path, 'id,prompt\n0,a\n1,"b\n2,c\n3,d\n')


def test_a_header_that_names_a_column_twice_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CorpusError, match=r"c\.csv:1: the header names the column a twice"):
        csv_rows(tmp_path, "a,prompt,a\n1,2,3\n")


def test_a_field_may_be_longer_than_pythons_bound(tmp_path: Path) -> None:
    [(_, value)] = csv_rows(tmp_path, "prompt\n" + "x" * 300_000)
    assert len(value["prompt"]) == 300_000


@pytest.mark.parametrize("mark", [",", ";"])
def test_the_delimiter_is_the_one_outside_of_quotes(tmp_path: Path, mark: str) -> None:
    text = f'"a{";" if mark == "," else ","}b"{mark}prompt\n1{mark}x\n'
    [(_, value)] = csv_rows(tmp_path, text)
    assert list(value.values()) == ["1", "x"]


def array(tmp_path: Path, text: str | bytes) -> Path:
    return write(tmp_path / "c.json", text if isinstance(text, bytes) else text.encode())


@pytest.mark.parametrize(
    ("text", "row", "reason"),
    [
        ('[{"a": 1}, {"a": ]', 2, "is not JSON"),
        ('[{"a": 1} {"a": 2}]', 2, 'neither "," nor "]"'),
        ('[{"a": 1}, {"a": 2}', 3, 'ends before the "]"'),
        ('[{"a": 1}', 2, 'ends before the "]"'),
        ('[{"a": 1}] {"a": 2}', 2, "behind the end of the array"),
        ('{"a": 1}\n{"a": \n', 2, "is not JSON"),
    ],
)
def test_json_that_is_broken_is_refused_at_its_row(tmp_path: Path, text: str, row: int, reason: str) -> None:
    with pytest.raises(CorpusError) as caught:
        read(array(tmp_path, text), asked="json", block_bytes=3)
    assert str(caught.value).startswith(f"c.json row {row}: ")
    assert reason in str(caught.value)


def test_bytes_that_are_not_utf_8_are_one_error_row_of_an_array(tmp_path: Path) -> None:
    values = values_of(array(tmp_path, b'[{"prompt": "a"}, {"prompt": "\xff"}, {"prompt": "b"}]'), asked="json")
    assert [value if isinstance(value, dict) else value[0] for value in values] == [
        {"prompt": "a"}, "invalid_utf8", {"prompt": "b"},
    ]  # fmt: skip


def test_an_element_may_be_longer_than_a_block(tmp_path: Path) -> None:
    rows = [{"prompt": "x" * 5000}, {"prompt": "y"}]
    assert values_of(array(tmp_path, json.dumps(rows)), asked="json", block_bytes=10) == rows


def test_an_empty_array_has_no_rows(tmp_path: Path) -> None:
    assert values_of(array(tmp_path, " [ ] "), asked="json") == []


def test_each_line_of_plain_text_is_a_prompt(tmp_path: Path) -> None:
    path = write(tmp_path / "c.txt", "a, b\r\n\n  é \n".encode())
    assert [(place, value) for _, place, value in read(path)] == [
        ("c.txt:1", {"prompt": "a, b"}), ("c.txt:3", {"prompt": "  é "}),
    ]  # fmt: skip


def test_plain_text_is_read_where_it_is_asked_for_whatever_it_looks_like(tmp_path: Path) -> None:
    path = write(tmp_path / "c.jsonl", b'{"prompt": "a"}\n')
    assert values_of(path, asked="text") == [{"prompt": '{"prompt": "a"}'}]


def test_a_line_of_plain_text_that_is_not_utf_8_is_an_error_row(tmp_path: Path) -> None:
    [good, (kind, message)] = values_of(write(tmp_path / "c.txt", b"a\ncaf\xe9\n"))
    assert (good, kind) == ({"prompt": "a"}, "invalid_utf8")
    assert "byte 4 of the line" in message


def test_a_file_a_prompt_carries_its_name_and_loses_its_last_line_break(tmp_path: Path) -> None:
    paths = [write(tmp_path / "a.txt", b"one\ntwo\n"), write(tmp_path / "b.py.gz", gzip.compress("é\r\n".encode()))]
    assert values_of(*paths, asked="file") == [
        {"prompt": "one\ntwo", "file": "a.txt"}, {"prompt": "é", "file": "b.py.gz"},
    ]  # fmt: skip


def test_an_empty_file_is_a_row_where_each_file_is_a_prompt(tmp_path: Path) -> None:
    paths = [write(tmp_path / name, data) for name, data in (("a", b""), ("b", b"x"))]
    assert [value["prompt"] for value in values_of(*paths, asked="file")] == ["", "x"]


def test_files_behind_the_limit_are_not_read(tmp_path: Path) -> None:
    paths = [write(tmp_path / name, b"x") for name in "ab"]
    assert len(list(blocks_of(*paths, asked="file", limit=1))) == 1
