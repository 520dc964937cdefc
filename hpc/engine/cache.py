"""The memory of keys and values: one pool of tokens a layer, in which every sequence has an extent.

Knows nothing of requests. An extent is a run of neighbouring tokens; a sequence behind a shared
prefix has its own tokens in one extent and reads the prefix in another.
"""

import bisect
from dataclasses import dataclass
from typing import Any

import torch

ALIGN = 64
"""Extents begin and end at multiples of this: the kernel keeps so many tokens of a head together."""


class Extents:
    """Which tokens of a pool are free: first fit, so that memory once touched is used again."""

    def __init__(self, num_tokens: int) -> None:
        self.num_tokens = num_tokens // ALIGN * ALIGN
        self._free = [(0, self.num_tokens)] if self.num_tokens else []

    @property
    def free(self) -> int:
        """Tokens that are free, in however many pieces."""
        return sum(end - start for start, end in self._free)

    def take(self, num_tokens: int) -> int | None:
        """Return the start of an extent of at least so many tokens, now taken; None if no gap is as large."""
        size = aligned(num_tokens)
        for index, (start, end) in enumerate(self._free):
            if end - start >= size:
                self._free[index : index + 1] = [(start + size, end)] if end - start > size else []
                return start
        return None

    def give(self, start: int, num_tokens: int) -> None:
        """Take an extent back."""
        end = start + aligned(num_tokens)
        index = bisect.bisect(self._free, (start, end))
        if index < len(self._free) and self._free[index][0] == end:
            end = self._free.pop(index)[1]
        if index and self._free[index - 1][1] == start:
            index -= 1
            start = self._free.pop(index)[0]
        self._free.insert(index, (start, end))

    def extend(self, start: int, num_tokens: int, wanted: int) -> bool:
        """Let an extent of `num_tokens` have `wanted` where it lies; False if what follows is not free."""
        end, more = start + aligned(num_tokens), aligned(wanted) - aligned(num_tokens)
        if more <= 0:
            return True
        index = bisect.bisect(self._free, (end, end))
        if index == len(self._free) or self._free[index][0] != end or self._free[index][1] - end < more:
            return False
        rest = (end + more, self._free[index][1])
        self._free[index : index + 1] = [rest] if rest[0] < rest[1] else []
        return True


def aligned(num_tokens: int) -> int:
    """Round up to what an extent can have."""
    return -(-num_tokens // ALIGN) * ALIGN


@dataclass(frozen=True)
class Layout:
    """What a layer keeps of a token: shapes [heads, dim] of its key and its value."""

    key: tuple[int, int]
    value: tuple[int, int]


class Cache:
    """The pools of all layers. `panel` is the width of the kernel's panels, 0 where torch attends.

    `spare` tokens more lie behind all extents, from `spare_start` on.
    """

    def __init__(
        self,
        layouts: dict[int, Layout],
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
        """Let all of it be free again."""
        self.extents = Extents(self.extents.num_tokens)

    def copy(self, source: int, target: int, num_tokens: int) -> None:
        """Copy the keys and values of `num_tokens` from one extent's start to another's."""
        size = aligned(num_tokens)
        for pools in self.layers.values():
            for pool in pools:
                pool[target : target + size] = pool[source : source + size].clone()


def token_bytes(layouts: dict[int, Layout], dtype: torch.dtype, panel: int) -> int:
    """Return what a token takes in all layers."""
    shapes = (shape for layout in layouts.values() for shape in pool_shapes(layout, panel))
    return sum(heads * dim for heads, dim in shapes) * dtype.itemsize


def pool_shapes(layout: Layout, panel: int) -> tuple[tuple[int, int], tuple[int, int]]:
    """Return the shapes in which the kernel keeps key and value: it pads the one to pairs, the other to panels."""
    if not panel:
        return layout.key, layout.value
    return _padded(layout.key, 2), _padded(layout.value, panel)


def _padded(shape: tuple[int, int], multiple: int) -> tuple[int, int]:
    return shape[0], -(-shape[1] // multiple) * multiple
