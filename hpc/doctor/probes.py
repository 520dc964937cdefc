"""Gather the facts of one rank: folders, torch, vLLM, caches, clock. Judges none of them."""

import contextlib
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from hpc.doctor.diagnose import Facts
from hpc.engine.vllm import installed
from hpc.mpi.comm import wait_for

SHARED_S, TORCH_S = 2.0, 8.0
"""Seconds that a rank waits for rank 0's file, and for torch's import: together less than `LIMIT_S - PREPARE_S`."""
ASK_VLLM = """
import vllm
from vllm import EngineArgs
"""

ASK_TORCH = """
import torch
try:
    torch.cuda.init()
except Exception as error:
    print(str(error).strip().splitlines()[0])
"""


def leave_file(folder: Path, rank: int, patience_s: float = SHARED_S) -> str:
    """Write the rank's file beside rank 0's nonce, once that is seen; return the obstacle, or an empty text."""
    until = time.monotonic() + patience_s

    def seen() -> bool:
        with contextlib.suppress(OSError):
            return (folder / "nonce").read_text() == folder.name
        return False

    wait_for(lambda: seen() or time.monotonic() > until)  # attributes on NFS are some seconds old
    if not seen():
        return f"{folder.parent} has not what rank 0 wrote into it"
    try:
        (folder / str(rank)).write_text(folder.name)
    except OSError as error:
        return f"{folder.parent} cannot be written: {error.strerror}"
    return ""


def ask_vllm() -> str | None:
    """Return why vLLM cannot be used, an empty text if it can, None if its import takes too long."""
    return installed.untested(installed.version()) or ask(ASK_VLLM)


def ask(question: str) -> str | None:
    """Run a Python program; return its last line (an error), an empty text without one, None if it takes too long.

    It runs in another process: an import from a cold file system cannot be interrupted in this one.
    """
    try:
        asked = subprocess.run(
            [sys.executable, "-c", question], capture_output=True, text=True, timeout=TORCH_S, stdin=subprocess.DEVNULL
        )
    except (OSError, subprocess.SubprocessError):
        return None
    said = (asked.stdout or asked.stderr * bool(asked.returncode)).strip().splitlines()
    return said[-1] if said else ""


def try_cache(name: str, path: str) -> Facts:
    """Make a cache directory if it is missing; return the type of its file system, or why it cannot be written."""
    try:
        Path(path).mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=path) as file:
            file.write(b"x")
        kind = file_system(Path(path).resolve(), Path("/proc/self/mounts").read_text())
    except OSError as error:
        return {"name": name, "path": path, "type": "", "error": error.strerror}
    return {"name": name, "path": path, "type": kind, "error": ""}


def file_system(path: Path, mounts: str) -> str:
    """Return the type of the file system of an absolute path, given the text of /proc/self/mounts."""
    longest, found = 0, ""
    for line in mounts.splitlines():
        point, kind = line.split(" ")[1:3]
        point = re.sub(r"\\([0-7]{3})", lambda code: chr(int(code[1], 8)), point)
        if path.is_relative_to(point) and len(point) >= longest:  # of several at one point the last one counts
            longest, found = len(point), kind
    return found


def read_ends(path: Path) -> Facts:
    """Read a model's configuration and the ends of its weight files; return their number and bytes, or the error."""
    try:
        (path / "config.json").read_bytes()
        files = [file for file in path.iterdir() if file.suffix in (".safetensors", ".bin")]
        for file in files:
            with open(file, "rb") as opened:
                opened.read(1)
                opened.seek(max(0, file.stat().st_size - 1))
                opened.read(1)
        return {"files": len(files), "bytes": sum(file.stat().st_size for file in files), "error": ""}
    except OSError as error:
        return {"files": 0, "bytes": 0, "error": f"{error.strerror}: {error.filename}"}


def clock_offset(asked: float, received: float, sent: float, answered: float) -> tuple[float, float]:
    """Return by how many seconds a rank's clock is ahead of rank 0's, and the maximum error of that.

    As in RFC 5905, section 8. `received` and `sent` are of the rank's clock, `asked` and `answered` of rank 0's.
    """
    return (received - asked + sent - answered) / 2, abs(answered - asked - (sent - received)) / 2
