"""A rank's folder for what must not outlive it: temporary files, and the names of shared memory that it holds.

A process that is killed removes nothing: what it left is removed by the next one on the node, and by
the batch script. Whether it is still alive its lock says, which the system drops with it.
"""

import contextlib
import fcntl
import os
import re
import shutil
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path

PREFIX = "scattergen-rank-"
LIST, LOCK = "shared-memory", "lock"
"""Files of a folder: the paths of the shared memory that its rank and the rank's workers hold; what is locked."""
SHARED = Path("/dev/shm")
KINDS = ("psm_", "sem.mp-")
"""How the names of shared memory begin that Python makes; MPI sees to its own."""
OPENMP = "__KMP_REGISTERED_LIB_{pid}_{uid}"
"""What Intel's OpenMP makes, and does not keep mapped."""
MOST_CHARACTERS = 45
"""Of a parent: the path of a socket has 107 at most, and those below it have names of their own."""
LOOK_S = 0.5
"""How often a rank looks at what it holds, while that changes."""


class Scratch:
    """The folder of this process below `parent`, where others of this user that nobody has now are removed.

    Below /tmp if the name of `parent` is long.
    """

    def __init__(self, parent: Path) -> None:
        if len(str(parent)) > MOST_CHARACTERS:
            parent = Path("/tmp")
        parent.mkdir(parents=True, exist_ok=True)
        sweep(parent)
        self.path = Path(tempfile.mkdtemp(prefix=PREFIX, dir=parent))
        self._lock = os.open(self.path / LOCK, os.O_RDWR | os.O_CREAT, 0o600)
        fcntl.flock(self._lock, fcntl.LOCK_EX)

    def note(self) -> None:
        """Write down which shared memory this process and its children hold now."""
        (self.path / LIST).write_text("".join(f"{path}\n" for path in sorted(shared_memory(os.getpid()))))

    @contextlib.contextmanager
    def noting(self) -> Iterator[None]:
        """Note again and again what is held, while the body runs, and once after it."""
        over = threading.Event()

        def look() -> None:
            while not over.wait(LOOK_S):
                self.note()

        thread = threading.Thread(target=look, daemon=True)
        thread.start()
        try:
            yield
        finally:
            over.set()
            thread.join()
            self.note()

    def remove(self) -> None:
        """Remove the folder: this process ends, and clears away its shared memory by itself."""
        shutil.rmtree(self.path, ignore_errors=True)
        os.close(self._lock)


def sweep(parent: Path) -> list[Path]:
    """Remove what processes of this user left that have ended; return their folders."""
    swept = []
    for folder in parent.glob(f"{PREFIX}*"):
        with contextlib.suppress(OSError):  # somebody else's, or another process is faster
            if folder.stat().st_uid != os.getuid():
                continue
            lock = os.open(folder / LOCK, os.O_RDWR)
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                remove_shared_memory(folder)
                shutil.rmtree(folder)
                swept.append(folder)
            finally:
                os.close(lock)
    return swept


def remove_shared_memory(folder: Path) -> None:
    """Remove the shared memory that a folder lists and that still belongs to this user."""
    with contextlib.suppress(FileNotFoundError):
        for line in (folder / LIST).read_text().splitlines():
            path = Path(line)
            with contextlib.suppress(OSError):
                if path.parent == SHARED and path.stat().st_uid == os.getuid():
                    path.unlink()


def shared_memory(pid: int) -> set[Path]:
    """Return the files of shared memory that a process and its descendants hold."""
    openmp = SHARED / OPENMP.format(pid=pid, uid=os.getuid())
    found = {openmp} if openmp.exists() else set()
    with contextlib.suppress(OSError):  # it has ended
        text = Path(f"/proc/{pid}/maps").read_text()
        paths = re.findall(rf" ({SHARED}/\S+)$", text, re.MULTILINE)
        found |= {Path(path) for path in paths if path.rpartition("/")[2].startswith(KINDS)}
        for children in Path(f"/proc/{pid}/task").glob("*/children"):
            for child in children.read_text().split():
                found |= shared_memory(int(child))
    return found
