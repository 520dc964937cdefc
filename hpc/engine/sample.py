"""Choose the next token of each row: from its logits, its parameters and one uniform number.

The number is a hash of (seed, id, sample index, position) and of nothing else, so what is drawn does
not depend on the batch, the order or the rank. The token is drawn by inverting the cumulative
distribution.
"""

import hashlib
import json
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import torch

from hpc.job import SamplingParams
from hpc.records import RowId

_MASKED = 1e9
_GOLDEN = np.uint64(0x9E3779B97F4A7C15)


def stream(seed: int, row_id: RowId, sample: int = 0) -> int:
    """Return the 64 bits that a sample's random numbers start from."""
    text = json.dumps([seed, row_id, sample]).encode()
    return int.from_bytes(hashlib.blake2b(text, digest_size=8, person=b"scattergen").digest(), "little")


def uniforms(streams: npt.NDArray[np.uint64], positions: npt.NDArray[np.uint64]) -> npt.NDArray[np.float64]:
    """Return one uniform number in [0, 1) for each stream and position, both of shape [rows].

    The output function of SplitMix64 (Steele, Lea and Flood 2014) at counter `position`; 53 bits.
    """
    with np.errstate(over="ignore"):
        z = streams + (positions + np.uint64(1)) * _GOLDEN
        z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        z = z ^ (z >> np.uint64(31))
    fraction: npt.NDArray[np.float64] = (z >> np.uint64(11)).astype(np.float64) * 2.0**-53
    return fraction


class Sampler:
    """Chooses tokens for a fixed batch of rows.

    `noise` is by how much rounding may change a logit from one batch to another, as a share of the
    row's largest; 0 where that is not of interest.
    """

    def __init__(
        self, sampling: Sequence[SamplingParams], ids: Sequence[RowId], device: torch.device, noise: float = 0.0
    ) -> None:
        self._device = device
        self._noise = noise
        drawn = [row for row, params in enumerate(sampling) if not params.greedy]
        self._drawn = torch.tensor(drawn, dtype=torch.long, device=device)
        self._streams = np.array([stream(sampling[row].seed, ids[row]) for row in drawn], dtype=np.uint64)
        self._temperature = self._column([sampling[row].temperature for row in drawn])
        self._top_p = self._column([sampling[row].top_p for row in drawn])
        self._top_k = self._column([sampling[row].top_k for row in drawn])

    def choose(self, logits: torch.Tensor, position: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Return a token for each row and whether noise could have made it another, both of shape [rows].

        `logits` has shape [rows, vocabulary]; `position` counts the tokens generated before, the same
        for all rows. Greedy rows take the first of the most probable tokens.
        """
        best = logits.topk(2, dim=-1).values
        tokens = logits.argmax(dim=-1)
        size = logits.abs()
        # Tokens that the model masks, with -inf or the like, say nothing of how large its logits are.
        noise = self._noise * size.masked_fill(size > _MASKED, 0.0).amax(dim=-1).double()
        close = best[:, 0] - best[:, 1] < noise
        if len(self._drawn):
            positions = np.full(len(self._streams), position, dtype=np.uint64)
            uniform = torch.from_numpy(uniforms(self._streams, positions)).to(self._device)
            tokens[self._drawn], close[self._drawn] = draw(
                logits[self._drawn],
                self._temperature,
                self._top_p,
                self._top_k,
                uniform[:, None],
                noise[self._drawn, None],
            )
        return tokens, close

    def _column(self, values: list[float] | list[int]) -> torch.Tensor:
        return torch.tensor(values, dtype=torch.float64, device=self._device)[:, None]


def draw(
    logits: torch.Tensor,
    temperature: torch.Tensor,
    top_p: torch.Tensor,
    top_k: torch.Tensor,
    uniform: torch.Tensor,
    noise: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Draw a token for each row of logits [rows, vocabulary]; the other arguments are [rows, 1], float64.

    top_k first, then top_p on what is left, as is usual: the smallest set of the most probable
    tokens whose renormalised probability reaches top_p. The distribution is inverted in the order
    of the token ids and not of probability: where two tokens are nearly as probable, and far down
    many are, rounding swaps their places in the latter. Returns the tokens and whether a change of
    the logits by `noise` could change them, both of shape [rows].
    """
    probability = (logits.double() / temperature).softmax(dim=-1)
    # By how much noise moves a sum c of probabilities, as a share of c*(1 - c): at most by the change of
    # the logits; measured on a model of 30 layers, where the changes cancel out, a twelfth of `noise`.
    shift = noise / temperature / 4
    unsure: torch.Tensor | float = 0.0
    if bool((top_p < 1).any()) or bool((top_k > 0).any()):
        # Stable: equal probabilities keep the order of their tokens, as argmax does.
        ordered, tokens = probability.sort(dim=-1, descending=True, stable=True)
        rank = torch.arange(ordered.shape[-1], device=ordered.device)
        in_top_k = (top_k == 0) | (rank < top_k)
        total = (ordered * in_top_k).sum(dim=-1, keepdim=True)
        before = ordered.cumsum(dim=-1) - ordered
        cut = torch.where(top_p < 1, top_p * total, torch.inf)
        kept = in_top_k & (before < cut)
        probability = probability * torch.zeros_like(kept).scatter_(-1, tokens, kept)
        unsure = _unsure_mass(ordered, before, kept, cut, shift)
    reached = probability.cumsum(dim=-1)
    target = uniform * reached[:, -1:]
    # The first token whose sum exceeds the target; a token of probability 0 never is.
    chosen = (reached <= target).sum(dim=-1, keepdim=True).clamp_(max=probability.shape[-1] - 1)
    above = reached.gather(-1, chosen)
    below = above - probability.gather(-1, chosen)
    moved = [shift * c * (1 - c / reached[:, -1:]) + unsure for c in (above, below)]
    close = (above - target < moved[0]) | (target - below < moved[1])
    return chosen.squeeze(-1), close.squeeze(-1)


def _unsure_mass(
    ordered: torch.Tensor, before: torch.Tensor, kept: torch.Tensor, cut: torch.Tensor, shift: torch.Tensor
) -> torch.Tensor:
    """Return the probability, [rows, 1], that noise could add to or take from the kept tokens.

    That is about the last kept token's if its place is disputed: by the next one, nearly as
    probable, or by the cut, which lies nearly where it or the next one begins; and that of all kept
    tokens that are nearly as probable as the last.
    """
    last = kept.sum(dim=-1, keepdim=True) - 1
    following = (last + 1).clamp(max=ordered.shape[-1] - 1)
    p_last, p_next = ordered.gather(-1, last), ordered.gather(-1, following)
    disputed = (p_last - p_next < 2 * shift * p_last) & (following > last)
    for index in (last, following):
        disputed |= (before.gather(-1, index) - cut).abs() < shift
    in_band = kept & (ordered <= p_last * (1 + 4 * shift))
    return torch.where(disputed & (shift > 0), 2 * (ordered * in_band).sum(dim=-1, keepdim=True), 0.0)
