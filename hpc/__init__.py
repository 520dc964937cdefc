"""scattergen: completions for a large prompt corpus on every GPU of a Slurm allocation."""

import importlib
from typing import TYPE_CHECKING, Any

from hpc.engine_args import Vllm
from hpc.exit import Refusal, Unfinished
from hpc.job import Job, Slurm
from hpc.sampling_params import SamplingParams

if TYPE_CHECKING:
    from hpc.api.completion import Completion
    from hpc.api.generate import generate
    from hpc.api.generator import Generator
    from hpc.api.read import read_run
    from hpc.api.run import run
    from hpc.cli.main import main

__all__ = [
    "Completion", "Generator", "Job", "Refusal", "SamplingParams", "Slurm", "Unfinished", "Vllm", "generate", "main",
    "read_run", "run",
]  # fmt: skip

_LATER = {
    "Completion": "hpc.api.completion",
    "Generator": "hpc.api.generator",
    "generate": "hpc.api.generate",
    "main": "hpc.cli.main",
    "read_run": "hpc.api.read",
    "run": "hpc.api.run",
}
"""Names that are imported when they are first asked for, with the module of each: a job file needs few of them."""


def __getattr__(name: str) -> Any:
    """Import a name of `_LATER`."""
    if name not in _LATER:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(_LATER[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
