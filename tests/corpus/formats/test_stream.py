"""Text is unpacked and decoded as it is read; where that is not possible, the place is named."""

import bz2
import gzip
import lzma
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from hpc.corpus.errors import CorpusError
from hpc.corpus.find import find_format
from tests.corpus.formats.written import jsonl, read, values_of, write, zstd

ROWS = [{"prompt": f"{index} " + "".join(chr(97 + (index * k) % 26) for k in range(200))} for index in range(2000)]
SUM = {zstd.CompressionParameter.checksum_flag: 1}
"""Without a checksum zstd takes other bytes of a text for it."""
PACK: dict[str, Callable[[bytes], bytes]] = {
    "c.gz": gzip.compress,
    "c.bz2": bz2.compress,
    "c.zst": lambda data: zstd.compress(data, options=SUM),
    "c.xz": lzma.compress,
}


@pytest.mark.parametrize("name", PACK)
@pytest.mark.parametrize("kept", [0.6, 0.999999])
def test_a_cut_file_is_refused_at_the_line_where_it_is_cut(tmp_path: Path, name: str, kept: float) -> None:
    packed = PACK[name](jsonl(ROWS))
    path = write(tmp_path / name, packed[: int(len(packed) * kept)])
    with pytest.raises(CorpusError, match=rf"c{Path(name).suffix}:\d+: here the packed file is cut .*--corpus -"):
        read(path, block_bytes=1000, asked="jsonl")


def test_the_line_of_a_cut_is_behind_the_last_that_can_be_read(tmp_path: Path) -> None:
    packed = gzip.compress(jsonl(ROWS))
    path = write(tmp_path / "c.gz", packed[:-4])  # all of the text is there
    with pytest.raises(CorpusError, match=r"c\.gz:(\d+):") as caught:
        read(path, block_bytes=1000)
    assert 1990 <= int(str(caught.value).split(":")[1]) <= 2001


@pytest.mark.parametrize("name", PACK)
def test_a_file_of_which_nothing_can_be_unpacked_is_refused(tmp_path: Path, name: str) -> None:
    path = write(tmp_path / name, PACK[name](jsonl(ROWS))[:8] + b"x" * 100)
    with pytest.raises(CorpusError, match=r":1: here the packed file is cut or damaged"):
        read(path)


@pytest.mark.parametrize("name", ["c.gz", "c.zst", "c.bz2", "c.xz"])
def test_several_packed_files_one_behind_the_other_are_one(tmp_path: Path, name: str) -> None:
    path = write(tmp_path / name, PACK[name](jsonl(ROWS[:3])) + PACK[name](jsonl(ROWS[3:5])))
    assert values_of(path) == ROWS[:5]


@pytest.mark.parametrize("name", PACK)
@pytest.mark.parametrize("at", [2, 60])
def test_a_damaged_packed_file_behind_a_good_one_is_refused(tmp_path: Path, name: str, at: int) -> None:
    second = bytearray(PACK[name](jsonl(ROWS[3:5])))
    second[at] ^= 0xFF
    path = write(tmp_path / name, PACK[name](jsonl(ROWS[:3])) + second)
    with pytest.raises(CorpusError, match=r":\d+: here the packed file is cut or damaged"):
        read(path)


def test_zeros_behind_a_packed_file_do_no_harm(tmp_path: Path) -> None:
    assert values_of(write(tmp_path / "c.xz", lzma.compress(jsonl(ROWS[:3])) + bytes(512))) == ROWS[:3]


def test_a_cut_behind_the_limit_is_not_seen(tmp_path: Path) -> None:
    packed = gzip.compress(jsonl(ROWS))
    assert values_of(write(tmp_path / "c.gz", packed[:-10]), block_bytes=1000, limit=5) == ROWS[:5]


def test_zstd_without_its_package_is_refused_with_what_to_install(tmp_path: Path) -> None:
    path, names = write(tmp_path / "c.zst", zstd.compress(jsonl(ROWS[:1]))), ("backports", "compression")
    kept = {name: sys.modules.pop(name) for name in list(sys.modules) if name.split(".")[0] in names}
    sys.modules.update(dict.fromkeys(names))  # type: ignore[arg-type]  # None: it cannot be imported
    try:
        with pytest.raises(CorpusError, match=r'zstd, .* not installed: pip install "scattergen\[zstd\]"'):
            find_format(path)
    finally:
        for name in names:
            del sys.modules[name]
        sys.modules.update(kept)


def test_half_a_surrogate_pair_in_utf_16_is_an_error_row(tmp_path: Path) -> None:
    data = '{"prompt": "a"}\n{"prompt": "\ud800"}\n{"prompt": "b"}\n'.encode("utf-16", "surrogatepass")
    values = values_of(write(tmp_path / "c.jsonl", data))
    assert [value if isinstance(value, dict) else value[0] for value in values] == [
        {"prompt": "a"}, "invalid_utf8", {"prompt": "b"},
    ]  # fmt: skip


def test_utf_16_that_ends_in_a_character_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CorpusError, match="truncated"):
        read(write(tmp_path / "c.jsonl", '{"prompt": "a"}\n'.encode("utf-16") + b"\0"))


def test_a_file_that_is_not_there_is_refused_with_the_reason(tmp_path: Path) -> None:
    with pytest.raises(CorpusError, match="cannot be read: No such file"):
        find_format(tmp_path / "c.jsonl")
