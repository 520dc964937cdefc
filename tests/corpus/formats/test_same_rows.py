"""The same rows are read from every format, in blocks of any size, again and again."""

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from hpc.corpus.files import Blocks, find_files, name_files
from hpc.corpus.find import find_format
from tests.corpus.formats.written import FORMATS, data_set, jsonl, read, values_of, write

TEXT = st.text(st.characters(codec="utf-8", exclude_characters="\0"), max_size=12) | st.sampled_from(
    ["007", "", "a,b", 'say "hi"', "one\ntwo", "\r\n", "\tx;", " ", "null", "1e5", "\u2028", "é€𝄞", "{", "[1]", "'"]
)
ROWS = st.lists(st.fixed_dictionaries({"id": TEXT, "prompt": TEXT, "tag, odd": TEXT}), min_size=1, max_size=9)
RELAXED = settings(deadline=None, max_examples=12, suppress_health_check=[HealthCheck.too_slow])


@pytest.mark.parametrize("name", FORMATS)
@RELAXED
@given(values=ROWS, block_bytes=st.sampled_from([1, 7, 60, 1 << 18]))
def test_rows_of_text_are_the_same_in_every_format(
    tmp_path_factory: pytest.TempPathFactory, name: str, values: list[dict[str, Any]], block_bytes: int
) -> None:
    path = write(tmp_path_factory.mktemp("corpus") / name, FORMATS[name](values))
    found = read(path, block_bytes=block_bytes)
    assert [row for row, _, _ in found] == list(range(len(values)))
    assert [value for _, _, value in found] == values


TYPED = st.lists(
    st.fixed_dictionaries(
        {
            "id": st.integers(-(2**63), 2**63 - 1),
            "messages": st.lists(st.fixed_dictionaries({"role": TEXT, "content": st.none() | TEXT}), max_size=3),
            "score": st.floats(allow_nan=False, allow_infinity=False),
            "good": st.booleans() | st.none(),
            "prompt_token_ids": st.lists(st.integers(0, 2**31), max_size=3),
        }
    ),
    min_size=1,
    max_size=9,
)


@pytest.mark.parametrize(
    "name", ["c.jsonl.zst", "spread.json", "groups.parquet", "pages.parquet", "c.arrow", "c.feather"]
)
@RELAXED
@given(values=TYPED, block_bytes=st.sampled_from([1, 60, 1 << 18]))
def test_rows_of_nested_values_are_the_same_in_every_format_that_has_types(
    tmp_path_factory: pytest.TempPathFactory, name: str, values: list[dict[str, Any]], block_bytes: int
) -> None:
    path = write(tmp_path_factory.mktemp("corpus") / name, FORMATS[name](values))
    assert values_of(path, block_bytes=block_bytes) == values


def many(number: int) -> list[dict[str, Any]]:
    return [{"id": f"{index:03}", "prompt": f"prompt {index} " + "é" * (index % 7)} for index in range(number)]


@pytest.mark.parametrize("limit", [1, 4, 5, 99, 100, 200])
@pytest.mark.parametrize("name", FORMATS)
def test_a_limit_takes_the_first_rows_of_any_format(tmp_path: Path, name: str, limit: int) -> None:
    path = write(tmp_path / name, FORMATS[name](many(100)))
    assert values_of(path, limit=limit, block_bytes=200) == many(100)[:limit]


@pytest.mark.parametrize("limit", [None, 33])
@pytest.mark.parametrize("name", FORMATS)
def test_a_file_that_is_read_twice_has_the_same_rows_and_digest(tmp_path: Path, name: str, limit: int | None) -> None:
    path = write(tmp_path / name, FORMATS[name](many(100)))
    files = name_files([path], [find_format(path)])
    first, again = Blocks(files, 500, limit), Blocks(files, 500, limit)
    assert list(first) == list(again)
    assert first.digests == again.digests


@pytest.mark.parametrize("name", FORMATS)
def test_a_file_with_another_row_has_another_digest(tmp_path: Path, name: str) -> None:
    digests = []
    for last in ("a", "b"):
        path = write(tmp_path / name, FORMATS[name]([*many(50), {"id": "x", "prompt": last}]))
        blocks = Blocks(name_files([path], [find_format(path)]))
        list(blocks)
        digests += blocks.digests
    assert digests[0] != digests[1]


def test_files_of_several_formats_are_one_corpus(tmp_path: Path) -> None:
    paths = [write(tmp_path / name, FORMATS[name](many(3))) for name in ("c.csv", "c.parquet", "c.jsonl")]
    assert [(row, place) for row, place, _ in read(*paths)] == [
        (0, "c.csv:2"), (1, "c.csv:3"), (2, "c.csv:4"),
        (3, "c.parquet row 1"), (4, "c.parquet row 2"), (5, "c.parquet row 3"),
        (6, "c.jsonl:1"), (7, "c.jsonl:2"), (8, "c.jsonl:3"),
    ]  # fmt: skip


def test_a_data_set_of_datasets_has_the_rows_of_its_files_in_order(tmp_path: Path) -> None:
    folder = data_set(tmp_path / "set", many(20))
    assert values_of(*find_files([str(folder)])) == many(20)


@pytest.mark.parametrize("name", FORMATS)
def test_the_format_is_told_by_the_content_whatever_the_name_promises(tmp_path: Path, name: str) -> None:
    values = many(3)
    told = find_format(write(tmp_path / name, FORMATS[name](values)))
    if told in ("csv", "tsv"):
        return
    assert find_format(write(tmp_path / "strange.csv", FORMATS[name](values))) == told


def test_lines_that_are_no_objects_are_error_rows_of_an_array_too(tmp_path: Path) -> None:
    path = write(tmp_path / "c.json", json.dumps([{"prompt": "a"}, 5, {"prompt": "b"}]).encode())
    assert [
        (place, value[0] if isinstance(value, tuple) else value) for _, place, value in read(path, asked="json")
    ] == [
        ("c.json row 1", {"prompt": "a"}),
        ("c.json row 2", "not_object"),
        ("c.json row 3", {"prompt": "b"}),
    ]


def test_an_empty_file_has_no_rows(tmp_path: Path) -> None:
    assert values_of(write(tmp_path / "c.jsonl", jsonl([]))) == []
