"""Allocate extents, runs of neighbouring tokens, in a KV cache: first fit. Pure host code."""

import bisect

ALIGN = 64
"""Tokens: extents begin and end at multiples of it, since the kernel stores that many tokens of a head together."""


class Extents:
    """The free tokens of a pool. First fit, so that memory that was touched is used again."""

    def __init__(self, num_tokens: int) -> None:
        self.num_tokens = num_tokens // ALIGN * ALIGN
        self._free = [(0, self.num_tokens)] if self.num_tokens else []

    def take(self, num_tokens: int) -> int | None:
        """Allocate at least `num_tokens`; return the start of the extent, or None if no gap is large enough."""
        size = aligned(num_tokens)
        for index, (start, end) in enumerate(self._free):
            if end - start >= size:
                self._free[index : index + 1] = [(start + size, end)] if end - start > size else []
                return start
        return None

    def give(self, start: int, num_tokens: int) -> None:
        """Free an extent."""
        end = start + aligned(num_tokens)
        index = bisect.bisect(self._free, (start, end))
        if index < len(self._free) and self._free[index][0] == end:
            end = self._free.pop(index)[1]
        if index and self._free[index - 1][1] == start:
            index -= 1
            start = self._free.pop(index)[0]
        self._free.insert(index, (start, end))

    def extend(self, start: int, num_tokens: int, wanted: int) -> bool:
        """Enlarge an extent of `num_tokens` to `wanted` in place; return False if the tokens behind it are not free."""
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
    """Round up to a multiple of `ALIGN`."""
    return -(-num_tokens // ALIGN) * ALIGN
