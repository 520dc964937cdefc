"""Estimate which choices rounding could have changed: for the `hf` engine in float32, where a batch changes rounding.

A batch changes logits by a little noise. A row is close where that noise could have made its token another one; such a
row is generated again alone. The estimate errs towards close: it costs time, and no answer.
"""

import torch
from torch.nn.functional import threshold

from hpc.engine.sampling.metadata import DrawnRows, PenalisedRows

NOISE = 1e-5
"""How far rounding in float32 moves the difference of two logits from one batch to another, as a share of the largest:
three times the maximum that was seen (1.5e-4 at 43, a model of 30 layers)."""
_MASKED = 1e9
"""Logits below minus this are a model's way to forbid a token, and say nothing of how large its logits are."""


class Rounding:
    """How much rounding may change a logit, as a share of the row's largest."""

    def __init__(self, noise: float = NOISE) -> None:
        self._noise = noise

    def check(
        self,
        logits: torch.Tensor,
        scores: torch.Tensor,
        best: torch.Tensor,
        tokens: torch.Tensor,
        penalised: PenalisedRows | None,
    ) -> "Checked":
        """Return what rounding means for the rows of one step.

        `logits` are the model's and `scores` those with penalties, [rows, vocabulary]; `best` and `tokens`, [rows],
        are the largest score and where it is.
        """
        lowest = threshold(logits.float(), -_MASKED, 0.0).amin(dim=-1)
        noise = self._noise * torch.maximum(logits.amax(dim=-1), -lowest).double()
        if penalised is not None and penalised.repeats:  # it stretches differences of logits
            repetition = penalised.repetition_penalty[:, 0]
            noise[penalised.rows] *= torch.maximum(repetition, 1 / repetition)
        second = scores.scatter(-1, tokens[:, None], -torch.inf).amax(dim=-1)
        return Checked(noise, best - second < noise)


class Checked:
    """Which rows of a step are close: greedy ones where the best two scores are, drawn ones by their `Witness`."""

    def __init__(self, noise: torch.Tensor, close: torch.Tensor) -> None:
        self._noise = noise
        self._greedy_close = close
        self._draws: list[tuple[torch.Tensor, Witness]] = []

    def of_draw(self, group: DrawnRows) -> "Witness":
        """Return what `draw` is to be given for these rows."""
        witness = Witness(self._noise[group.rows, None], group.temperature)
        self._draws.append((group.rows, witness))
        return witness

    @property
    def close(self) -> torch.Tensor:
        """[rows] bool, when all draws are done."""
        close = self._greedy_close
        for rows, witness in self._draws:
            close[rows] = witness.close
        return close


class Witness:
    """Follows one call of `draw`, and tells which of its rows are close.

    `noise` and `temperature` are [rows, 1] float64.

    `draw` computes probabilities in float32, and sums of blocks of them too; all other sums are float64. Of itself each
    is wrong by at most 2e-6 (`exp` 20 units in the last place, the sum of a block 13) and 4e-7 of the largest logit
    over the temperature, so that a sum c of them moves by at most twice that times c*(1 - c). A noise of 1e-5 of the
    largest logit counts for more wherever that is above 2.4 temperatures.
    """

    def __init__(self, noise: torch.Tensor, temperature: torch.Tensor) -> None:
        # By how much noise moves a sum c of probabilities, as a share of c*(1 - c): at most by the change of
        # the logits; measured on a model of 30 layers, where the changes cancel out, a twelfth of `noise`.
        self._shift = noise / temperature / 4
        self._disputed: torch.Tensor | float = 0.0
        """Probability that noise could add to the kept tokens or take from them, [rows, 1]."""
        self.close = torch.zeros(len(noise), dtype=torch.bool, device=noise.device)

    def min_weight(self, min_p: torch.Tensor) -> torch.Tensor:
        """Return down to which share of the largest probability tokens must be ranked; min_p alone is too little."""
        return min_p * (1 - 4 * self._shift)

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
        """Take what decided which tokens are kept.

        `weight`, descending, are probabilities over the largest, `reached` their sums, `mass` the sum of what top_k
        and min_p leave, `last` the index of the last kept one. That one's probability is disputed if its place is: by
        the next one, nearly as probable, or by top_p, which is reached nearly where it or the next one begins; and
        that of all kept tokens that are nearly as probable as the last. Disputed is also that of all tokens that have
        nearly the least probability which min_p allows.
        """
        share, min_share, shift = weight / mass, min_p / mass, self._shift
        at_min = in_top_k & (min_share > 0) & ((share - min_share).abs() < 4 * shift * min_share)
        at_min[:, 0] = False  # it is allowed whatever its probability
        allowed = (share * at_min).sum(dim=-1, keepdim=True)
        following = (last + 1).clamp(max=share.shape[-1] - 1)
        p_last, p_next = share.gather(-1, last), share.gather(-1, following)
        disputed = (p_last - p_next < 2 * shift * p_last) & (following > last)
        past_top_p = share.cumsum(dim=-1) - share - torch.where(top_p < 1, top_p, torch.inf)
        for index in (last, following):
            disputed |= past_top_p.gather(-1, index).abs() < shift + allowed
        in_band = kept & (share <= p_last * (1 + 4 * shift))
        at_last = torch.where(disputed, 2 * (share * in_band).sum(dim=-1, keepdim=True), 0.0)
        of_allowed = torch.where(shift > 0, at_last + 2 * allowed, 0.0)
        self._disputed = mass / reached.gather(-1, last) * of_allowed

    def note_drawn(self, below: torch.Tensor, above: torch.Tensor, target: torch.Tensor, total: torch.Tensor) -> None:
        """Take the sums of probability before and with the drawn token, what was to be reached, and the whole sum."""
        moved = [self._shift * c * (1 - c / total) + self._disputed for c in (above, below)]
        self.close = ((above - target < moved[0]) | (target - below < moved[1])).squeeze(-1)
