"""Compute linear layers with oneDNN on CPUs whose bfloat16 instructions only oneDNN uses, such as AMX."""

from typing import Any

import torch


class OneDnn:
    """oneDNN's linear layers. Their rounding depends on the batch.

    oneDNN compiles a program for each number of rows, once.
    """

    def __init__(self) -> None:
        self._ops: Any = torch.ops.mkldnn

    @property
    def has_bfloat16(self) -> bool:
        """Whether this CPU has bfloat16 instructions."""
        return bool(torch.backends.mkldnn.is_available() and self._ops._is_mkldnn_bf16_supported())  # type: ignore[no-untyped-call]

    @property
    def has_amx(self) -> bool:
        """Whether this CPU multiplies tiles of bfloat16 numbers, many times as fast."""
        return self.has_bfloat16 and torch.cpu._is_amx_tile_supported()

    def pack(self, weight: torch.Tensor) -> torch.Tensor:
        """Pack a weight [n, k] for products of about 64 rows, the usual size of a decoding step."""
        packed: torch.Tensor = self._ops._reorder_linear_weight(weight.contiguous(), 64)
        return packed

    def linear(self, x: torch.Tensor, packed: torch.Tensor, bias: torch.Tensor | None, n: int) -> torch.Tensor:
        """Return x [..., k] times a packed weight plus a bias, [..., n]."""
        y: torch.Tensor = self._ops._linear_pointwise(x.reshape(-1, x.shape[-1]), packed, bias, "none", [], "")
        return y.view(*x.shape[:-1], n)
