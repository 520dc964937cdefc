"""What can be read but once is copied into the run directory, whatever becomes of its writer."""

import os
import socket
import threading
from collections.abc import Callable
from pathlib import Path

import pytest

from hpc.corpus.errors import CorpusError
from hpc.corpus.pipe import forget, is_nameless, is_pipe, keep


def never() -> bool:
    return False


def after(calls: int) -> Callable[[], bool]:
    """Give up at this call."""
    left = iter(range(calls))
    return lambda: next(left, None) is None


def fifo(path: Path, *pieces: bytes) -> Path:
    """Make a FIFO, and a thread that writes into it as soon as somebody reads."""
    os.mkfifo(path)

    def write() -> None:
        with open(path, "wb", buffering=0) as file:
            for piece in pieces:
                file.write(piece)

    threading.Thread(target=write, daemon=True).start()
    return path


def again(path: Path, *pieces: bytes) -> Path:
    path.unlink()
    return fifo(path, *pieces)


def pipe_end(data: bytes) -> Path:
    """Return the name of the reading end of a pipe whose writer has left."""
    reading, writing = os.pipe()
    os.write(writing, data)
    os.close(writing)
    return Path(f"/dev/fd/{reading}")


def test_a_file_stays_where_it_is(tmp_path: Path) -> None:
    path = tmp_path / "c.jsonl"
    path.write_bytes(b"a\n")
    assert keep([path], tmp_path / "corpus", never) == (path,)


def test_a_fifo_is_copied_byte_for_byte_under_its_name(tmp_path: Path) -> None:
    pieces = [b"a\n", b"b" * 200_000, b"\nc"]
    [copy] = keep([fifo(tmp_path / "c.jsonl", *pieces)], tmp_path / "corpus", never) or ()
    assert (copy.name, copy.read_bytes()) == ("c.jsonl", b"".join(pieces))


def test_a_pipe_of_the_shell_is_copied(tmp_path: Path) -> None:
    end = pipe_end(b"a\n")
    [copy] = keep([end], tmp_path / "corpus", never) or ()
    os.close(int(end.name))
    assert (copy.name, copy.read_bytes()) == (f"pipe-{end.name}", b"a\n")


def test_a_socket_that_is_open_is_copied(tmp_path: Path) -> None:
    writing, reading = socket.socketpair()
    with reading:
        writing.sendall(b"a\n")
        writing.close()
        [copy] = keep([Path(f"/dev/fd/{reading.fileno()}")], tmp_path / "corpus", never) or ()
    assert copy.read_bytes() == b"a\n"


def test_a_link_to_a_pipe_of_the_shell_is_copied(tmp_path: Path) -> None:
    end = pipe_end(b"a\n")
    (tmp_path / "link").symlink_to(end)
    [copy] = keep([tmp_path / "link"], tmp_path / "corpus", never) or ()
    os.close(int(end.name))
    assert copy.read_bytes() == b"a\n"


def test_the_same_content_is_the_same_file_untouched(tmp_path: Path) -> None:
    path = fifo(tmp_path / "c", b"a\n")
    [copy] = keep([path], tmp_path / "corpus", never) or ()
    before = copy.stat()
    [copy] = keep([again(path, b"a\n")], tmp_path / "corpus", never) or ()
    assert (copy.stat().st_mtime_ns, copy.stat().st_ino) == (before.st_mtime_ns, before.st_ino)


def test_other_content_leaves_the_earlier_copy_until_it_is_forgotten(tmp_path: Path) -> None:
    path = fifo(tmp_path / "c", b"a\n")
    [one] = keep([path], tmp_path / "corpus", never) or ()
    [other] = keep([again(path, b"b\n")], tmp_path / "corpus", never) or ()
    assert (one.read_bytes(), other.read_bytes()) == (b"a\n", b"b\n")
    forget(tmp_path / "corpus", [other])
    assert [path for path in (tmp_path / "corpus").rglob("*") if path.is_file()] == [other]


def test_a_pipe_without_a_byte_stands_for_what_it_gave_before(tmp_path: Path) -> None:
    path = fifo(tmp_path / "c", b"a\n")
    first = keep([path], tmp_path / "corpus", never)
    assert keep([again(path)], tmp_path / "corpus", never) == first


def test_the_null_device_is_an_empty_pipe(tmp_path: Path) -> None:
    first = keep([fifo(tmp_path / "null", b"a\n")], tmp_path / "corpus", never)
    assert keep([Path("/dev/null")], tmp_path / "corpus", never) == first


def test_forgetting_touches_nothing_else(tmp_path: Path) -> None:
    (tmp_path / "corpus" / "mine").mkdir(parents=True)
    mine = tmp_path / "corpus" / "mine" / "c.jsonl"
    mine.write_bytes(b"a\n")
    forget(tmp_path / "corpus", [])
    assert mine.exists()


@pytest.mark.parametrize("written", [None, b"a\n"])
def test_waiting_for_a_writer_is_given_up_when_asked(tmp_path: Path, written: bytes | None) -> None:
    path = tmp_path / "c"
    os.mkfifo(path)
    holding = os.open(path, os.O_RDWR)  # a writer that never closes
    if written is None:
        os.close(holding)
    else:
        os.write(holding, written)
    assert keep([path], tmp_path / "corpus", after(4)) is None
    assert list((tmp_path / "corpus").iterdir()) == []
    if written is not None:
        os.close(holding)


def test_a_device_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CorpusError, match=r'corpus "/dev/zero" is a device .* give a JSONL file'):
        keep([Path("/dev/zero")], tmp_path / "corpus", never)


@pytest.mark.parametrize(
    ("name", "pipe", "nameless"), [("/dev/stdin", True, True), ("/dev/fd/63", True, True), ("/dev/zero", True, False)]
)
def test_what_can_be_read_but_once_is_told_by_its_name(name: str, pipe: bool, nameless: bool) -> None:
    assert (is_pipe(Path(name)), is_nameless(Path(name))) == (pipe, nameless)
