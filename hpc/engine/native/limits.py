"""How much a step and the cache of the native engine may hold."""

from dataclasses import dataclass


@dataclass(frozen=True)
class EngineLimits:
    """How much a step and the cache may hold."""

    max_seqs: int
    """Most sequences that live at a time."""
    step_tokens: int
    """Prompt tokens after which a step takes no further chunk."""
    cache_bytes: int
    """Memory for keys and values; on a GPU 0 stands for what the largest step and the graphs leave."""
    context_tokens: int = 4096
    """Most tokens of a sequence."""
    deterministic: bool = False
    """On a GPU: compute every step in one of two fixed sizes, so that rounding does not depend on the batch."""
    refill: float = 0.0
    """Share of the sequences that must have ended before others begin; see `hpc.engine.admission.Gate`."""
    share_from: int | None = None
    """On a GPU, tokens from which on a shared prefix is read where it lies; None: each sequence has a copy of it."""
    drafts: bool = False
    """Guess tokens of greedy rows; only where what is computed does not depend on the batch."""
