"""List the GPUs that this process may use: their names, and the variables that make only one of them visible.

Does not import torch, which reads these variables once, at its import.
"""

import re
import shutil
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

CUDA, HIP, ROCR = "CUDA_VISIBLE_DEVICES", "HIP_VISIBLE_DEVICES", "ROCR_VISIBLE_DEVICES"


@dataclass(frozen=True)
class Gpus:
    """GPUs in the order in which CUDA, or HIP, counts them."""

    names: tuple[str, ...] = ()
    """Names that are unique on the node, UUIDs if known; "" where another rank may give another GPU the same name."""
    tokens: tuple[str, ...] = ()
    """The value for each GPU in the variables."""
    variables: tuple[str, ...] = (CUDA,)
    """The variables that make only those GPUs visible whose tokens they list."""


def here(environment: Mapping[str, str]) -> Gpus:
    """Return the GPUs that this process may use."""
    listed = listing(_nvidia_smi())
    amd = [] if listed else kfd_gpus(Path("/sys/class/kfd/kfd/topology/nodes"))
    if amd or (not listed and {HIP, ROCR} & set(environment)):
        return amd_gpus(environment, amd)
    files = sorted((path.name for path in Path("/dev").glob("nvidia[0-9]*")), key=lambda name: int(name[6:]))
    return nvidia_gpus(environment.get(CUDA), listed, files)


def listing(text: str) -> list[list[str]]:
    """Parse the output of `nvidia-smi -L`: for each GPU its UUID, or the UUIDs of its MIG instances."""
    found: list[list[str]] = []
    whole = True
    for line in text.splitlines():
        if named := re.search(r"\(UUID: (GPU-[^)\s]+)\)", line):
            found.append([named[1]])
            whole = True
        elif (part := re.search(r"\(UUID: (MIG-[^)\s]+)\)", line)) and found:
            found[-1] = [part[1]] if whole else [*found[-1], part[1]]
            whole = False
    return found


def nvidia_gpus(visible: str | None, listed: Sequence[Sequence[str]], files: Sequence[str] = ()) -> Gpus:
    """Return the GPUs that CUDA_VISIBLE_DEVICES makes visible, or all if it is not set.

    `listed` has the GPUs that the driver shows this process: if control groups hide the others, index 0 is a
    different GPU for each rank. If it is empty, the device files tell the number of GPUs.
    """
    parts = [part for gpu in listed for part in gpu]
    if visible is None:
        if parts:
            return Gpus(tuple(parts), tuple(parts))
        return Gpus(tuple(files), tuple(str(index) for index in range(len(files))))
    # CUDA shows of a GPU that is cut into parts the first, if it is asked for by index.
    indexed = [gpu[0] for gpu in listed]
    whole = [gpu[0] for gpu in listed if gpu[0].startswith("GPU-")]
    tokens = _valid(visible, len(listed) or None)
    names = [_name(token, indexed, [*whole, *parts]) for token in tokens]
    # A UUID in full: not everybody knows what its beginning stands for.
    full = [token if token.isdigit() else name for token, name in zip(tokens, names, strict=True)]
    if not listed and len(tokens) == 1 and tokens[0].isdigit():  # control groups may hide others from this rank
        names = [""]
    return Gpus(tuple(names), tuple(full))


def amd_gpus(environment: Mapping[str, str], listed: Sequence[str]) -> Gpus:
    """Return the GPUs that HIP makes visible: ROCR_VISIBLE_DEVICES filters first, then HIP_VISIBLE_DEVICES.

    HIP reads CUDA_VISIBLE_DEVICES if its own variable is missing, and torch requires both to be equal.
    """
    low = environment.get(ROCR)
    names = list(listed) if low is None else [_name(token, listed, listed) for token in _valid(low)]
    variables = (HIP, CUDA) if CUDA in environment else (HIP,)
    high = environment.get(HIP, environment.get(CUDA))
    if high is None:
        return Gpus(tuple(names), tuple(str(index) for index in range(len(names))), variables)
    tokens = _valid(high)
    return Gpus(tuple(_name(token, names, names) for token in tokens), tuple(tokens), variables)


def kfd_gpus(folder: Path) -> list[str]:
    """Return the AMD GPUs that the kernel lists and this process may read; entries without SIMD units are CPUs."""
    found = []
    for node in sorted(folder.glob("[0-9]*"), key=lambda path: int(path.name)):
        try:
            lines = (node / "properties").read_text().splitlines()
        except OSError:  # another process's
            continue
        values = dict(line.split(" ", 1) for line in lines if " " in line)
        if int(values.get("simd_count", 0)):
            unique = int(values.get("unique_id", 0))
            found.append(f"GPU-{unique:016x}" if unique else f"kfd{node.name}")
    return found


def _valid(visible: str, count: int | None = None) -> list[str]:
    """Return the tokens before the first invalid one, or the first index beyond `count` GPUs, as CUDA does."""
    tokens: list[str] = []
    for token in (text.strip() for text in visible.split(",")):
        if not (token.isdigit() or token.startswith(("GPU-", "MIG-"))):
            break
        if token.isdigit() and count is not None and int(token) >= count:
            break
        tokens.append(token)
    return tokens


def _name(token: str, indexed: Sequence[str], uuids: Sequence[str]) -> str:
    """Return the name of the GPU that a token selects: an index, a UUID, or a unique beginning of one."""
    if token.isdigit():
        return indexed[int(token)] if int(token) < len(indexed) else token
    begin = sorted({uuid for uuid in uuids if uuid.lower().startswith(token.lower())})
    return begin[0] if len(begin) == 1 else token


def _nvidia_smi() -> str:
    """Return the output of `nvidia-smi -L`; empty if it fails. A rank without work never imports torch."""
    if shutil.which("nvidia-smi") is None:
        return ""
    try:
        asked = subprocess.run(
            ["nvidia-smi", "-L"], capture_output=True, text=True, timeout=30, check=True, stdin=subprocess.DEVNULL
        )
    except (OSError, subprocess.SubprocessError):
        return ""
    return asked.stdout
