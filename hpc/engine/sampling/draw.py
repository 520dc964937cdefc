"""Turn logits into tokens: apply penalties, find the most probable token, draw one by a uniform number.

The number is a hash of (seed, id, sample index, position) only, so the drawn token does not depend on the
batch, the order or the rank. The token is drawn by inverting the cumulative distribution.
"""

import hashlib
import json
from collections.abc import Callable
from typing import Protocol

import numpy as np
import numpy.typing as npt
import torch
from torch.nn.functional import pad, threshold

from hpc.request import RowId

_BLOCK = 1024
"""Logits of which the largest is found at once on the way to the largest of all: near the root of a vocabulary."""
_NUMPY_LOGITS = 2**19
"""Logits up to which numpy finds the largest sooner than torch's two stages."""
_SUMMED = 256
"""Probabilities that are summed in float32: short enough that the sum is right to 13 units in the last place."""
_RANKED_FIRST = 1024
"""Most probable tokens that are ranked first: nearly always they tell what a top_p keeps."""
ALL = 2**31
"""As `ranked`: all tokens."""
BY_MASS = -1
"""As `ranked`: no row has a top_k, so that sums of probability alone decide."""
_ZERO_BITS = {torch.bfloat16: 16, torch.float16: 13}
"""Last bits of a float32 that are 0 in every number of the type."""
_LOWEST, _HIGHEST = -(0x7F800000 + 1), 0x7F800000
"""The infinities, as `_float_of` counts."""
_GOLDEN = np.uint64(0x9E3779B97F4A7C15)
"""2**64 over the golden ratio: the increment of SplitMix64."""


class Witness(Protocol):
    """Follows what a draw is decided by; `hpc.engine.sampling.rounding` has one."""

    def min_weight(self, min_p: torch.Tensor) -> torch.Tensor:
        """Return down to which share of the largest probability tokens must be ranked, [rows, 1]."""

    def note_cut(
        self,
        weight: torch.Tensor,
        reached: torch.Tensor,
        mass: torch.Tensor,
        kept: torch.Tensor,
        last: torch.Tensor,
        in_top_k: torch.Tensor,
        top_p: torch.Tensor,
        min_p: torch.Tensor,
    ) -> None:
        """Take the ranked tokens, [rows, ranked], and which of them are kept."""

    def note_drawn(self, below: torch.Tensor, above: torch.Tensor, target: torch.Tensor, total: torch.Tensor) -> None:
        """Take where the drawn token lies in the sum of probabilities, [rows, 1]."""


def stream(seed: int, row_id: RowId, sample: int = 0) -> int:
    """Return the 64 bits from which the random numbers of a sample start."""
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


