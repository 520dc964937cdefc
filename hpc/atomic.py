"""Files that are there whole or not at all: written aside, then renamed into place."""

import os
from pathlib import Path


def aside(path: Path) -> Path:
    """Return the name under which a file is written before `finish` puts it in place."""
    return path.with_name(path.name + ".part")


def finish(path: Path) -> None:
    """Force what was written aside to the disk, rename it to `path`, and force the rename too."""
    force(aside(path))
    os.replace(aside(path), path)
    force(path.parent)


def write(path: Path, text: str) -> None:
    """Write a small file."""
    aside(path).write_text(text, encoding="utf-8")
    finish(path)


def force(path: Path) -> None:
    """Force a file, or the names in a folder, to the disk."""
    file = os.open(path, os.O_RDONLY)
    try:
        os.fsync(file)
    finally:
        os.close(file)
