"""Replace layers of a model by those of the kernel. Layers are recognised by their attributes, not by name.

A layer is replaced only if it consists of known operations and the replacement gives the same numbers.
"""

import logging
from collections.abc import Callable, Mapping, Set
from typing import Any

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from transformers.pytorch_utils import Conv1D

from hpc.engine.cache import Cache
from hpc.engine.extents import ALIGN
from hpc.engine.form import AttentionSpec
from hpc.engine.kernel.kernel import Kernel
from hpc.engine.layers.attention import AttentionMetadata, Span, Unsupported
from hpc.engine.layers.experts import ROW_MULTIPLE, Expert, Experts, RowBlocks, choose_by_blocks, parts
from hpc.engine.layers.fused import Attention, DecoderLayer, GatedMLP, Linears, PackedLinear, RMSNorm

LOGGER = logging.getLogger(__name__)


_CLOSE = {torch.float32: 1e-4, torch.float16: 4e-3, torch.bfloat16: 3e-2}
"""Maximum difference between a layer and its replacement, as a share of the largest number: some roundings."""


_ROWS = 8
"""Rows with which a layer is tried."""
_PLAIN = {
    *("add", "cat", "dropout", "linear", "mul", "neg", "new_empty", "empty_like", "silu"),
    *("alias", "chunk", "contiguous", "index", "reshape", "select", "slice", "split", "split_with_sizes", "to"),
    *("transpose", "unsqueeze", "view"),
}
"""Operations of projections, residuals, gates, the kernel's layers, rotary embedding and the engine's attention."""
_PRODUCT = {"_unsafe_view", "add", "addmm", "linear", "matmul", "mm", "numpy_T", "permute", "t", "transpose", "view"}
"""Operations of a linear layer with a forward of its own."""


@torch.inference_mode()
def fuse(
    model: nn.Module,
    kernel: Kernel | None,
    linears: Linears | None,
    forms: Mapping[int, AttentionSpec] | None = None,
    on_cpu: bool = True,
) -> None:
    """Replace attention, MLPs and norms of a model where there is a kernel, and pack its linear layers.

    `forms` has the attention of each layer that uses `hpc.engine.layers.attention`; without it attention stays.
    Layers are replaced one by one, so that memory holds each weight once, except weights that something else
    uses too, such as an embedding tied to the head.
    """
    stacked = [parameter for parameter in model.parameters() if parameter.dim() == 3]
    if kernel is not None:
        _replace(model, lambda module: _rms_norm(module, kernel))
    if kernel is not None and linears is not None and forms:
        _replace(model, lambda module: _attention(module, kernel, linears, forms))
    if kernel is not None and linears is kernel:
        _replace(model, lambda module: _gated_mlp(module, kernel))
    if linears is not None:
        _replace(model, lambda module: _linear(module, linears))
    if on_cpu:
        _replace(model, lambda module: _experts(module, linears or RowBlocks()))
        for router in _routers(model):
            choose_by_blocks(router)
        if any(weight.numel() for weight in stacked):
            LOGGER.warning(
                "experts of this model are computed by its own code: by rounding, what is generated for a row "
                "may depend on the rows beside it"
            )
    if linears is not None and not isinstance(linears, RowBlocks):
        _leave_file(model)
    if kernel is not None and forms:
        _replace(model, lambda module: _decoder_layer(module, kernel, forms))


def _leave_file(model: nn.Module) -> None:
    """Copy the remaining weights of a model out of the file that they are mapped from.

    One mapped tensor would keep the whole file in memory, beside the packed copies of the others.
    """
    for parameter in model.parameters():
        parameter.data = parameter.data.clone()


def _replace(model: nn.Module, other: Callable[[nn.Module], nn.Module | None]) -> None:
    dtype = next(model.parameters()).dtype
    for module in list(model.modules()):
        for name, child in list(module.named_children()):
            if any(parameter.dtype != dtype for parameter in child.parameters(recurse=False)):
                continue  # a gate or a norm that is kept in float32 computes there
            if (replacement := other(child)) is not None:
                setattr(module, name, replacement)


