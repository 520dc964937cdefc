"""The experts of a layer, each a product of its own in which a row does not depend on how many others there are."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn

ROW_MULTIPLE = 8
"""torch's matrix products have a multiple of this many rows: with fewer, they sum in another order."""


class Padded:
    """torch's linear layers, with rows of zeros up to a multiple of `ROW_MULTIPLE`."""

    def pack(self, weight: torch.Tensor) -> torch.Tensor:
        """Return the weight as it is."""
        return weight

    def linear(self, x: torch.Tensor, packed: torch.Tensor, bias: torch.Tensor | None, n: int) -> torch.Tensor:  # noqa: ARG002
        """Return x [rows, k] times a weight plus a bias, [rows, n]."""
        padded = nn.functional.pad(x, (0, 0, 0, -len(x) % ROW_MULTIPLE))
        return nn.functional.linear(padded, packed, bias)[: len(x)]


class Expert(nn.Module):
    """`up` computes gate and up of a row, `gate` makes one of both, `down` leads back."""

    def __init__(self, up: nn.Module, gate: Callable[[torch.Tensor], torch.Tensor], down: nn.Module) -> None:
        super().__init__()
        self.up, self.gate, self.down = up, gate, down

    def forward(self, x: torch.Tensor) -> Any:
        """Return the result, of the shape of x."""
        return self.down(self.gate(self.up(x)))


class Experts(nn.Module):
    """The experts of a layer, of which each token meets k."""

    def __init__(self, experts: Sequence[nn.Module]) -> None:
        super().__init__()
        self.experts = nn.ModuleList(experts)

    def forward(self, hidden_states: torch.Tensor, chosen: torch.Tensor, shares: torch.Tensor) -> torch.Tensor:
        """Return for hidden states [tokens, size] the sum over their experts, chosen and shares [tokens, k]."""
        order = chosen.flatten().argsort(stable=True)  # by expert
        counts = chosen.flatten().bincount(minlength=len(self.experts)).tolist()
        parts = zip(self.experts, torch.split(hidden_states[order // chosen.shape[1]], counts), strict=True)
        made = torch.cat([expert(part) for expert, part in parts if len(part)])
        made = (made * shares.flatten()[order, None]).to(hidden_states.dtype)
        first, *others = order.argsort().view(chosen.shape).unbind(1)
        out = made[first]
        for other in others:
            out += made[other]
        return out


def parts(own: Any, name: str) -> list[tuple[torch.Tensor, torch.Tensor | None]]:
    """Return the weight [n, k] and the bias [n] of each expert of a module of transformers."""
    weight, bias = getattr(own, name), getattr(own, f"{name}_bias", None)
    weights = weight.detach().transpose(1, 2) if own.is_transposed else weight.detach()
    return [(each, None if bias is None else bias[index]) for index, each in enumerate(weights)]
