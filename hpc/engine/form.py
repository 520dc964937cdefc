"""How a layer attends: the shape of its keys and values, its scale, window, cap and sinks."""

from dataclasses import dataclass

import torch

from hpc.engine.alibi import Alibi


@dataclass(frozen=True)
class KVShape:
    """What a layer keeps of a token: shapes [heads, dim] of its key and its value."""

    key: tuple[int, int]
    value: tuple[int, int]


@dataclass(frozen=True)
class AttentionSpec:
    """How a layer attends: what it keeps of a token, and what it tells its attention function."""

    layout: KVShape
    scale: float
    window: int = 0
    """How many of the latest tokens it looks at; 0: all."""
    softcap: float = 0.0
    """Scores are capped smoothly at this; 0: they are not."""
    sinks: torch.Tensor | None = None
    """[query heads]: scores for looking at nothing."""
    alibi: Alibi | None = None
    """What the position of a key adds to its score."""