class _Operations(TorchDispatchMode):
    """Records the names of torch's operations."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.names: set[str] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.add(func.name().removeprefix("aten::").split(".")[0])
        return func(*args, **(kwargs or {}))


def _attention(module: Any, kernel: Kernel, linears: Linears, forms: Mapping[int, AttentionSpec]) -> nn.Module | None:
    form = forms.get(getattr(module, "layer_idx", -1))
    names = ["qkv_proj"] if hasattr(module, "qkv_proj") else ["q_proj", "k_proj", "v_proj"]
    layers: list[Any] = [getattr(module, name, None) for name in [*names, "o_proj"]]
    if form is None or any(type(layer) is not nn.Linear for layer in layers):
        return None
    if len({layer.bias is None for layer in layers[:-1]}) > 1:
        return None
    weight = layers[0].weight
    given = _given(form, module.layer_idx, weight, kernel)

    def run(attention: nn.Module, x: torch.Tensor) -> torch.Tensor:
        return attention(hidden_states=x[None], **given)[0]  # type: ignore[no-any-return]

    if not _is_plain(run, module, _some(weight)):
        return None
    return _if_same(module, Attention(kernel, linears, module, form), weight, run)


def _decoder_layer(module: Any, kernel: Kernel, forms: Mapping[int, AttentionSpec]) -> nn.Module | None:
    names = "input_layernorm", "self_attn", "post_attention_layernorm", "mlp"
    if [type(getattr(module, name, None)) for name in names] != [RMSNorm, Attention, RMSNorm, GatedMLP]:
        return None
    attention = module.self_attn
    linears = attention.qkv_proj, attention.o_proj, module.mlp.down
    if any(getattr(linear, "linears", None) is not kernel for linear in linears):
        return None
    if any(norm is not None and type(norm) is not RMSNorm for norm in (attention.q_norm, attention.k_norm)):
        return None
    is_last, weight = attention.layer_idx == max(forms), module.input_layernorm.weight[None]
    given = _given(attention.form, attention.layer_idx, weight, kernel)
    kept = torch.tensor([1, _ROWS - 2]) if is_last else torch.arange(_ROWS)
    given["engine"].kept = kept

    def run(layer: nn.Module, x: torch.Tensor) -> torch.Tensor:
        return layer(x[None], **given)[0, kept]  # type: ignore[no-any-return]

    if not _is_plain(run, module, _some(weight)):
        return None
    return _if_same(module, DecoderLayer(kernel, module, is_last), weight, run)


def _given(form: AttentionSpec, layer: int, weight: torch.Tensor, kernel: Kernel) -> dict[str, Any]:
    """Return the arguments of a layer beside the hidden states, for a new sequence, in the dtype of `weight`."""
    cache = Cache({layer: form.layout}, ALIGN, weight.dtype, weight.device, kernel.panel)
    step = AttentionMetadata(cache, [Span(0, _ROWS, 0, 0, 0, 0)], kernel)
    angles = torch.outer(torch.arange(_ROWS), 0.3 ** torch.arange(form.layout.key[1] // 2)).repeat(1, 2)[None]
    rotary = angles.cos().to(weight.dtype), angles.sin().to(weight.dtype)
    return {"position_embeddings": rotary, "attention_mask": None, "engine": step}


def _is_plain(
    run: Callable[[nn.Module, torch.Tensor], Any], module: nn.Module, x: torch.Tensor, plain: Set[str] = _PLAIN
) -> bool:
    """Return whether a layer can be called so and uses known operations: others may show at large numbers only."""
    with _Operations() as operations:
        try:
            run(module, x)
        except (AttributeError, IndexError, RuntimeError, TypeError, ValueError, Unsupported):
            return False
    return not operations.names - plain


def _gated_mlp(module: nn.Module, kernel: Kernel) -> nn.Module | None:
    gate, up, both, down = (getattr(module, f"{name}_proj", None) for name in ("gate", "up", "gate_up", "down"))
    if type(down) is not nn.Linear:
        return None
    if type(gate) is nn.Linear and type(up) is nn.Linear and (gate.bias is None) == (up.bias is None):
        weights: tuple[torch.Tensor, ...] = gate.weight, up.weight
        bias = None if gate.bias is None else torch.cat([gate.bias, up.bias])
    elif type(both) is nn.Linear:
        weights, bias = both.weight.chunk(2), both.bias
    else:
        return None
    if not _is_plain(lambda module, x: module(x), module, _some(weights[0])):
        return None  # a bound on gates, which few tokens reach, would not be seen in its numbers
    return _if_same(module, GatedMLP(kernel, weights[0], weights[1], bias, down), weights[0])


def _experts(module: Any, linears: Linears) -> nn.Module | None:
    names = "gate_up_proj", "down_proj"
    if any(getattr(getattr(module, name, None), "ndim", 0) != 3 for name in names):
        return None
    if not hasattr(module, "_apply_gate") or not hasattr(module, "is_transposed"):
        return None
    up, down = (parts(module, name) for name in names)
    dtype, gate = module.down_proj.dtype, module._apply_gate
    chosen = torch.arange(2 * _ROWS).view(_ROWS, 2) % len(up)
    shares = torch.linspace(0.2, 0.8, 2 * _ROWS).view(_ROWS, 2).to(dtype)
    new: Any
    if isinstance(linears, Kernel) and _is_silu_gated(module):
        inner = len(up[0][0]) // 2
        new = lambda up, down: GatedMLP(linears, up[0][:inner], up[0][inner:], up[1], down)  # noqa: E731
    else:
        new = lambda up, down: Expert(PackedLinear(linears, *up), gate, down)  # noqa: E731
    try:
        replacement = Experts([new(own, PackedLinear(linears, *other)) for own, other in zip(up, down, strict=True)])
        same = _if_same(module, replacement, up[0][0], lambda experts, x: experts(x, chosen, shares))
    except (AttributeError, IndexError, RuntimeError, TypeError, ValueError):
        return None  # it takes other arguments
    if same is not None:
        for weight in module.parameters(recurse=False):
            weight.data = weight.data.new_empty(0)  # the gate belongs to the module, which therefore stays
    return same


def _routers(model: nn.Module) -> list[nn.Module]:
    """Return the modules beside replaced experts that torch computes and that return a line for each row."""
    found = []
    for parent in model.modules():
        if any(type(child) is Experts for child in parent.children()):
            found += [child for child in parent.children() if _is_router(child)]
    return found


def _is_router(module: nn.Module) -> bool:
    weight = getattr(module, "weight", None)
    if not isinstance(weight, torch.Tensor) or weight.dim() != 2:
        return False
    x = torch.zeros(ROW_MULTIPLE, weight.shape[1], dtype=weight.dtype, device=weight.device)
    try:
        made = module(x)
    except (AttributeError, IndexError, RuntimeError, TypeError, ValueError):
        return False  # it takes other arguments
    made = [made] if isinstance(made, torch.Tensor) else made
    return all(isinstance(tensor, torch.Tensor) and tensor.shape[:1] == x.shape[:1] for tensor in made)


def _is_silu_gated(module: Any) -> bool:
    both = torch.linspace(-4, 4, 64), torch.linspace(2, -1, 64)
    gate, x = module._apply_gate, torch.cat(both)
    expected = nn.functional.silu(both[0]) * both[1]
    return _is_plain(lambda _, x: gate(x), module, x) and torch.allclose(gate(x), expected, atol=1e-6)


def _rms_norm(module: nn.Module, kernel: Kernel) -> nn.Module | None:
    weight, eps = getattr(module, "weight", None), getattr(module, "variance_epsilon", getattr(module, "eps", None))
    if not isinstance(weight, torch.Tensor) or weight.dim() != 1 or not isinstance(eps, float):
        return None
    if any(module.children()) or len(list(module.parameters())) != 1:
        return None
    for offset in (0, 1):  # Gemma keeps its weights as differences from 1
        if (same := _if_same(module, RMSNorm(kernel, weight + offset, eps), weight[None])) is not None:
            return same
    return None


def _if_same(
    module: nn.Module,
    replacement: nn.Module,
    weight: torch.Tensor,
    run: Callable[[nn.Module, torch.Tensor], torch.Tensor] = lambda module, x: module(x),
) -> nn.Module | None:
    """Return the replacement if it gives the same numbers for some x, [8, last dim of `weight`]; else None."""
    x = _some(weight)
    own, new = run(module, x), run(replacement, x)
    worst = (own - new).abs().max() / own.abs().max()
    return replacement if worst <= _CLOSE[weight.dtype] else None


def _some(weight: torch.Tensor) -> torch.Tensor:
    """Return numbers to try a layer with, [8, last dim of `weight`]."""
    return torch.linspace(-3, 3, _ROWS * weight.shape[-1]).sin().mul(2).view(_ROWS, -1).to(weight.dtype)


def _linear(module: nn.Module, linears: Linears) -> nn.Module | None:
    if type(module) is nn.Linear:
        return PackedLinear(linears, module.weight, module.bias)
    if type(module) is Conv1D:  # a linear layer of GPT-2, its weight the other way round
        weight: Any = module.weight
        return PackedLinear(linears, weight.t(), module.bias)  # type: ignore[arg-type]  # transformers is not typed
    if isinstance(module, nn.Linear) and _is_plain(lambda own, x: own(x), module, _some(module.weight), _PRODUCT):
        return _if_same(module, PackedLinear(linears, module.weight, module.bias), module.weight)
    return None
