"""What a layer's attention is: the shape of its keys and values, its scale, window, cap and sinks."""

from dataclasses import dataclass

import torch

from hpc.engine.alibi import Alibi


@dataclass(frozen=True)
class KVShape:
    """The shapes [heads, dim] of the key and the value that a layer stores for a token."""

    key: tuple[int, int]
    value: tuple[int, int]


@dataclass(frozen=True)
class AttentionSpec:
    """What a layer stores for a token, and the parameters of its attention."""

    layout: KVShape
    scale: float
    window: int = 0
    """Number of latest tokens that a query attends to (sliding window); 0: all."""
    softcap: float = 0.0
    """Scores x become cap * tanh(x / cap) with this cap; 0: they stay."""
    sinks: torch.Tensor | None = None
    """[query heads]: the score of attending to no key (attention sinks)."""
    alibi: Alibi | None = None
    """The bias that the position of a key adds to its score."""
