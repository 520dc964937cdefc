"""Limits of an engine, size of a replica and speed of a device, for plan and forecast."""

from dataclasses import dataclass

CPU_STEP_TOKENS = 512
"""Prompt tokens of a step on a CPU: enough to be bound by arithmetic, and decoding rows do not wait long."""


@dataclass(frozen=True)
class Size:
    """Memory of a replica, and the arithmetic of a token."""

    weight_bytes: int
    token_flops: float
    """Floating-point operations of a token in the layers without attention: two for each weight that it meets."""
    choice_flops: float
    """Floating-point operations in the head for a token that is chosen."""
    memory_bytes: int
    """Memory that its rank may use in all, of the device or of the node."""


@dataclass(frozen=True)
class Speed:
    """Peak speed of the device, with as many ranks at work as the node has."""

    bytes_per_s: float
    """Bytes read from memory per second."""
    flops_per_s: float
    """Operations per second in products of matrices."""


MAX_SEQS, MAX_SEQS_GPU = 128, 256
"""Default number of live sequences of a rank on CPU cores and on a GPU: beyond these a step gets longer with each."""


def seqs_at_once(max_num_seqs: int, gpu: bool) -> int:
    """Return the number of live sequences of a rank: the job's `max_num_seqs`, or the default where that is 0."""
    return max_num_seqs or (MAX_SEQS_GPU if gpu else MAX_SEQS)


def evenly(heads: int | None, kv_heads: int | None, devices: int) -> bool:
    """Return whether devices can share the attention heads of a model, and those of its keys and values; None: any.

    A head of keys and values may be on several devices, but then each is on as many.
    """
    shared = kv_heads or devices
    return (heads or devices) % devices == 0 and (shared % devices == 0 or devices % shared == 0)


@dataclass(frozen=True)
class Bounds:
    """Limits of an engine's steps and of its KV cache."""

    max_seqs: int
    step_tokens: int
    cache_tokens: int
    """Tokens that the KV cache holds."""
    token_bytes: int = 0
    """Bytes of the keys and values of one token."""
    refill: float = 0.0
    """See `hpc.engine.admission.Gate`."""
