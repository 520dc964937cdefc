"""Keep a rank's temporary files, and the names of its shared memory, in a folder that can be removed after its death.

A killed process removes nothing: the next one on the node does, and so does the batch script. A lock on the folder
tells whether its process lives, since the system releases it at the process' end.
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
"""Files of a folder: the list of the shared memory of the rank and its workers, and the file that is locked."""
SHARED = Path("/dev/shm")
KINDS = ("psm_", "sem.mp-", "vllm_dist_")
"""Prefixes of the names of shared memory: Python's, and that of vLLM's processes on a CPU; MPI removes its own."""
OPENMP = "__KMP_REGISTERED_LIB_{pid}_{uid}"
"""Shared memory of Intel's OpenMP, which it does not keep mapped."""
MAX_PARENT_CHARACTERS = 45
"""Longest path of a parent: that of a socket has at most 107 characters, and 62 are for the folder and its name."""
LOOK_S = 0.5
"""Seconds between two looks at the rank's shared memory while vLLM starts; a look reads a few files of /proc."""


class Scratch:
    """The folder of this process below `parent`, or below /tmp if that path is long.

    Removes the folders of this user whose processes have ended.
    """

    def __init__(self, parent: Path) -> None:
        if len(str(parent)) > MAX_PARENT_CHARACTERS:
            parent = Path("/tmp")
        parent.mkdir(parents=True, exist_ok=True)
        sweep(parent)
        self.path = Path(tempfile.mkdtemp(prefix=PREFIX, dir=parent))
        self._lock = os.open(self.path / LOCK, os.O_RDWR | os.O_CREAT, 0o600)
        fcntl.flock(self._lock, fcntl.LOCK_EX)

    def note(self) -> None:
        """Write the list of the shared memory that this process and its children hold now."""
        (self.path / LIST).write_text("".join(f"{path}\n" for path in sorted(shared_memory(os.getpid()))))

    @contextlib.contextmanager
    def noting(self) -> Iterator[None]:
        """Update the list every `LOOK_S` seconds while the body runs, and once after it."""
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
        """Remove the folder at the end of this process, which removes its shared memory by itself."""
        shutil.rmtree(self.path, ignore_errors=True)
        os.close(self._lock)


def sweep(parent: Path) -> list[Path]:
    """Remove the folders and shared memory of ended processes of this user; return the folders."""
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
