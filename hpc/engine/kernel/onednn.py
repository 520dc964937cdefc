"""Linear layers through oneDNN, where the CPU has instructions for bfloat16 that only oneDNN uses."""

from typing import Any

import torch


class OneDnn:
    """oneDNN's linear layers, for CPUs with bfloat16 instructions that the kernel does not use, as AMX.

    Their numbers depend on what else is in the batch. For each number of rows a program is made, once.
    """

    def __init__(self) -> None:
        self._ops: Any = torch.ops.mkldnn

    @property
    def has_bfloat16(self) -> bool:
        """Whether this CPU has such instructions."""
        return bool(torch.backends.mkldnn.is_available() and self._ops._is_mkldnn_bf16_supported())  # type: ignore[no-untyped-call]

    @property
    def has_amx(self) -> bool:
        """Whether this CPU multiplies whole tiles of them, many times as fast."""
        return self.has_bfloat16 and torch.cpu._is_amx_tile_supported()

    def pack(self, weight: torch.Tensor) -> torch.Tensor:
        """Lay a weight [n, k] out for products with some 64 rows."""
        packed: torch.Tensor = self._ops._reorder_linear_weight(weight.contiguous(), 64)
        return packed

    def linear(self, x: torch.Tensor, packed: torch.Tensor, bias: torch.Tensor | None, n: int) -> torch.Tensor:
        """Return x [..., k] times a packed weight plus a bias, [..., n]."""
        y: torch.Tensor = self._ops._linear_pointwise(x.reshape(-1, x.shape[-1]), packed, bias, "none", [], "")
        return y.view(*x.shape[:-1], n)
