"""Compute experts, and torch's linear layers, so that no row depends on the number of other rows."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn

ROW_MULTIPLE = 16
"""Rows of torch's products are filled up to a multiple of it. With one thread MKL then sums every row in one order
(seen on AVX512 for 1 to 160 rows and inner sizes of 64 to 4096); with 8, from an inner size of 192 on, it does not."""


class RowBlocks:
    """torch's linear layers, in products of `ROW_MULTIPLE` rows each where there are several threads.

    Of larger products with few columns threads share out the sum, and how depends on the number of rows. It costs
    nothing up to that many rows, and three times the time for hundreds.
    """

    def pack(self, weight: torch.Tensor) -> torch.Tensor:
        """Return the weight as it is."""
        return weight

    def linear(self, x: torch.Tensor, packed: torch.Tensor, bias: torch.Tensor | None, n: int) -> torch.Tensor:
        """Return x [..., k] times a weight plus a bias, [..., n]."""
        rows = x.reshape(-1, x.shape[-1])
        made: torch.Tensor = by_blocks(lambda block: nn.functional.linear(block, packed, bias), rows)
        return made.view(*x.shape[:-1], n)


def by_blocks(compute: Callable[[torch.Tensor], Any], x: torch.Tensor) -> Any:
    """Return what `compute` makes of rows x [rows, k], a tensor or several with a line for each row, block by block."""
    padded = nn.functional.pad(x, (0, 0, 0, -len(x) % ROW_MULTIPLE))
    if torch.get_num_threads() == 1 or len(padded) <= ROW_MULTIPLE:
        made = compute(padded)
    else:
        blocks = [compute(block) for block in torch.split(padded, ROW_MULTIPLE)]
        tensors = isinstance(blocks[0], torch.Tensor)
        made = torch.cat(blocks) if tensors else tuple(map(torch.cat, zip(*blocks, strict=True)))
    return made[: len(x)] if isinstance(made, torch.Tensor) else tuple(tensor[: len(x)] for tensor in made)


def choose_by_blocks(router: Any) -> None:
    """Let what chooses between experts, for hidden states of any shape [..., size], compute row block by row block."""
    own = router.forward
    router.forward = lambda hidden_states: by_blocks(own, hidden_states.reshape(-1, hidden_states.shape[-1]))


class Expert(nn.Module):
    """One expert: `up` projects to gate and up, `gate` combines the two, `down` projects back."""

    def __init__(self, up: nn.Module, gate: Callable[[torch.Tensor], torch.Tensor], down: nn.Module) -> None:
        super().__init__()
        self.up, self.gate, self.down = up, gate, down

    def forward(self, x: torch.Tensor) -> Any:
        """Return the output, of the shape of x."""
        return self.down(self.gate(self.up(x)))


class Experts(nn.Module):
    """The experts of a layer; each token is sent to k of them."""

    def __init__(self, experts: Sequence[nn.Module]) -> None:
        super().__init__()
        self.experts = nn.ModuleList(experts)

    def forward(self, hidden_states: torch.Tensor, chosen: torch.Tensor, shares: torch.Tensor) -> torch.Tensor:
        """Return the weighted sum of each token's experts, [tokens, size]; `chosen` and `shares` are [tokens, k]."""
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
