"""scattergen: completions for a large prompt corpus on every GPU of a Slurm allocation."""

from hpc.cli import main
from hpc.engine_args import Vllm
from hpc.job import Job, Slurm
from hpc.sampling_params import SamplingParams

__all__ = ["Job", "SamplingParams", "Slurm", "Vllm", "main"]
