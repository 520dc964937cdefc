"""Choose the device and the dtype of a model."""

import platform
from pathlib import Path

import torch


def cpu_name() -> str:
    """Return the name of this machine's processor."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


def resolve_device(device: str, index: int) -> torch.device:
    """Return the device of a rank: the only GPU that it sees, or the one of its index among several.

    Raises `ValueError` if CUDA is asked for and no GPU is seen, or if several are seen and fewer than the ranks.
    """
    if device == "cpu" or (device == "auto" and not torch.cuda.is_available()):
        return torch.device("cpu")
    if not torch.cuda.is_available():
        raise ValueError('"device" is "cuda", but this process sees no CUDA GPU; check the allocation, or use auto')
    count = torch.cuda.device_count()
    if index >= count > 1:
        raise ValueError(
            f"this is rank {index + 1} of its node, and torch sees {count} GPUs there; start one rank for each GPU of "
            "a node (--slurm.tasks-per-node, mpirun -n), or add --device cpu"
        )
    return torch.device("cuda", 0 if count == 1 else index)


def gpu_uuids(device: torch.device, count: int = 1) -> str:
    """Return the UUIDs of `count` GPUs from a device on, separated by commas; empty for a CPU, or if torch has none."""
    if device.type != "cuda":
        return ""
    first = device.index or 0
    found = [torch.cuda.get_device_properties(index) for index in range(first, first + count)]
    return ",".join(str(one.uuid) for one in found if hasattr(one, "uuid"))


def gpu_bytes() -> int | None:
    """Return the memory of the first GPU that this process sees; None where it sees none."""
    return int(torch.cuda.mem_get_info(0)[1]) if torch.cuda.is_available() else None


def device_name(device: torch.device) -> str:
    """Return the product name of a GPU."""
    return str(torch.cuda.get_device_name(device))


def resolve_dtype(dtype: str, device: str) -> str:
    """Return the type that "auto" stands for: bfloat16 on GPUs that have it, float32 on CPUs."""
    if dtype != "auto":
        return dtype
    if resolve_device(device, 0).type == "cpu":
        return "float32"
    # Not where it is emulated, as on a V100 or T4: several times slower.
    return "bfloat16" if torch.cuda.is_bf16_supported(including_emulation=False) else "float16"
