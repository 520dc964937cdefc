"""Corpora that cannot be read twice (FIFOs, pipes, standard input): copied into the run directory first.

The corpus is read once to tokenize it and once to write the output. Nothing here blocks: whoever waits for a writer
looks every now and then whether it is to give up.
"""

import contextlib
import hashlib
import logging
import os
import re
import select
import stat
from collections.abc import Callable, Sequence
from pathlib import Path

from hpc.corpus.errors import CorpusError
from hpc.corpus.files import STDIN
from hpc.rundir import atomic

LOGGER = logging.getLogger(__name__)


_WAIT_MS = 100
_READ_BYTES = 1 << 16
_DIGEST_BYTES = 8


def is_pipe(path: Path) -> bool:
    """Say whether a corpus file can be read but once: it is no regular file, or belongs to this process."""
    return str(path).startswith(("/dev/", "/proc/")) or (path.exists() and not stat.S_ISREG(path.stat().st_mode))


def is_nameless(path: Path) -> bool:
    """Say whether the name of a corpus file says nothing: that of a pipe which only this process has."""
    return _descriptor(path) is not None


def keep(files: Sequence[Path], folder: Path, give_up: Callable[[], bool]) -> tuple[Path, ...] | None:
    """Return the corpus files, a copy in the place of each pipe; None if it was given up.

    A copy stands in `folder` under a name made of its content, so that the same content is the same file at every
    attempt, and an earlier one stays until `forget`. A pipe without a byte stands for what it gave before. Raises
    `CorpusError` for what cannot be copied.
    """
    kept: list[Path] = []
    for file in files:
        if not is_pipe(file):
            kept.append(file)
            continue
        copy = _copy(file, folder, give_up)
        if copy is None:
            return None
        kept.append(copy)
    return tuple(kept)


def forget(folder: Path, kept: Sequence[Path]) -> None:
    """Remove the copies that are none of `kept`."""
    for path in folder.glob(f"{'[0-9a-f]' * 2 * _DIGEST_BYTES}/*"):
        if path not in kept:
            path.unlink()
            with contextlib.suppress(OSError):  # the same content under another name is there still
                path.parent.rmdir()


def _copy(file: Path, folder: Path, give_up: Callable[[], bool]) -> Path | None:
    name = "stdin" if _descriptor(file) == 0 else f"pipe-{file.name}" if is_nameless(file) else file.name
    folder.mkdir(exist_ok=True)
    part = atomic.aside(folder / name)
    digest, size = hashlib.blake2b(digest_size=_DIGEST_BYTES), 0
    source = _open(file)
    try:
        LOGGER.info("reading %s, which is copied into %s", name, folder)
        with open(part, "wb") as target:
            while data := _read(source, give_up):
                target.write(data)
                digest.update(data)
                size += len(data)
        if data is None:
            part.unlink()
            return None
    except BaseException:
        part.unlink(missing_ok=True)
        raise
    finally:
        os.close(source)
    before = sorted(folder.glob(f"*/{name}"))
    if not size and len(before) == 1:
        part.unlink()
        LOGGER.info("%s is empty: going on with what it gave before", name)
        return before[0]
    copy = folder / digest.hexdigest() / name
    if copy.exists():
        part.unlink()  # the same: its time stays, by which the token store knows it
    else:
        copy.parent.mkdir(exist_ok=True)
        atomic.finish(copy, part)
    return copy


def _open(file: Path) -> int:
    """Open a pipe without waiting for a writer."""
    number = _descriptor(file)
    try:
        # What is open already is not opened again: a socket, or somebody else's pipe or terminal, could not be.
        opened = os.dup(number) if number is not None else os.open(file, os.O_RDONLY | os.O_NONBLOCK)
    except OSError as error:
        raise CorpusError(f'corpus "{file}" cannot be read: {error.strerror}; give a JSONL file') from error
    mode = os.fstat(opened).st_mode
    nothing = os.fstat(opened).st_rdev == os.stat(os.devnull).st_rdev  # what batch systems give for standard input
    if stat.S_ISBLK(mode) or stat.S_ISDIR(mode) or (stat.S_ISCHR(mode) and not (os.isatty(opened) or nothing)):
        os.close(opened)
        what = "standard input" if file == STDIN else f'"{file}"'
        raise CorpusError(f"corpus {what} is a device or a folder; give a JSONL file, or pipe one into --corpus -")
    return opened


def _read(source: int, give_up: Callable[[], bool]) -> bytes | None:
    """Return what comes next, nothing at the end; None if it is given up."""
    poll = select.poll()
    poll.register(source, select.POLLIN)
    while not give_up():
        if poll.poll(_WAIT_MS):
            try:
                return os.read(source, _READ_BYTES)
            except BlockingIOError:
                continue
    return None


def _descriptor(path: Path) -> int | None:
    """Return the number of the open file that a path such as /dev/stdin stands for."""
    for _ in range(8):
        if found := re.fullmatch(r"/(?:dev|proc/self)/fd/(\d+)", str(path)):
            return int(found[1])
        if not path.is_symlink():
            break
        path = path.parent / os.readlink(path)
    return 0 if path == STDIN else None
