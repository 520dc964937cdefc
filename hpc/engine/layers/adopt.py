"""Replace the attention of models that transformers' interface does not reach; they are recognised by their attributes.

BLOOM, MPT, Falcon, GPT-J, CodeGen and GPT-Neo. `hpc.engine.native.build` checks that the numbers are the model's own.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from hpc.engine.alibi import Alibi
from hpc.engine.layers.attention import NAME, AttentionMetadata, attend


class Handed:
    """Hands the metadata of a step to layers to which the model passes nothing, and holds what the layers share."""

    def __init__(self) -> None:
        self.step: AttentionMetadata | None = None
        self._alibis: dict[Any, Alibi] = {}

    def alibi(self, heads: int, device: torch.device, scale: float = 1.0, in_bfloat16: bool = False) -> Alibi:
        """Return the ALiBi scores, one object for all layers with the same parameters."""
        wanted = heads, device, scale, in_bfloat16
        return self._alibis.setdefault(wanted, Alibi(*wanted))


def can_adopt(model: nn.Module) -> bool:
    """Return whether attention can be replaced, by transformers' interface or by a function here."""
    by_interface: Any = getattr(model, "_can_set_attn_implementation", None)
    return bool(by_interface and by_interface()) or any(_way(module) is not None for module in model.modules())


def adopt(model: Any) -> None:
    """Let the engine compute all attention of a model; its forward then needs the keyword argument `engine`."""
    if getattr(model, "_supports_attention_backend", False):  # it passes on what it is given
        model.set_attn_implementation(NAME)
        return
    handed, ways = Handed(), {module: way for module in model.modules() if (way := _way(module)) is not None}
    has_mask = any(hasattr(module, "Wqkv") for module in ways)

    def enter(_: Any, args: Any, given: dict[str, Any]) -> Any:
        handed.step = given["engine"]
        if has_mask:  # MPT wants one; of this shape transformers makes no other
            given["attention_mask"] = torch.zeros(1, 1, 1, 1, device=model.device)
        return args, given

    def leave(*_: Any) -> None:
        handed.step = None

    model.register_forward_pre_hook(enter, with_kwargs=True)
    model.register_forward_hook(leave, always_call=True)
    for module in model.modules():
        if hasattr(module, "layer_idx") or module in ways:
            module.handed = handed
    for module, way in ways.items():
        way(module)
    if ways:
        model.config._attn_implementation = NAME  # for which transformers makes no masks
    else:
        model.set_attn_implementation(NAME)


def _way(module: nn.Module) -> Callable[[Any], None] | None:
    """Return the function that replaces an attention module; None for any other module."""
    if all(hasattr(module, name) for name in ("_attn", "q_proj", "attention_type", "bias", "layer_id")):
        return _gpt_neo
    if all(hasattr(module, name) for name in ("_attn", "scale_attn", "embed_positions", "layer_idx")):
        return _gpt_j
    if all(hasattr(module, name) for name in ("query_key_value", "dense", "inv_norm_factor", "layer_idx")):
        return _bloom if hasattr(module, "_reshape") else _falcon if hasattr(module, "_split_heads") else None
    if all(hasattr(module, name) for name in ("Wqkv", "out_proj", "softmax_scale", "clip_qkv", "n_heads")):
        return _mpt
    return None


def _core(own: Any, scale: float, window: int = 0) -> None:
    """Replace the method of an attention that computes between its projections."""

    def core(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: Any = None) -> tuple[torch.Tensor, None]:
        return attend(own, q, k, v, mask, scaling=scale, sliding_window=window)[0].transpose(1, 2), None

    own._attn = core


def _gpt_j(own: Any) -> None:
    _core(own, 1 / own.scale_attn)


def _gpt_neo(own: Any) -> None:
    own.layer_idx = own.layer_id
    seen = int(own.bias[0, 0, -1].sum())  # by the last position that it knows: what is masked is not a setting of it
    _core(own, 1.0, 0 if seen == own.bias.shape[-1] else seen)


def _bloom(own: Any) -> None:
    alibi = own.handed.alibi(own.num_heads, own.dense.weight.device)

    def forward(hidden_states: torch.Tensor, residual: torch.Tensor, **_: Any) -> tuple[torch.Tensor, None]:
        q, k, v = own._reshape(own.query_key_value(hidden_states))
        attended = attend(own, q, k, v, None, scaling=own.inv_norm_factor, alibi=alibi)[0]
        return own.dense(attended.flatten(2)) + residual, None

    own.forward = forward


def _falcon(own: Any) -> None:
    scale = own.inv_norm_factor  # of the whole score
    alibi = None
    if own.config.alibi:
        alibi = own.handed.alibi(own.num_heads, own.dense.weight.device, scale, in_bfloat16=True)
    groups = own.num_heads // own.num_kv_heads if own.new_decoder_architecture else 1  # it repeats keys and values

    def forward(hidden_states: torch.Tensor, position_embeddings: Any = None, **_: Any) -> tuple[torch.Tensor, None]:
        q, k, v = own._split_heads(own.query_key_value(hidden_states))
        q, k, v = q.transpose(1, 2), k[:, :, ::groups].transpose(1, 2), v[:, :, ::groups].transpose(1, 2)
        if alibi is None:
            cos, sin = (turn[:, None] for turn in position_embeddings)
            q, k = _turned(q, cos, sin), _turned(k, cos, sin)
        attended = attend(own, q, k, v, None, scaling=scale, alibi=alibi)[0]
        return own.dense(attended.flatten(2)), None

    own.forward = forward


def _turned(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Apply the rotary embedding to x [.., dim], in halves."""
    first, second = x.chunk(2, dim=-1)
    return x * cos + torch.cat([-second, first], dim=-1) * sin


def _mpt(own: Any) -> None:
    alibi = own.handed.alibi(own.n_heads, own.out_proj.weight.device)

    def forward(hidden_states: torch.Tensor, **_: Any) -> tuple[torch.Tensor, None]:
        qkv = own.Wqkv(hidden_states)
        if own.clip_qkv:
            qkv = qkv.clamp(min=-own.clip_qkv, max=own.clip_qkv)
        q, k, v = (x.unflatten(-1, (own.n_heads, -1)).transpose(1, 2) for x in qkv.chunk(3, dim=-1))
        attended = attend(own, q, k, v, None, scaling=own.softmax_scale, alibi=alibi)[0]
        return own.out_proj(attended.flatten(2)), None

    own.forward = forward
