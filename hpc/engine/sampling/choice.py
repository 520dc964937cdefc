"""The sampled tokens of a step, kept on the device until the host reads them."""

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch

from hpc.request import TokenLogprobs

_MIN_LOGPROB = -9999.0
"""Stands for minus infinity, as in vLLM: JSON has none."""


@dataclass(frozen=True)
class Logprobs:
    """Log probabilities of the chosen and of the most probable tokens of some rows, still on the device."""

    rows: tuple[int, ...]
    """The rows of the batch that asked."""
    counts: tuple[int, ...]
    """Number of most probable tokens that each of them asked for."""
    chosen: torch.Tensor
    """[len(rows)]"""
    top: torch.Tensor
    """[len(rows), the largest count]; descending"""
    top_tokens: torch.Tensor
    """[len(rows), the largest count]"""

    def to_host(self) -> "Logprobs":
        """Start copying to the host; return the copies."""
        return Logprobs(self.rows, self.counts, *map(_to_host, (self.chosen, self.top, self.top_tokens)))

    def read(self) -> dict[int, TokenLogprobs]:
        """Return the log probabilities by row; this waits for the device."""
        chosen, top, tokens = self.chosen.tolist(), self.top.tolist(), self.top_tokens.tolist()
        found: dict[int, TokenLogprobs] = {}
        for at, (row, count) in enumerate(zip(self.rows, self.counts, strict=True)):
            pairs = zip(tokens[at][:count], top[at][:count], strict=True)
            found[row] = written(chosen[at]), tuple((token, written(value)) for token, value in pairs)
        return found


class SamplerOutput(NamedTuple):
    """The next token of each row, on the device."""

    tokens: torch.Tensor
    """[rows] int64; for a row whose logits are not finite, any valid token."""
    largest: torch.Tensor
    """[rows]: the largest logit; infinite or NaN if the logits of the row are not finite numbers."""
    logprobs: Logprobs | None = None
    """None where no row asks for them."""
    close: torch.Tensor | None = None
    """[rows] bool: rounding could have made it another token; None where the sampler has no `Rounding`."""

    @property
    def finite(self) -> npt.NDArray[np.bool_]:
        """[rows]: whether the logits of the row are finite numbers. This waits for the device."""
        finite: npt.NDArray[np.bool_] = np.isfinite(self.largest.float().numpy(force=True))
        return finite

    def to_host(self) -> "SamplerOutput":
        """Start copying all but `close` to the host; the copies may be read when the device has finished the step."""
        logprobs = self.logprobs and self.logprobs.to_host()
        return SamplerOutput(_to_host(self.tokens), _to_host(self.largest), logprobs, self.close)


def written(value: float) -> float:
    """Return a log probability as it is written to the output: finite, six decimals."""
    return round(max(value, _MIN_LOGPROB), 6)


def _to_host(tensor: torch.Tensor) -> torch.Tensor:
    """Start copying a tensor from a GPU, behind all work that the GPU has been given; return the host's copy."""
    pinned = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
    return pinned.copy_(tensor, non_blocking=True)
