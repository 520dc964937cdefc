"""A model is hashed once, and again when a file of it has changed, however that was done."""

import hashlib
import json
import os
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from hpc.model.identity import hashes, is_edited

CONTENT = b"weights, of which one will be another"


def later() -> int:
    """A clock by which everything was written a while ago."""
    return time.time_ns() + 10**10


@pytest.fixture
def file(tmp_path: Path) -> Path:
    """A file of weights."""
    path = tmp_path / "model.safetensors"
    path.write_bytes(CONTENT)
    return path


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    """A folder that is not there yet."""
    return tmp_path / "cache"


def poison(cache: Path) -> str:
    """Replace what the cache has kept, so that it is seen whether it is used; return what it holds now."""
    [kept] = (cache / "hashes").iterdir()
    values = json.loads(kept.read_text())
    for name, (stamp, found) in values.items():
        values[name] = [stamp, found.split(":")[0] + ":kept"]
    kept.write_text(json.dumps(values))
    return str(next(iter(values.values()))[1])


def edit(path: Path) -> None:
    """Change a byte in place, and set size and time of modification as they were."""
    before = path.stat()
    while path.stat().st_ctime_ns == before.st_ctime_ns:  # the clock of the file system has ticks of milliseconds
        with open(path, "r+b") as file:
            file.seek(3)
            file.write(b"X")
        os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))


def test_a_file_is_known_by_the_hash_of_all_of_it(file: Path, cache: Path) -> None:
    assert hashes([file], cache) == [f"blake2b:{hashlib.blake2b(CONTENT, digest_size=32).hexdigest()}"]


def test_a_file_is_known_by_another_hash_where_that_is_asked_for(file: Path, cache: Path) -> None:
    assert hashes([file], cache, "sha256") == [f"sha256:{hashlib.sha256(CONTENT).hexdigest()}"]


def test_files_have_their_hashes_in_their_order(tmp_path: Path, cache: Path) -> None:
    files = [tmp_path / name for name in "cabd"]
    for path in files:
        path.write_text(path.name)
    assert hashes(files, cache) == [hashes([path], cache)[0] for path in files]


def test_a_file_that_was_hashed_is_not_read_again(file: Path, cache: Path) -> None:
    hashes([file], cache, clock_ns=later)
    kept = poison(cache)
    assert hashes([file], cache) == [kept]


def replaced(path: Path) -> None:
    stat = path.stat()
    other = path.with_name("other")
    other.write_bytes(CONTENT[::-1])
    os.utime(other, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    os.replace(other, path)


def touched(path: Path) -> None:
    os.utime(path, ns=(0, 0))


@pytest.mark.parametrize("change", [edit, replaced, touched], ids=["edited", "replaced", "touched"])
def test_a_file_that_has_changed_is_hashed_again(file: Path, cache: Path, change: Callable[[Path], None]) -> None:
    hashes([file], cache, clock_ns=later)
    poison(cache)
    change(file)
    assert hashes([file], cache) == [f"blake2b:{hashlib.blake2b(file.read_bytes(), digest_size=32).hexdigest()}"]


def test_the_hash_of_a_file_that_may_still_be_written_is_not_kept(file: Path, cache: Path) -> None:
    hashes([file], cache)
    assert not cache.exists()


def test_another_hash_of_the_same_file_is_not_taken_for_it(file: Path, cache: Path) -> None:
    hashes([file], cache, clock_ns=later)
    assert hashes([file], cache, "sha256") == [f"sha256:{hashlib.sha256(CONTENT).hexdigest()}"]


def test_a_cache_that_cannot_be_written_does_no_harm(file: Path, cache: Path) -> None:
    cache.write_text("no folder")
    assert hashes([file], cache, clock_ns=later) == hashes([file], cache)


@pytest.mark.parametrize("damage", ["", "{", "[]", '{"model.safetensors": 1}', '{"model.safetensors": [1, 2]}'])
def test_a_damaged_cache_does_no_harm(file: Path, cache: Path, damage: str) -> None:
    before = hashes([file], cache, clock_ns=later)
    [kept] = (cache / "hashes").iterdir()
    kept.write_text(damage)
    assert hashes([file], cache) == before


# The hub's cache.


@pytest.fixture
def snapshot(tmp_path: Path) -> Path:
    """A snapshot whose weights are a blob; that its name is not the hash of its content shows when it is read."""
    made, blobs = tmp_path / "snapshots" / "abc", tmp_path / "blobs"
    made.mkdir(parents=True)
    blobs.mkdir()
    (blobs / ("0" * 64)).write_bytes(b"0" * 100)
    (made / "model.safetensors").symlink_to(blobs / ("0" * 64))
    return made


def test_a_blob_of_the_hub_is_known_by_its_name(snapshot: Path, cache: Path) -> None:
    assert hashes([snapshot / "model.safetensors"], cache) == ["sha256:" + "0" * 64]


def test_a_blob_that_has_changed_since_it_was_first_seen_is_read(snapshot: Path, cache: Path) -> None:
    hashes([snapshot / "model.safetensors"], cache)
    edit(snapshot / "model.safetensors")
    content = (snapshot / "model.safetensors").read_bytes()
    assert hashes([snapshot / "model.safetensors"], cache) == [f"sha256:{hashlib.sha256(content).hexdigest()}"]


def test_a_snapshot_as_it_came_is_not_edited(snapshot: Path, cache: Path) -> None:
    assert [is_edited(snapshot, cache), is_edited(snapshot, cache)] == [False, False]


def test_a_snapshot_with_an_edited_blob_is_edited(snapshot: Path, cache: Path) -> None:
    is_edited(snapshot, cache)
    edit(snapshot / "model.safetensors")
    assert is_edited(snapshot, cache)
