"""Write files that exist completely or not at all: write aside, then rename."""

import os
import socket
from pathlib import Path


def aside(path: Path) -> Path:
    """Return the temporary name of a file until `finish` renames it."""
    return path.with_name(path.name + ".part")


def finish(path: Path, written: Path | None = None) -> None:
    """Sync the temporary file to the disk, rename it to `path`, and sync the rename."""
    written = written or aside(path)
    force(written)
    os.replace(written, path)
    force(path.parent)


def write(path: Path, text: str) -> None:
    """Write a small file. If several processes write it, the last one wins."""
    own = path.with_name(f"{path.name}.{socket.gethostname()}-{os.getpid()}.part")
    own.write_text(text, encoding="utf-8")
    finish(path, own)


def force(path: Path) -> None:
    """Sync a file, or the names in a folder, to the disk."""
    file = os.open(path, os.O_RDONLY)
    try:
        os.fsync(file)
    finally:
        os.close(file)
