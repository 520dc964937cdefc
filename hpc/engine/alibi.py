"""Compute the bias that ALiBi adds to the scores of a key: for each head a slope times the position.

The paper has the distance to the query instead. That shifts all scores of a query alike, which softmax ignores.
"""

import torch


class Alibi:
    """Scores by head and position. The table grows to the largest number of positions that was asked for."""

    def __init__(self, heads: int, device: torch.device, scale: float = 1.0, in_bfloat16: bool = False) -> None:
        self._slopes = slopes(heads).to(device)
        self._scale = scale
        self._in_bfloat16 = in_bfloat16
        """Whether slopes and products are rounded to bfloat16 in a model of any dtype, as Falcon does."""
        self._scores = torch.empty(heads, 0, device=device)

    def scores(self, positions: int) -> torch.Tensor:
        """Return float32 [heads, at least `positions`]."""
        if self._scores.shape[1] < positions:
            size = max(1024, 2 * self._scores.shape[1], positions)  # doubled: it is computed anew only a few times
            at = torch.arange(size, device=self._slopes.device)
            products = self._slopes.bfloat16()[:, None] * at if self._in_bfloat16 else self._slopes[:, None] * at
            self._scores = products.float() * self._scale
        return self._scores


def slopes(heads: int) -> torch.Tensor:
    """Return the slope of each head, float32 [heads]: a geometric sequence that ends at 1/256 (arXiv 2108.12409).

    For a number of heads that is no power of 2, the slopes of the next smaller power, then every other slope of the
    next larger one.
    """
    size = 1 << (heads - 1).bit_length()
    found = 2.0 ** -(torch.arange(1, size + 1) * (8 / size))
    return found if size == heads else torch.cat([found[1::2], found[::2]])[:heads]
