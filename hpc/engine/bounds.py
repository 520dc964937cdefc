"""The limits of an engine, the size of a replica and the speed of a device, as plan and forecast need them."""

from dataclasses import dataclass

CPU_STEP_TOKENS = 512
"""Prompt tokens of a step on a CPU; a GPU's has more."""


@dataclass(frozen=True)
class Size:
    """What a replica holds, and what a token costs at the least."""

    weight_bytes: int
    token_flops: float
    """Operations for a token in the layers, attention apart: two for each weight that it meets."""
    choice_flops: float
    """Operations in the head for a token that is chosen."""
    memory_bytes: int
    """What its rank may have in all, of the device or of the node's memory."""


@dataclass(frozen=True)
class Speed:
    """What the device can do at most, with as many ranks at work as the node has."""

    bytes_per_s: float
    """Reading memory."""
    flops_per_s: float
    """Multiplying matrices."""


MAX_SEQS, MAX_SEQS_GPU = 128, 256
"""Sequences that a rank has under way at once where the job does not say, on cores and on a GPU."""


def seqs_at_once(max_num_seqs: int, gpu: bool) -> int:
    """Return how many sequences a rank has under way at once; `max_num_seqs` is the job's, 0 leaves it to us."""
    return max_num_seqs or (MAX_SEQS_GPU if gpu else MAX_SEQS)


@dataclass(frozen=True)
class Bounds:
    """What bounds the steps of an engine."""

    max_seqs: int
    step_tokens: int
    cache_tokens: int
    """Tokens whose keys and values there is memory for."""
    token_bytes: int = 0
    """What the keys and values of a token take."""
    refill: float = 0.0
    """See `hpc.engine.admission.Gate`."""
