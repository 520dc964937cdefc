"""A corpus is found, cut into blocks without losing or doubling a line, and decoded."""

import hashlib
import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hpc.corpus import formats
from hpc.corpus.columns import Columns
from hpc.corpus.decode import decode_row
from hpc.corpus.errors import CorpusError, RowError
from hpc.corpus.files import Blocks, find_files, name_files
from hpc.corpus.row import row_id
from tests.conftest import write_corpus

BOM = b"\xef\xbb\xbf"


Found = tuple[int, int, Any]


def rows(files: list[Path], block_bytes: int = 1 << 16, limit: int | None = None) -> list[Found]:
    """Return index, number of line and value of each row, None for one that is broken."""
    blocks = Blocks(name_files(files), block_bytes, limit)
    return [
        (row, place.number, None if isinstance(value, RowError) else value)
        for block in blocks
        for row, place, value in formats.rows(block)
    ]


def line(number: int) -> bytes:
    return b'{"n": %d}' % number


def written(path: Path, data: bytes) -> Path:
    path.write_bytes(data)
    return path


def test_several_files_are_found_in_the_order_given(tmp_path: Path) -> None:
    b, a = (write_corpus(tmp_path / name, [{}]) for name in ("b.jsonl", "a.jsonl"))
    assert find_files([str(b), str(a)]) == (b, a)


def test_a_glob_is_found_in_sorted_order(tmp_path: Path) -> None:
    files = [write_corpus(tmp_path / name, [{}]) for name in ("c.jsonl", "a.jsonl", "b.jsonl")]
    assert find_files([str(tmp_path / "*.jsonl")]) == tuple(sorted(files))


def test_a_file_whose_name_looks_like_a_glob_is_taken_by_its_name(tmp_path: Path) -> None:
    odd = write_corpus(tmp_path / "[a].jsonl", [{}])
    write_corpus(tmp_path / "a.jsonl", [{}])
    assert find_files([str(odd)]) == (odd,)


def test_a_relative_name_is_found_as_an_absolute_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write_corpus(tmp_path / "a.jsonl", [{}])
    monkeypatch.chdir(tmp_path)
    assert find_files(["a.jsonl"]) == (path,)


@pytest.mark.parametrize("name", ["missing.jsonl", "*.missing", "fold*"])
def test_what_is_no_file_is_refused(tmp_path: Path, name: str) -> None:
    (tmp_path / "folder").mkdir()
    with pytest.raises(CorpusError, match="no such file; --corpus takes"):
        find_files([str(tmp_path / name)])


LINES = st.lists(
    st.sampled_from([b"a", b"", b" ", b"\r", b"\t\r", line(1), line(1) + b"\r", '{"é": "€"}'.encode(), line(10**30)]),
    max_size=12,
)


def decoded(text: bytes) -> Any:
    try:
        return json.loads(text)
    except ValueError:
        return None


@settings(deadline=None)
@given(files=st.lists(LINES, min_size=1, max_size=3), block_bytes=st.integers(1, 40), last_newline=st.booleans())
def test_blocks_of_any_size_have_every_row_once_and_in_order(
    tmp_path_factory: pytest.TempPathFactory, files: list[list[bytes]], block_bytes: int, last_newline: bool
) -> None:
    folder, expected = tmp_path_factory.mktemp("corpus"), []
    paths = []
    for index, lines in enumerate(files):
        paths.append(written(folder / str(index), b"\n".join(lines) + (b"\n" if last_newline else b"")))
        expected += [(number, decoded(text)) for number, text in enumerate(lines, 1) if text.strip()]
    found = rows(paths, block_bytes)
    assert [row for row, _, _ in found] == list(range(len(expected)))
    assert [(number, value) for _, number, value in found] == expected


@settings(deadline=None)
@given(lines=LINES, block_bytes=st.integers(1, 40), limit=st.integers(1, 12))
def test_a_limit_takes_the_first_rows(
    tmp_path_factory: pytest.TempPathFactory, lines: list[bytes], block_bytes: int, limit: int
) -> None:
    path = written(tmp_path_factory.mktemp("corpus") / "c", b"\n".join(lines))
    assert rows([path], block_bytes, limit) == rows([path])[:limit]


def test_a_missing_last_newline_costs_no_row(tmp_path: Path) -> None:
    assert rows([written(tmp_path / "c", line(1) + b"\n" + line(2))]) == [(0, 1, {"n": 1}), (1, 2, {"n": 2})]


def test_blank_lines_are_no_rows_but_are_counted_as_lines(tmp_path: Path) -> None:
    path = written(tmp_path / "c", b"\n \t\n%s\n\r\n%s\n" % (line(1), line(2)))
    assert rows([path]) == [(0, 3, {"n": 1}), (1, 5, {"n": 2})]


@pytest.mark.parametrize("block_bytes", [1, 2, 3, 100])
def test_a_byte_order_mark_at_the_beginning_of_each_file_is_dropped(tmp_path: Path, block_bytes: int) -> None:
    files = [written(tmp_path / name, BOM + line(1) + b"\n" + line(2)) for name in "ab"]
    assert [value for _, _, value in rows(files, block_bytes)] == [{"n": 1}, {"n": 2}] * 2


def test_rows_are_counted_over_files_and_lines_in_each(tmp_path: Path) -> None:
    files = [written(tmp_path / "a", line(1) + b"\n" + line(2)), written(tmp_path / "b", line(3))]
    assert rows(files)[-1] == (2, 1, {"n": 3})


def test_a_block_names_the_file_it_is_of(tmp_path: Path) -> None:
    files = [written(tmp_path / "a", b"1\n"), written(tmp_path / "b", b"2\n")]
    assert [block.file for block in Blocks(name_files(files), 100)] == [0, 1]


def test_an_empty_file_has_no_rows(tmp_path: Path) -> None:
    assert rows([written(tmp_path / "c", b"")]) == []


def test_digests_are_those_of_the_files(tmp_path: Path) -> None:
    data = [BOM + b"1\n\n", b"2\r\n3"]
    blocks = Blocks(name_files([written(tmp_path / str(index), text) for index, text in enumerate(data)]), 3)
    list(blocks)
    assert blocks.digests == [hashlib.blake2b(text, digest_size=16).hexdigest() for text in data]


def test_num_rows_counts_the_rows_of_all_files(tmp_path: Path) -> None:
    blocks = Blocks(name_files([written(tmp_path / "a", b"1\n\n2"), written(tmp_path / "b", b"3")]), 100)
    list(blocks)
    assert blocks.num_rows == 3


def test_a_line_is_decoded_to_its_object() -> None:
    assert decode_row('{"prompt": "é", "n": 1.5}'.encode()) == {"prompt": "é", "n": 1.5}


@pytest.mark.parametrize("text", [b"\xff", b"{", b"[]"])
def test_a_line_that_is_no_object_is_refused(text: bytes) -> None:
    with pytest.raises(RowError):
        decode_row(text)


@pytest.mark.parametrize(
    ("row", "identity"), [({"id": 7}, 7), ({"id": "7"}, "7"), ({"id": ""}, ""), ({"id": None}, 3), ({}, 3)]
)
def test_an_id_is_the_one_given_or_else_the_rows_index(row: dict[str, Any], identity: int | str) -> None:
    assert (row_id(row, 3), type(row_id(row, 3))) == (identity, type(identity))


def test_meta_is_every_key_without_a_meaning() -> None:
    row = {"id": 1, "prompt": "a", "messages": None, "prompt_token_ids": None, "sampling": {}, "tag": "x", "null": None}
    assert Columns().meta_of(row) == {"tag": "x", "null": None}
