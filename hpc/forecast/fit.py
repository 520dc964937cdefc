"""Fit: whether the GPUs that a rank is to have hold a model's weights, and how many do. Pure."""

from dataclasses import dataclass

from hpc.engine.bounds import evenly
from hpc.model.needs import Needs

USABLE = 0.8
"""Share of a GPU's memory that weights may take: keys and values, and what a step computes, need the rest."""
MAX_GPUS = 16
"""Of a node, where nothing says how many it has."""


@dataclass(frozen=True)
class Fit:
    """What the weights of a model need of GPUs."""

    weight_bytes: int
    gpu_bytes: int | None
    """Memory of a GPU; None where nothing says it."""
    gpus: int
    """On how many a rank is to keep the model."""
    needed: int | None
    """The fewest GPUs that hold it; None where that is not known, or a node has too few."""
    shared: bool = True
    """Whether an engine shares such a model out over GPUs."""

    def __str__(self) -> str:
        """Return it in words, with the way out where it does not fit."""
        weights = f"weights: {_gib(self.weight_bytes)}"
        if self.gpu_bytes is None:
            return f"{weights}; whether a GPU holds them is not known here: say its memory with --gpu-gib"
        each, place = _gib(self.weight_bytes / self.gpus), f"a GPU of {_gib(self.gpu_bytes)}"
        if self.weight_bytes <= self.gpus * USABLE * self.gpu_bytes:
            fewer = f"; {self.needed} would do (--replica-gpus)" if self.needed and self.needed < self.gpus else ""
            return f"{weights}, {each} of them on {place}{fewer}"
        refused = f"{weights}, and {each} of them do not fit {place}, which needs a fifth for other things"
        if not self.shared:
            return f"{refused}: an encoder-decoder stays on one GPU; take a larger one"
        if self.needed is None:
            return f"{refused}: no number of GPUs of a node does; take larger ones, or --vllm.quantization"
        then = _gib(self.weight_bytes / self.needed)
        return f"{refused}: add --engine vllm --replica-gpus {self.needed} ({then} on each)"


def fit(needs: Needs, gpu_bytes: int | None, gpus: int, gpus_of_node: int | None) -> Fit:
    """Say what a model needs of GPUs of so much memory.

    A number of GPUs must divide the model's heads and the GPUs of a node; an encoder-decoder stays on one.
    """
    if gpu_bytes is None:
        return Fit(needs.weight_bytes, None, gpus, None)
    counts = [
        count
        for count in range(1, (1 if needs.has_encoder else gpus_of_node or MAX_GPUS) + 1)
        if evenly(needs.heads, needs.kv_heads, count) and (gpus_of_node or count) % count == 0
    ]
    enough = [count for count in counts if needs.weight_bytes <= count * USABLE * gpu_bytes]
    return Fit(needs.weight_bytes, gpu_bytes, gpus, min(enough, default=None), not needs.has_encoder)


def _gib(num_bytes: float) -> str:
    return f"{num_bytes / 2**30:.1f} GiB"
