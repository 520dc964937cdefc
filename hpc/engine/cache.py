"""The KV cache: one pool of tokens per layer, in which every sequence has an extent.

It knows nothing of requests. An extent is a run of neighbouring tokens; a sequence behind a shared
prefix has its own tokens in one extent and reads the prefix in another.
"""

from typing import Any

import torch

from hpc.engine.extents import Extents, aligned
from hpc.engine.form import KVShape


class Cache:
    """The pools of all layers. `panel` is the width of the kernel's panels, 0 where torch attends.

    `spare` further tokens lie behind all extents, from `spare_start` on, for rows that only fill a step up.
    """

    def __init__(
        self,
        layouts: dict[int, KVShape],
        num_tokens: int,
        dtype: torch.dtype,
        device: torch.device,
        panel: int,
        spare: int = 0,
    ) -> None:
        self.extents = Extents(num_tokens)
        self.panel = panel
        self.spare_start = self.extents.num_tokens
        size = self.spare_start + spare
        # Not touched here: the system gives a page its memory when a token is first stored in it.
        new: Any = lambda shape: torch.empty(size, *shape, dtype=dtype, device=device)  # noqa: E731
        shapes = {index: pool_shapes(layout, panel) for index, layout in layouts.items()}
        self.layers = {index: (new(key), new(value)) for index, (key, value) in shapes.items()}

    def forget(self) -> None:
        """Free all extents."""
        self.extents = Extents(self.extents.num_tokens)

    def copy(self, source: int, target: int, num_tokens: int) -> None:
        """Copy the keys and values of `num_tokens` from one extent's start to another's."""
        size = aligned(num_tokens)
        for pools in self.layers.values():
            for pool in pools:
                pool[target : target + size] = pool[source : source + size].clone()


def token_bytes(layouts: dict[int, KVShape], dtype: torch.dtype, panel: int) -> int:
    """Return the bytes of a token in all layers."""
    shapes = (shape for layout in layouts.values() for shape in pool_shapes(layout, panel))
    return sum(heads * dim for heads, dim in shapes) * dtype.itemsize


def pool_shapes(layout: KVShape, panel: int) -> tuple[tuple[int, int], tuple[int, int]]:
    """Return the stored shapes of key and value: the kernel pads keys to pairs of numbers, values to whole panels."""
    if not panel:
        return layout.key, layout.value
    return _padded(layout.key, 2), _padded(layout.value, panel)


def _padded(shape: tuple[int, int], multiple: int) -> tuple[int, int]:
    return shape[0], -(-shape[1] // multiple) * multiple
