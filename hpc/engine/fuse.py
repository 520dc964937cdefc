"""Put the kernel's layers into a model in the place of its own: recognised by what they have, not by name.

A layer that gives other numbers than the one whose place it takes is not put in.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from hpc.engine.kernel import Kernel, OneDnn

Linears = Kernel | OneDnn

_CLOSE = {torch.float32: 1e-4, torch.bfloat16: 3e-2}
"""How far the numbers of a layer may be from those of the model's own, as a share of the largest."""


class PackedLinear(nn.Module):
    """A linear layer whose weight is packed."""

    def __init__(self, linears: Linears, weight: torch.Tensor, bias: torch.Tensor | None) -> None:
        super().__init__()
        self._linears = linears
        self.out_features, self.in_features = weight.shape
        self.packed = nn.Parameter(linears.pack(weight.detach()), requires_grad=False)
        self.bias = None if bias is None else nn.Parameter(bias.detach().clone(), requires_grad=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return x [..., in_features] times the weight, [..., out_features]."""
        return self._linears.linear(x, self.packed, self.bias, self.out_features)


class GatedMLP(nn.Module):
    """down(silu(gate(x)) * up(x)), gate and up in one product."""

    def __init__(self, kernel: Kernel, gate_up: PackedLinear, down: nn.Module) -> None:
        super().__init__()
        self._kernel = kernel
        self.gate_up = gate_up
        self.down = down

    def forward(self, x: torch.Tensor) -> Any:
        """Return the result, of the shape of x."""
        return self.down(self._kernel.gate(self.gate_up(x)))


class RMSNorm(nn.Module):
    """x over its root mean square, times a weight."""

    def __init__(self, kernel: Kernel, weight: torch.Tensor, eps: float) -> None:
        super().__init__()
        self._kernel = kernel
        self.weight = nn.Parameter(weight.detach(), requires_grad=False)
        self.variance_epsilon = eps

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return the result, of the shape of x."""
        return self._kernel.rms_norm(x, self.weight, self.variance_epsilon)


@torch.inference_mode()
def fuse(model: nn.Module, kernel: Kernel | None, linears: Linears | None) -> None:
    """Replace MLPs and norms of a model where there is a kernel, and pack its linear layers.

    One by one, so that memory holds each weight once. A weight that something else uses too, as an
    embedding tied to the head, stays besides.
    """
    if kernel is not None and linears is not None:
        _replace(model, lambda module: _gated_mlp(module, kernel, linears))
        _replace(model, lambda module: _rms_norm(module, kernel))
    if linears is not None:
        _replace(model, lambda module: _linear(module, linears))


def _replace(model: nn.Module, other: Callable[[nn.Module], nn.Module | None]) -> None:
    dtype = next(model.parameters()).dtype
    for module in list(model.modules()):
        for name, child in list(module.named_children()):
            if any(parameter.dtype != dtype for parameter in child.parameters(recurse=False)):
                continue  # a gate or a norm that is kept in float32 computes there
            if (replacement := other(child)) is not None:
                setattr(module, name, replacement)


def _gated_mlp(module: nn.Module, kernel: Kernel, linears: Linears) -> nn.Module | None:
    gate, up, both, down = (getattr(module, f"{name}_proj", None) for name in ("gate", "up", "gate_up", "down"))
    act: Any = getattr(module, "act_fn", getattr(module, "activation_fn", None))
    x = torch.linspace(-4, 4, 64)
    if type(down) is not nn.Linear or act is None or not torch.allclose(act(x), nn.functional.silu(x), atol=1e-6):
        return None
    if type(gate) is nn.Linear and type(up) is nn.Linear and (gate.bias is None) == (up.bias is None):
        weight = torch.cat([gate.weight, up.weight])
        bias = None if gate.bias is None else torch.cat([gate.bias, up.bias])
    elif type(both) is nn.Linear:
        weight, bias = both.weight, both.bias
    else:
        return None
    return _if_same(module, GatedMLP(kernel, PackedLinear(linears, weight, bias), down), weight)


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


def _if_same(module: nn.Module, replacement: nn.Module, weight: torch.Tensor) -> nn.Module | None:
    """Return the replacement if it gives the same numbers for some x [8, the last dim of `weight`]."""
    x = torch.linspace(-3, 3, 8 * weight.shape[-1]).sin().mul(2).view(8, -1).to(weight.dtype)
    own, new = module(x), replacement(x)
    worst = (own - new).abs().max() / own.abs().max()
    return replacement if worst <= _CLOSE[weight.dtype] else None


def _linear(module: nn.Module, linears: Linears) -> nn.Module | None:
    if type(module) is nn.Linear:
        return PackedLinear(linears, module.weight, module.bias)
    if type(module) is Conv1D:  # a linear layer of GPT-2, its weight the other way round
        weight: Any = module.weight
        return PackedLinear(linears, weight.t(), module.bias)  # type: ignore[arg-type]  # transformers is not typed
    return None
