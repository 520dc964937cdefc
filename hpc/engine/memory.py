"""How much memory a rank may use for keys and values."""

import os
from pathlib import Path

import torch

SHARE = 0.8
"""Part of what is left that the cache may have; the rest is for what a step computes."""


def cache_bytes(device: torch.device, ranks_on_node: int) -> int:
    """Return the bytes that the cache of one rank may have, its model being loaded."""
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        return int(free * SHARE)
    # Not what is free now: the other ranks of the node may not have loaded their models yet.
    return max(0, int((limit() / ranks_on_node - resident()) * SHARE))


def device_bytes(device: torch.device, ranks_on_node: int) -> int:
    """Return the memory that a rank may have in all."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[1])
    return limit() // ranks_on_node


def limit() -> int:
    """Return the memory that this process and its neighbours may use: the machine's, or its control group's."""
    most = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    for path in _group_files():
        try:
            most = min(most, int(path.read_text()))
        except (OSError, ValueError):  # not there, or "max"
            continue
    return most


def resident() -> int:
    """Return the memory that this process has now."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def _group_files() -> list[Path]:
    """Return the files that limit the memory of this control group and of those above it, both versions."""
    root = Path("/sys/fs/cgroup")
    files = [root / "memory.max", root / "memory/memory.limit_in_bytes"]
    try:
        lines = Path("/proc/self/cgroup").read_text().splitlines()
    except OSError:
        return files
    for line in lines:
        _, controllers, name = line.split(":", 2)
        folders = [Path(name.lstrip("/")), *Path(name.lstrip("/")).parents]
        if not controllers:
            files += [root / folder / "memory.max" for folder in folders]
        elif "memory" in controllers.split(","):
            files += [root / "memory" / folder / "memory.limit_in_bytes" for folder in folders]
    return files
