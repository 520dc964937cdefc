"""The limits of the native engine: how much a step and its KV cache hold."""

from dataclasses import dataclass


@dataclass(frozen=True)
class EngineLimits:
    """How much a step and the KV cache hold."""

    max_seqs: int
    """Maximum number of live sequences."""
    step_tokens: int
    """Number of prompt tokens after which a step takes no further chunk."""
    cache_bytes: int
    """Memory of the KV cache; on a GPU 0 stands for what the largest step and the CUDA graphs leave."""
    context_tokens: int = 4096
    """Maximum number of tokens of a sequence."""
    deterministic: bool = False
    """On a GPU: compute every step in one of two fixed sizes, so that rounding does not depend on the batch."""
    refill: float = 0.0
    """Share of the sequences that must have ended before others begin; see `hpc.engine.admission.Gate`."""
    share_from: int | None = None
    """On a GPU, tokens from which on a shared prefix is read where it lies; None: each sequence has a copy of it."""
    long_from: int = 0
    """Tokens beyond which a sequence is computed anew, with the frequencies for long ones; 0: there are no others."""
    drafts: bool = False
    """Compute draft tokens of greedy rows; only where a row does not depend on the batch."""
