"""Layers computed by the kernel; `hpc.engine.layers.fuse` puts them into models whose own layers do the same."""

from typing import Any

import torch
from torch import nn

from hpc.engine.form import AttentionSpec
from hpc.engine.kernel.kernel import Kernel, Layer
from hpc.engine.kernel.onednn import OneDnn
from hpc.engine.layers.attention import AttentionMetadata, Unsupported
from hpc.engine.layers.experts import RowBlocks

Linears = Kernel | OneDnn | RowBlocks


class PackedLinear(nn.Module):
    """A linear layer whose weight is packed."""

    def __init__(self, linears: Linears, weight: torch.Tensor, bias: torch.Tensor | None) -> None:
        super().__init__()
        self.linears = linears
        self.out_features, self.in_features = weight.shape
        self.packed = nn.Parameter(linears.pack(weight.detach()), requires_grad=False)
        self.bias = None if bias is None else nn.Parameter(bias.detach().clone(), requires_grad=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return x [..., in_features] times the weight, [..., out_features]."""
        return self.linears.linear(x, self.packed, self.bias, self.out_features)


class GatedMLP(nn.Module):
    """down(silu(gate(x)) * up(x)), gate and up in one product."""

    def __init__(
        self, kernel: Kernel, gate: torch.Tensor, up: torch.Tensor, bias: torch.Tensor | None, down: nn.Module
    ) -> None:
        super().__init__()
        self._kernel = kernel
        self._size = len(gate)
        self.packed = nn.Parameter(kernel.pack_gated(gate.detach(), up.detach()), requires_grad=False)
        self.bias = None if bias is None else nn.Parameter(bias.detach().clone(), requires_grad=False)
        self.down = down

    def forward(self, x: torch.Tensor) -> Any:
        """Return the result, of the shape of x."""
        return self.down(self._kernel.linear(x, self.packed, self.bias, self._size, gated=True))


class Attention(nn.Module):
    """Attention whose three projections are one product, with the rotary embedding applied by the kernel."""

    def __init__(self, kernel: Kernel, linears: Linears, own: Any, form: AttentionSpec) -> None:
        super().__init__()
        self._kernel = kernel
        self.form = form
        self.layer_idx = own.layer_idx
        self.handed: Any = getattr(own, "handed", None)
        if hasattr(own, "qkv_proj"):
            weight, bias = own.qkv_proj.weight, own.qkv_proj.bias
        else:
            layers = own.q_proj, own.k_proj, own.v_proj
            weight = torch.cat([layer.weight for layer in layers])
            bias = None if own.q_proj.bias is None else torch.cat([layer.bias for layer in layers])
        self.qkv_proj = PackedLinear(linears, weight, bias)
        key, value = (heads * dim for heads, dim in (form.layout.key, form.layout.value))
        self._sizes = len(weight) - key - value, key, value
        self.q_norm, self.k_norm = getattr(own, "q_norm", None), getattr(own, "k_norm", None)
        self.o_proj = own.o_proj

    def forward(
        self,
        hidden_states: torch.Tensor,
        position_embeddings: tuple[torch.Tensor, torch.Tensor],
        attention_mask: torch.Tensor | None,
        engine: AttentionMetadata | None = None,
        **_: Any,
    ) -> tuple[torch.Tensor, None]:
        """Return the output of the layer for hidden states [1, tokens, size]."""
        if attention_mask is not None:
            raise Unsupported("a mask of its own")
        engine = engine or self.handed.step
        assert engine is not None
        assert engine.cache is not None
        q, k, v = self.qkv_proj(hidden_states)[0].split(self._sizes, dim=-1)
        q, k = _normed(q, self.q_norm), _normed(k, self.k_norm)
        form, rows = self.form, len(q)
        dims = form.layout.key[1], form.layout.key[1], form.layout.value[1]
        q, k, v = (x.view(rows, -1, dim) for x, dim in zip((q, k, v), dims, strict=True))
        out = self._kernel.attention(
            q, k, v, engine.cache.layers[self.layer_idx], engine.packed, form, position_embeddings
        )
        return self.o_proj(out.view(1, rows, -1)), None


class DecoderLayer(nn.Module):
    """A decoder layer in one call of the kernel, if the kernel has all its parts.

    The last layer computes only the tokens whose logits are wanted behind its attention.
    """

    def __init__(self, kernel: Kernel, own: Any, is_last: bool) -> None:
        super().__init__()
        self.input_layernorm, self.self_attn = own.input_layernorm, own.self_attn
        self.post_attention_layernorm, self.mlp = own.post_attention_layernorm, own.mlp
        self._kernel, self._index, self._is_last = kernel, own.self_attn.layer_idx, is_last
        attention, mlp = own.self_attn, own.mlp
        linears = attention.qkv_proj, attention.o_proj, mlp, mlp.down
        norms = own.input_layernorm, attention.q_norm, attention.k_norm, own.post_attention_layernorm
        heads, dim = attention.form.layout.value
        self._layer = Layer(
            attention.form,
            attention.o_proj.in_features // (heads * dim),
            mlp.down.in_features,
            [(linear.packed, linear.bias) for linear in linears],
            [(None, 0.0) if norm is None else (norm.weight, norm.variance_epsilon) for norm in norms],
        )

    def forward(
        self,
        hidden_states: torch.Tensor,
        position_embeddings: tuple[torch.Tensor, torch.Tensor],
        engine: AttentionMetadata,
        attention_mask: torch.Tensor | None = None,
        **_: Any,
    ) -> torch.Tensor:
        """Return the output of the layer for hidden states [1, tokens, size]; the rows of other tokens mean nothing."""
        if attention_mask is not None:
            raise Unsupported("a mask of its own")
        assert engine.cache is not None
        kept, pools = engine.kept if self._is_last else None, engine.cache.layers[self._index]
        x = self._kernel.layer(self._layer, hidden_states, pools, engine.packed, position_embeddings, kept)
        return x if kept is None else hidden_states.index_copy(1, kept, x)


def _normed(x: torch.Tensor, norm: Any) -> torch.Tensor:
    """Return x [tokens, size] normed by head or as a whole: the size of the norm's weight decides."""
    return x if norm is None else norm(x.reshape(len(x), -1, len(norm.weight))).view(x.shape)


class RMSNorm(nn.Module):
    """x divided by its root mean square, times a weight."""

    def __init__(self, kernel: Kernel, weight: torch.Tensor, eps: float) -> None:
        super().__init__()
        self._kernel = kernel
        self.weight = nn.Parameter(weight.detach(), requires_grad=False)
        self.variance_epsilon = eps

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return the result, of the shape of x."""
        return self._kernel.rms_norm(x, self.weight, self.variance_epsilon)
