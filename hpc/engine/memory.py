"""Decide how much memory a rank may use for its KV cache: on a GPU, what the largest step leaves."""

import gc
import logging
import os
from collections.abc import Callable
from pathlib import Path

import torch

from hpc.engine.failure import is_out_of_memory

LOGGER = logging.getLogger(__name__)


SHARE = 0.8
"""Share of the free memory that the cache may take; the rest is for what a step computes."""
MARGIN = 0.02
"""Share of a GPU's memory that stays unused, for fragmentation and for kernels loaded later."""


def gpu_cache_bytes(device: torch.device, step: Callable[[], object], graphs: Callable[[], object]) -> int:
    """Return the bytes that the cache may take on a GPU after the model is loaded.

    `step` computes the step with the largest memory, `graphs` returns captured CUDA graphs; both use a tiny cache.
    """
    free, total = _free(device)
    torch.cuda.reset_peak_memory_stats(device)
    held = torch.cuda.memory_reserved(device)
    try:
        step()
        computing = torch.cuda.max_memory_reserved(device) - held
        before, _ = _free(device)
        captured = graphs()
        capturing = before - _free(device)[0]
        del captured
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        computing = capturing = -1
    if computing < 0:  # steps will be halved
        return int(_free(device)[0] * SHARE / 2)
    LOGGER.debug("of %d bytes a step takes %d, and graphs %d", free, computing, capturing)
    return max(0, _free(device)[0] - computing - capturing - int(MARGIN * total))


def _free(device: torch.device) -> tuple[int, int]:
    gc.collect()
    torch.cuda.empty_cache()
    return torch.cuda.mem_get_info(device)


def cache_bytes(ranks_on_node: int) -> int:
    """Return the bytes that the cache of one rank may take on a CPU after its model is loaded."""
    # Not what is free now: the other ranks of the node may not have loaded their models yet.
    return max(0, int((limit() / ranks_on_node - resident()) * SHARE))


def device_bytes(device: torch.device, ranks_on_node: int) -> int:
    """Return the bytes that a rank may use in all."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[1])
    return limit() // ranks_on_node


def limit() -> int:
    """Return the bytes that this process and its neighbours may use: the machine's, or its control group's limit."""
    maximum = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    for path in _group_files():
        try:
            maximum = min(maximum, int(path.read_text()))
        except (OSError, ValueError):  # not there, or "max"
            continue
    return maximum


def resident() -> int:
    """Return the resident bytes of this process."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def _group_files() -> list[Path]:
    """Return the files with the memory limits of this control group and its parents, of cgroup versions 1 and 2."""
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


def free() -> None:
    """Free the memory of dropped objects, such as a model before another is loaded."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