def most_probable(logits: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the largest logit of each row, and the first token that has it. NaN counts as the largest.

    In two stages, the maxima of blocks and then one block: several times faster than torch's argmax,
    which looks at tokens one by one. Of few logits numpy finds it at once.
    """
    rows, vocabulary = logits.shape
    if logits.device.type == "cpu" and logits.numel() <= _NUMPY_LOGITS:
        values = logits.float().numpy()
        found = values.argmax(axis=-1)
        return torch.from_numpy(values[np.arange(rows), found]), torch.from_numpy(found)
    block = min(_BLOCK, vocabulary)
    whole = vocabulary // block * block
    maxima = logits[:, :whole].view(rows, -1, block).amax(dim=-1)
    if whole < vocabulary:
        maxima = torch.cat([maxima, logits[:, whole:].amax(dim=-1, keepdim=True)], dim=-1)
    best, which = maxima.max(dim=-1, keepdim=True)
    # The last block begins early if it is short; a token in two blocks is found in the first of them.
    begin = (which * block).clamp(max=vocabulary - block)
    inside = logits.gather(-1, begin + torch.arange(block, device=logits.device))
    return best.squeeze(-1), (begin + inside.argmax(dim=-1, keepdim=True)).squeeze(-1)


def penalise(
    logits: torch.Tensor,
    seen: torch.Tensor | None,
    counts: torch.Tensor | None,
    repetition: torch.Tensor,
    presence: torch.Tensor,
    frequency: torch.Tensor,
) -> torch.Tensor:
    """Return logits [rows, vocabulary] with penalties; these are [rows, 1].

    `seen` says which tokens are in the prompt or were generated (the repetition penalty of CTRL,
    Keskar et al. 2019, as in transformers), `counts` how often each was generated (presence and
    frequency as in OpenAI's interface); None stands for no such penalty. Repetition first, as in vLLM.
    """
    if seen is not None:
        logits = torch.where(seen, torch.where(logits < 0, logits * repetition, logits / repetition), logits)
    if counts is not None:
        logits = logits - frequency * counts - presence * (counts > 0)
    return logits


def draw(
    logits: torch.Tensor,
    temperature: torch.Tensor,
    top_p: torch.Tensor,
    top_k: torch.Tensor,
    min_p: torch.Tensor,
    uniform: torch.Tensor,
    ranked: int = ALL,
    reads: bool = True,
    witness: Witness | None = None,
) -> torch.Tensor:
    """Draw a token for each row of logits [rows, vocabulary]; return them, [rows]. The columns are [rows, 1] float64.

    top_k and min_p first, then top_p on what is left, as in vLLM: the smallest set of the most
    probable tokens whose renormalised probability reaches top_p. `ranked` is how many of the most
    probable tokens are ranked for that, more than any top_k; 0 says that nothing is cut, `BY_MASS`
    that no row has a top_k. Without `reads` no value is read, which on a GPU would wait for it.

    The distribution is inverted in the order of the token ids and not of probability: where two
    tokens are nearly as probable, and far down many are, rounding swaps their places in the latter.
    Probabilities are float32, as are their sums in blocks; all other sums are float64.
    """
    block, zero_bits = min(_SUMMED, logits.shape[-1]), _ZERO_BITS.get(logits.dtype, 0)
    logits = pad(logits.float(), (0, -logits.shape[-1] % block), value=-torch.inf)
    if ranked == BY_MASS and not reads and witness is None:
        logits = _cut_by_mass(logits, temperature, top_p, min_p, zero_bits)
    elif ranked:
        size = logits.shape[-1]
        max_ranked = size if ranked == BY_MASS else min(ranked, size)
        logits = _cut(logits, temperature, top_p, top_k, min_p, max_ranked, reads, witness)
    # In two stages, the sums of blocks and then one block.
    blocks, ends = _summed(logits, temperature)
    total = ends[:, -1:]
    target = uniform * total
    which = (ends <= target).sum(dim=-1, keepdim=True)
    begin = pad(ends, (1, 0)).gather(-1, which)
    probability = blocks.gather(1, which[:, :, None].expand(-1, -1, block)).squeeze(1)
    reached = probability.cumsum(dim=-1, dtype=torch.float64)
    # The first token whose sum exceeds the target, or the last of any probability where rounding has
    # made the sum of the block larger; a token of probability 0 never is.
    at = ((reached <= target - begin) & (reached < reached[:, -1:])).sum(dim=-1, keepdim=True)
    if witness is not None:
        above = begin + reached.gather(-1, at)
        witness.note_drawn(above - probability.gather(-1, at), above, target, total)
    return (which * block + at).squeeze(-1)


def _summed(logits: torch.Tensor, temperature: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the probabilities in blocks, [rows, blocks, block], and up to the end of each block their sum."""
    blocks = (logits / temperature.float()).softmax(dim=-1).view(len(logits), -1, min(_SUMMED, logits.shape[-1]))
    return blocks, blocks.sum(dim=-1).cumsum(dim=-1, dtype=torch.float64)


def _largest(logits: torch.Tensor, count: int, reads: bool) -> torch.Tensor:
    """Return the largest logits of each row, descending."""
    if reads:  # torch would take ten times as long
        return torch.from_numpy(np.sort(np.partition(logits.numpy(), -count)[:, -count:])).flip(-1)
    return (logits.sort(descending=True) if count == logits.shape[-1] else logits.topk(count)).values


def _cut(
    logits: torch.Tensor,
    temperature: torch.Tensor,
    top_p: torch.Tensor,
    top_k: torch.Tensor,
    min_p: torch.Tensor,
    max_ranked: int,
    reads: bool,
    witness: Witness | None,
) -> torch.Tensor:
    """Return the logits less a constant, with -inf for the tokens that top_k, min_p and top_p cut.

    Where values can be read few of the most probable tokens are ranked at first, and more where these
    do not tell what is kept; the result is the same.
    """
    only_top_p = (top_k == 0) & (min_p == 0)
    count, whole = max_ranked, None
    if reads:
        count = min(_RANKED_FIRST, max_ranked)
        if only_top_p.any():
            blocks, ends = _summed(logits, temperature)
            whole = ends[:, -1:] / blocks.amax(dim=(1, 2))[:, None]
    while True:
        ordered = _largest(logits, count, reads)
        weight = ((ordered.double() - ordered[:, :1]) / temperature).exp()
        in_top_k = (top_k == 0) | (torch.arange(count, device=logits.device) < top_k)
        allowed = in_top_k & (weight >= min_p)
        reached = weight.cumsum(dim=-1)
        mass = reached.gather(-1, (allowed.sum(dim=-1, keepdim=True) - 1).clamp(min=0))
        mass = mass if whole is None else torch.where(only_top_p, whole, mass)
        kept = allowed & ((top_p >= 1) | (reached - weight < top_p * mass))
        # A last token that is kept, or of nearly the least probability, says nothing of those after it.
        near = in_top_k & (weight >= (min_p if witness is None else witness.min_weight(min_p)))
        if count == max_ranked or not torch.where(only_top_p, kept, near)[:, -1].any():
            break
        count = min(4 * count, max_ranked)
    last = (kept.sum(dim=-1, keepdim=True) - 1).clamp(min=0)  # of a row that is not finite none is kept
    if witness is not None:
        witness.note_cut(weight, reached, mass, kept, last, in_top_k, top_p, min_p)
    border = ordered.gather(-1, last)
    room = None
    if not reads or ((ordered == border) & ~kept).any():
        room = last + 1 - (ordered > border).sum(dim=-1, keepdim=True)
    return _without(logits, border, room, ordered[:, :1], temperature)


def _cut_by_mass(
    logits: torch.Tensor, temperature: torch.Tensor, top_p: torch.Tensor, min_p: torch.Tensor, zero_bits: int
) -> torch.Tensor:
    """Return the same as `_cut` if no row has a top_k, without sorting, which is the slowest operation on a GPU.

    The last kept token is the one above which the mass first falls below top_p. Its logit is found by halving the
    range of all float32 numbers, or of those whose `zero_bits` last bits are 0, until one is left.
    """
    largest, heat = logits.amax(dim=-1, keepdim=True), temperature.float()
    floor = (largest + temperature * min_p.log()).float()
    weight = ((logits - largest) / heat).exp() * (logits >= floor)
    above: Callable[[torch.Tensor], torch.Tensor] = lambda value: (  # noqa: E731
        (weight * (logits > value)).sum(dim=-1, keepdim=True, dtype=torch.float64)
    )
    enough = top_p * weight.sum(dim=-1, keepdim=True, dtype=torch.float64)
    low, high = (torch.full_like(enough, end >> zero_bits, dtype=torch.int64) for end in (_LOWEST, _HIGHEST))
    for _ in range(32 - zero_bits):
        middle = (low + high) >> 1
        is_kept = above(_float_of(middle, zero_bits)) < enough
        low, high = torch.where(is_kept, low, middle + 1), torch.where(is_kept, middle, high)
    found = _float_of(high, zero_bits)
    room = ((enough - above(found)) / ((found - largest) / heat).exp()).ceil().clamp(min=1)
    return _without(logits, torch.maximum(found, floor), room, largest, temperature)


def _float_of(number: torch.Tensor, zero_bits: int) -> torch.Tensor:
    """Return the float32 with a number in the order of all whose `zero_bits` last bits are 0: 0 is 0, -0 is -1."""
    number = (number << zero_bits) | torch.where(number < 0, (1 << zero_bits) - 1, 0)
    return torch.where(number < 0, number ^ 0x7FFFFFFF, number).to(torch.int32).view(torch.float32)


def _without(
    logits: torch.Tensor,
    border: torch.Tensor,
    room: torch.Tensor | None,
    largest: torch.Tensor,
    temperature: torch.Tensor,
) -> torch.Tensor:
    """Return the logits less a constant, with -inf below `border`, and at it for all but the first `room`."""
    if room is not None:  # of equal logits the first tokens are kept, as argmax does
        level = logits == border
        logits = logits.masked_fill(level & (level.cumsum(dim=-1, dtype=torch.int32) > room), -torch.inf)
    # Several times as fast as a mask; what else is cut has less than 1e-43 of the largest probability.
    lowest = torch.maximum(border, largest - 100 * temperature.float())
    under = lowest.nextafter(torch.full_like(lowest, -torch.inf))
    return threshold(logits - under, 0.0, -torch.inf)
