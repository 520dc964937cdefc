"""Hash the files of a model directory, to identify it.

Hashes are cached in the user's cache folder, with size, times and inode of each file.
"""

import contextlib
import hashlib
import json
import logging
import os
import re
import time
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from hpc.model.checkpoint import small_files, weight_files
from hpc.rundir import atomic

LOGGER = logging.getLogger(__name__)


TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
)

_BLOCK_BYTES = 1 << 22
"""Bytes read at a time: large enough that Python is out of the way."""
_THREADS = 8
"""Files hashed at a time: hashing lets other threads run."""
_SAID_BYTES = 5e9
"""More than this takes seconds to hash, and the log says so."""

_SETTLED_S = 2.0
"""A file changed within this time may change again without a new time stamp: its hash is not cached."""

_SAMPLES, _SAMPLE_BYTES = 32, 4096
"""Samples of a file of weights that identified it in older versions."""


def fingerprint(folder: Path, cache: Path) -> str:
    """Hash the weights, configuration and code of a model directory."""
    digest = hashlib.blake2b(digest_size=16)
    files = [*_described(folder), *weight_files(folder)]
    for path, found in zip(files, hashes(files, cache), strict=True):
        digest.update(f"{path.relative_to(folder)}:{found}\n".encode())
    return f"blake2b:{digest.hexdigest()}"


def is_edited(snapshot: Path, cache: Path) -> bool:
    """Return whether a file of a hub snapshot differs from the SHA-256 that its blob is named after."""
    files = [path for path in (*_described(snapshot), *weight_files(snapshot)) if _blob(path)]
    return any(found != f"sha256:{_blob(path)}" for path, found in zip(files, hashes(files, cache), strict=True))


def hashes(
    files: Sequence[Path], cache: Path, algorithm: str = "blake2b", clock_ns: Callable[[], int] = time.time_ns
) -> list[str]:
    """Return the hash of each file, "algorithm:hexdigest"; from the cache, for those that are as they were.

    A blob of the hub has its hash for a name, and is read if it has changed since it was first seen.
    """
    kept = {folder: _read(_kept_in(cache, folder)) for folder in {path.parent for path in files}}
    stamps = [_stamp(path) for path in files]
    found: dict[Path, str] = {}
    for path, stamp in zip(files, stamps, strict=True):
        known, blob = kept[path.parent].get(path.name), _blob(path)
        if known and known[0] == stamp and known[1].startswith(f"{'sha256' if blob else algorithm}:"):
            found[path] = known[1]
        elif blob and known is None:
            found[path] = f"sha256:{blob}"
    left = [path for path in files if path not in found]
    size = sum(path.stat().st_size for path in left)
    if size > _SAID_BYTES:
        LOGGER.info("hashing %.1f GB of weights in %s, once: seconds, or minutes", size / 1e9, left[0].parent)
    with ThreadPoolExecutor(min(_THREADS, os.cpu_count() or 1)) as pool:
        read = pool.map(lambda path: _hash(path, "sha256" if _blob(path) else algorithm), left)
        found.update(zip(left, read, strict=True))
    now, changed = clock_ns(), set()
    for path, stamp in zip(files, stamps, strict=True):
        settled = now - max(stamp[1:3]) > _SETTLED_S * 1e9 or bool(_blob(path))
        entry = [stamp, found[path]]
        if settled and kept[path.parent].get(path.name) != entry and _stamp(path) == stamp:
            kept[path.parent][path.name] = entry
            changed.add(path.parent)
    for folder in changed:
        with contextlib.suppress(OSError):  # no room, or no cache that can be written: it is hashed again
            _kept_in(cache, folder).parent.mkdir(parents=True, exist_ok=True)
            atomic.write(_kept_in(cache, folder), json.dumps(kept[folder]))
    return [found[path] for path in files]


def samples(folder: Path) -> str:
    """Return the identity that older versions gave a folder, from samples of its weights, so that their runs go on."""
    digest = hashlib.blake2b(digest_size=16)
    for path in sorted(folder.iterdir()):
        if path.suffix == ".json" and path.name in ("config.json", "generation_config.json"):
            digest.update(path.name.encode() + path.read_bytes())
        elif path.suffix in (".safetensors", ".bin"):
            size = path.stat().st_size
            digest.update(f"{path.name}:{size}".encode())
            with open(path, "rb") as file:
                for sample in range(_SAMPLES):
                    file.seek(sample * max(0, size - _SAMPLE_BYTES) // (_SAMPLES - 1))
                    digest.update(file.read(_SAMPLE_BYTES))
    return f"directory:{digest.hexdigest()}"


def _described(folder: Path) -> Iterable[Path]:
    """Yield the configuration and code files of a model; tokenizer and chat template have hashes of their own."""
    for path in small_files(folder):
        if path.name not in TOKENIZER_FILES and not path.name.startswith("chat_template"):
            yield path


def _blob(path: Path) -> str:
    """Return the SHA-256 that a large file of the hub's cache has for a name; empty for any other file."""
    target = path.resolve() if path.is_symlink() else path
    return target.name if target.parent.name == "blobs" and re.fullmatch("[0-9a-f]{64}", target.name) else ""


def _stamp(path: Path) -> list[int]:
    """Return size, mtime, ctime and inode of a file. ctime is included because nobody can set it back."""
    stat = path.stat()
    return [stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns, stat.st_ino]


def _hash(path: Path, algorithm: str) -> str:
    digest = hashlib.new(algorithm) if algorithm != "blake2b" else hashlib.blake2b(digest_size=32)
    buffer = memoryview(bytearray(_BLOCK_BYTES))
    with open(path, "rb", buffering=0) as file:
        while count := file.readinto(buffer):
            digest.update(buffer[:count])
    return f"{algorithm}:{digest.hexdigest()}"


def _kept_in(cache: Path, folder: Path) -> Path:
    return cache / "hashes" / f"{hashlib.blake2b(str(folder.absolute()).encode(), digest_size=16).hexdigest()}.json"


def _read(path: Path) -> dict[str, Any]:
    try:
        kept = json.loads(path.read_bytes())
        return {name: [list(stamp), str(found)] for name, (stamp, found) in kept.items()}
    except (OSError, ValueError, TypeError, AttributeError):  # there is none, or it is damaged
        return {}
