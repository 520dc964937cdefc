"""Compile the kernel for this CPU with the machine's own compiler, once, into the user's cache.

Without a compiler torch computes everything, more slowly.
"""

import contextlib
import ctypes
import fcntl
import hashlib
import logging
import os
import platform
import shutil
import subprocess
import tempfile
from pathlib import Path
from typing import Any

from hpc.engine.kernel.kernel import Kernel

LOGGER = logging.getLogger(__name__)


FLAGS = ("-O3", "-march=native", "-std=c++17", "-fopenmp", "-shared", "-fPIC")
_SOURCE = Path(__file__).with_name("kernel.cpp")


def load(cache: Path) -> Kernel | None:
    """Return the kernel, compiled into the folder `cache` if it is missing there; None if it cannot be compiled."""
    compiler = os.environ.get("CXX") or next(filter(None, map(shutil.which, ("g++", "c++", "clang++"))), None)
    if compiler is None:
        LOGGER.info("no C++ compiler was found: attention and matrix products are torch's, and slower")
        return None
    try:
        return Kernel(ctypes.CDLL(str(_built(compiler, cache))))
    except (OSError, subprocess.SubprocessError) as error:
        detail = getattr(error, "stderr", None) or error
        LOGGER.warning("%s cannot build the kernel, torch's slower functions take its place: %s", compiler, detail)
        return None


def _identity(compiler: str) -> str:
    """Return a hash of all that the binary depends on: machines with different CPUs may share a home folder."""
    sources = [path.read_text() for path in sorted(_SOURCE.parent.glob("*.[ch]pp"))]
    flags = platform.machine()
    with contextlib.suppress(OSError):
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        flags += next((line for line in lines if line.startswith(("flags", "Features"))), "")
    text = "\0".join([*sources, *FLAGS, compiler, flags])
    return _digest(text.encode())


def _built(compiler: str, cache: Path) -> Path:
    """Return the library, compiled now if it is missing. Its name ends with a hash of its content."""
    cache.mkdir(parents=True, exist_ok=True)
    name = f"kernel-{_identity(compiler)}"
    with (cache / f"{name}.lock").open("w") as lock:
        with contextlib.suppress(OSError):  # a file system without locks: then several ranks build, each aside
            fcntl.flock(lock, fcntl.LOCK_EX)
        for path in cache.glob(f"{name}-*.so"):
            if path.stem.endswith(_digest(path.read_bytes())):  # to load half a library kills the process
                return path
        LOGGER.info("building the kernel for this CPU with %s, once", compiler)
        with tempfile.TemporaryDirectory(dir=cache) as folder:
            aside = Path(folder, name)
            command: list[Any] = [compiler, *FLAGS, "-o", aside, _SOURCE]
            subprocess.run(command, check=True, capture_output=True, text=True, timeout=300)
            return aside.rename(cache / f"{name}-{_digest(aside.read_bytes())}.so")


def _digest(content: bytes) -> str:
    return hashlib.blake2b(content, digest_size=8).hexdigest()
