"""Files that are there whole or not at all: written aside, then renamed into place."""

import os
import socket
from pathlib import Path


def aside(path: Path) -> Path:
    """Return the name under which a file is written before `finish` puts it in place."""
    return path.with_name(path.name + ".part")


def finish(path: Path, written: Path | None = None) -> None:
    """Force what was written aside to the disk, rename it to `path`, and force the rename too."""
    written = written or aside(path)
    force(written)
    os.replace(written, path)
    force(path.parent)


def write(path: Path, text: str) -> None:
    """Write a small file, which other processes may be writing too: the last one stays."""
    own = path.with_name(f"{path.name}.{socket.gethostname()}-{os.getpid()}.part")
    own.write_text(text, encoding="utf-8")
    finish(path, own)


def force(path: Path) -> None:
    """Force a file, or the names in a folder, to the disk."""
    file = os.open(path, os.O_RDONLY)
    try:
        os.fsync(file)
    finally:
        os.close(file)
