"""`aten::_flash_attention_forward` of packed sequences, acted on the CPU: its meaning, and what it refuses.

Rows of no sequence are NaN, as they are uninitialised there. The rules are those of torch's
`flash_attn/flash_api.cpp` (`mha_varlen_fwd`), FlashAttention 2.
"""

from itertools import pairwise
from typing import Any

import torch

NAME = "_flash_attention_forward"


class Refused(RuntimeError):
    """What CUDA, or its FlashAttention, would refuse."""


def check(holds: bool, words: str) -> None:
    """Raise `Refused` unless something holds."""
    if not holds:
        raise Refused(words)


class Flash:
    """The operator on a GPU of some compute capability; float32 is let through, so that tokens can be compared."""

    def __init__(self, capability: tuple[int, int] = (9, 0), rocm: bool = False) -> None:
        self.capability = capability
        self.rocm = rocm
        self.refuses = ""
        """What it refuses everything with."""
        self.calls = self.folded = 0
        """How often it was called, and how often on the path that folds query heads and splits keys."""

    def attend(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, cum_seq_q: torch.Tensor,
        cum_seq_k: torch.Tensor, max_q: int, max_k: int, dropout_p: float, is_causal: bool, return_debug_mask: bool,
        *, scale: float | None = None, window_size_left: int | None = None, window_size_right: int | None = None,
        seqused_k: torch.Tensor | None = None, alibi_slopes: Any = None, block_table: Any = None,
        num_splits: int | None = None,
    ) -> tuple[torch.Tensor, ...]:  # fmt: skip
        check(not self.refuses, self.refuses)
        check(self.capability >= (8, 0), "FlashAttention only supports Ampere GPUs or newer.")
        check(not self.rocm or seqused_k is None, "[ROCm] mha_varlen_fwd: seqused_k must be nullopt")
        check(cum_seq_q is not None and cum_seq_k is not None, "packed sequences only")
        check(dropout_p == 0 and not return_debug_mask and alibi_slopes is None, "no dropout, mask or slopes here")
        check(block_table is None, "block_table is refused without FlashAttention 3")
        check(query.dtype == key.dtype == value.dtype, "query, key and value must have the same dtype")
        for ends in (cum_seq_q, cum_seq_k, *([] if seqused_k is None else [seqused_k])):
            check(ends.dtype == torch.int32 and ends.is_contiguous(), "lengths must be int32 and contiguous")
        for each in (query, key, value):
            check(each.dim() == 3 and each.stride(-1) == 1, "[tokens, heads, dim] with a contiguous last dimension")
        batch, heads, dim = len(cum_seq_q) - 1, query.shape[1], query.shape[2]
        check(batch > 0, "batch size must be positive")
        check(dim <= 256, "FlashAttention forward only supports head dimension at most 256")
        check(dim % 8 == 0, "head_size should be a multiple of 8")
        check(heads % key.shape[1] == 0, "number of heads in key/value must divide number of heads in query")
        check(key.shape[1:] == value.shape[1:] and key.shape[2] == dim, "key and value of another shape")
        check(cum_seq_k.shape == (batch + 1,), "cu_seqlens_k must have shape (batch_size + 1)")
        check(seqused_k is None or seqused_k.shape == (batch,), "seqused_k must have shape (batch_size)")
        left = -1 if window_size_left is None else window_size_left
        right = -1 if window_size_right is None else window_size_right
        if max_q == 1:
            is_causal = False
        if is_causal:
            right = 0
        self.calls += 1
        if max_q == 1 and heads > key.shape[1] and left < 0 and right < 0:  # heads of a group stand as queries
            self.folded += 1
            check(len(query) == batch, "shape is invalid for input of size: queries are not one a sequence")
        left = -1 if left >= max_k else left
        right = -1 if right >= max_k else right
        scale = dim**-0.5 if scale is None else scale
        first, start = cum_seq_q.tolist(), cum_seq_k.tolist()
        used = [b - a for a, b in pairwise(start)] if seqused_k is None else seqused_k.tolist()
        check(first == sorted(first), "queries in order")
        check(first[-1] <= len(query), "illegal memory access: queries")
        out = torch.full_like(query, torch.nan)
        lse = query.new_full((heads, len(query)), torch.nan, dtype=torch.float32)
        for i, keys in enumerate(used):
            rows, n = slice(first[i], first[i + 1]), first[i + 1] - first[i]
            check(n <= max_q, f"sequence {i} has {n} queries and max_q is {max_q}: the others are never computed")
            check(0 <= keys <= max_k, f"sequence {i} has {keys} keys and max_k is {max_k}: the others may not be read")
            check(0 <= start[i] <= len(key) - keys, "illegal memory access: keys")
            own = slice(start[i], start[i] + keys)
            if n:
                out[rows], lse[:, rows] = _attend(query[rows], key[own], value[own], scale, left, right)
        empty = query.new_empty(0)
        return out, lse, empty, empty, empty


def _attend(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scale: float, left: int, right: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the output of one sequence and the logarithms of its sums; the last query stands at the last key."""
    groups, n, keys = query.shape[1] // key.shape[1], len(query), len(key)
    k, v = (tensor.float().repeat_interleave(groups, 1) for tensor in (key, value))
    scores = torch.einsum("qhd,khd->hqk", query.float(), k) * scale
    at = torch.arange(n)[:, None] + keys - n
    seen = torch.ones(n, keys, dtype=torch.bool)
    if right >= 0:
        seen &= torch.arange(keys) <= at + right
    if left >= 0:
        seen &= torch.arange(keys) >= at - left
    scores = scores.masked_fill(~seen, -torch.inf)
    total = scores.logsumexp(-1)
    share = torch.where(total.isinf()[..., None], 0.0, (scores - total[..., None]).exp())
    out = torch.einsum("hqk,khd->qhd", share, v).to(query.dtype)
    return out, torch.where(total == -torch.inf, torch.inf, total)  # nothing seen: 0, and +inf
