"""Choose the next token of each row: from its logits, its parameters, its tokens and one uniform number.

The number is a hash of (seed, id, sample index, position) and of nothing else, so what is drawn does
not depend on the batch, the order or the rank. The token is drawn by inverting the cumulative
distribution.
"""

import hashlib
import json
from collections.abc import Collection
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch.nn.functional import pad, threshold

from hpc.job import SamplingParams
from hpc.records import Request, RowId, TokenLogprobs
from hpc.trim import ending_tokens

_MASKED = 1e9
_BLOCK = 1024
_AT_ONCE = 2**19
_SUMMED = 256
_LEAST_LOGPROB = -9999.0
_FEW = 128
_SOME = 1024
_ALL = 2**31
_CACHED = 2**19
_DRAWING = ("temperature", "top_p", "top_k", "min_p")
_PENALTIES = ("repetition_penalty", "presence_penalty", "frequency_penalty")
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


class Choice(NamedTuple):
    """The next token of each row; nothing here has been read from the device."""

    tokens: torch.Tensor
    """[rows] int64; of a row that is not finite some valid token."""
    close: torch.Tensor
    """[rows] bool: noise could have made it another token."""
    largest: torch.Tensor
    """[rows]: the largest logit, infinite or NaN in a row whose logits are no numbers."""
    logprobs: "Logprobs | None" = None
    """None where no row asks for them."""

    @property
    def finite(self) -> npt.NDArray[np.bool_]:
        """[rows]: the row's logits are numbers. This waits for the device."""
        finite: npt.NDArray[np.bool_] = np.isfinite(self.largest.float().numpy(force=True))
        return finite

    def to_host(self) -> "Choice":
        """Begin to copy all but `close` to the host, which must not look before the device is through with it."""
        logprobs = self.logprobs and self.logprobs.to_host()
        return Choice(_to_host(self.tokens), self.close, _to_host(self.largest), logprobs)


@dataclass(frozen=True)
class Logprobs:
    """Log probabilities of the chosen and of the most probable tokens of some rows, still on the device."""

    rows: tuple[int, ...]
    """The rows of the batch that asked."""
    counts: tuple[int, ...]
    """How many of the most probable tokens each of them asked for."""
    chosen: torch.Tensor
    """[len(rows)]"""
    top: torch.Tensor
    """[len(rows), the largest count]; descending"""
    top_tokens: torch.Tensor
    """[len(rows), the largest count]"""

    def to_host(self) -> "Logprobs":
        """Begin to copy all of it to the host."""
        return Logprobs(self.rows, self.counts, *map(_to_host, (self.chosen, self.top, self.top_tokens)))

    def read(self) -> dict[int, TokenLogprobs]:
        """Return them by row; this waits for the device."""
        chosen, top, tokens = self.chosen.tolist(), self.top.tolist(), self.top_tokens.tolist()
        found: dict[int, TokenLogprobs] = {}
        for at, (row, count) in enumerate(zip(self.rows, self.counts, strict=True)):
            pairs = zip(tokens[at][:count], top[at][:count], strict=True)
            found[row] = _written(chosen[at]), tuple((token, _written(value)) for token, value in pairs)
        return found


class Sampler:
    """Chooses tokens for rows that live in numbered slots, and come and go.

    `noise` is by how much rounding may change a logit from one batch to another, as a share of the
    row's largest; 0 where that is not of interest. `eos_token_ids` are the model's ending tokens,
    which `min_new_tokens` holds back.

    Everything that decides what is computed follows from the requests, and is known to the host:
    nothing is read from the device, which may lag behind; `blind` does without it on a CPU too, where
    values cost nothing to read. `cached` is how many logits are drawn from at a time there.
    """

    def __init__(
        self,
        slots: int,
        device: torch.device,
        noise: float = 0.0,
        eos_token_ids: Collection[int] = (),
        blind: bool = False,
        cached: int = _CACHED,
    ) -> None:
        self._device = device
        self._noise = noise
        self._eos_token_ids = eos_token_ids
        self._blind = blind
        self._cached = cached
        self._requests: list[Request | None] = [None] * slots
        self._endings: list[tuple[int, ...]] = [()] * slots
        self._streams = np.zeros(slots, dtype=np.uint64)
        self._positions = np.zeros(slots, dtype=np.uint64)
        self._seen: torch.Tensor | None = None
        """[slots, vocabulary] bool: the token is in the prompt or was generated."""
        self._counts: torch.Tensor | None = None
        """[slots, vocabulary] int32: how often the token was generated."""
        self._stale = [True] * slots
        """Whose lines in these two are a previous request's."""
        self._plan: _Plan | None = None
        self._held: tuple[tuple[int, ...], torch.Tensor, torch.Tensor] | None = None

    def set(self, slot: int, request: Request, sample: int = 0) -> None:
        """Let a sample of a new request take a slot; nothing of the previous one is left."""
        sampling = request.sampling
        self._requests[slot] = request
        self._endings[slot] = tuple(ending_tokens(sampling, self._eos_token_ids)) if sampling.min_new_tokens else ()
        self._streams[slot] = stream(sampling.seed, request.id, sample)
        self._positions[slot] = 0
        self._stale[slot] = True
        self._plan = self._held = None

    def choose(self, logits: torch.Tensor, slots: list[int]) -> Choice:
        """Return the next tokens of the requests in these slots, whose positions advance by one.

        `logits` has shape [rows, vocabulary], a row for each slot. Greedy rows take the first of the
        most probable tokens.
        """
        plan = self._plan_of(slots, logits.shape[-1])
        scores = self._altered(logits, plan)
        best, tokens = most_probable(scores)
        noise, close = None, plan.none
        if self._noise:
            noise = self._noise_of(logits) * plan.gain
            second = scores.scatter(-1, tokens[:, None], -torch.inf).amax(dim=-1)
            close = best - second < noise
        if plan.drawn:
            numbers = self._upload(uniforms(self._streams[plan.drawn_slots], self._positions[plan.drawn_slots]))
        for group in plan.drawn:
            tokens[group.rows], unsure = draw(
                scores.index_select(0, group.rows),
                group.temperature,
                group.top_p,
                group.top_k,
                group.min_p,
                numbers[group.part, None],
                None if noise is None else noise[group.rows, None],
                group.most,
                self._blind,
            )
            if noise is not None:
                close[group.rows] = unsure
        self._note(tokens, plan)
        if plan.drawn or plan.held:  # nothing else depends on them
            self._positions[plan.at] += np.uint64(1)
        largest = best if scores is logits else logits.amax(dim=-1)
        return Choice(tokens, close, largest, _logprobs_of(logits, tokens, plan))

    def _plan_of(self, slots: list[int], vocabulary: int) -> "_Plan":
        if self._plan is None or self._plan.slots != slots:
            # As many rows at a time as a processor keeps in its cache: twice as fast as all at once.
            together = max(1, self._cached // vocabulary) if self._device.type == "cpu" else len(slots)
            self._plan, self._held = self._make_plan(list(slots), together), None
        return self._plan

    def _make_plan(self, slots: list[int], together: int) -> "_Plan":
        sampling = [request.sampling for request in (self._requests[slot] for slot in slots) if request is not None]
        if len(sampling) < len(slots):
            raise ValueError("a slot is chosen for that no request has taken")
        groups: dict[int, list[int]] = {}
        for row, params in enumerate(sampling):
            if not params.greedy:
                groups.setdefault(_most(params), []).append(row)
        drawn: list[_Drawn] = []
        drawn_slots: list[int] = []
        for most, rows in groups.items():
            for own in (rows[at : at + together] for at in range(0, len(rows), together)):
                part = slice(len(drawn_slots), len(drawn_slots) + len(own))
                columns = self._columns([sampling[row] for row in own], _DRAWING, np.float64)
                drawn.append(_Drawn(rows=self._indices(own), part=part, most=most, **columns))
                drawn_slots += [slots[row] for row in own]
        asked = [row for row, params in enumerate(sampling) if params.logprobs is not None]
        gains = [max(params.repetition_penalty, 1 / params.repetition_penalty) for params in sampling]
        return _Plan(
            slots=slots,
            at=np.array(slots, dtype=np.int64),
            drawn=drawn,
            drawn_slots=np.array(drawn_slots, dtype=np.int64),
            penalised=self._make_penalised(slots, sampling),
            held=[row for row, slot in enumerate(slots) if self._endings[slot]],
            none=torch.zeros(len(slots), dtype=torch.bool, device=self._device),
            gain=self._upload(np.array(gains)) if self._noise and any(gain > 1 for gain in gains) else 1.0,
            asked=tuple(asked),
            asked_rows=self._indices(asked),
            asked_counts=tuple(sampling[row].logprobs or 0 for row in asked),
        )

    def _make_penalised(self, slots: list[int], sampling: list[SamplingParams]) -> "_Penalised | None":
        rows = [row for row, params in enumerate(sampling) if params.penalised]
        if not rows:
            return None
        own = [sampling[row] for row in rows]
        return _Penalised(
            rows=self._indices(rows),
            slots=self._indices([slots[row] for row in rows]),
            slot_numbers=tuple(slots[row] for row in rows),
            repeats=any(params.repetition_penalty != 1 for params in own),
            counts=any(params.presence_penalty or params.frequency_penalty for params in own),
            **self._columns(own, _PENALTIES, np.float32),
        )

    def _altered(self, logits: torch.Tensor, plan: "_Plan") -> torch.Tensor:
        """Return the logits with penalties, and without the tokens that must not be chosen yet.

        The logits themselves where nothing is altered, a copy in float32 otherwise.
        """
        held = self._held_back(plan, logits.shape[-1]) if plan.held else None
        if plan.penalised is None and held is None:
            return logits
        scores = logits.to(torch.float32, copy=True)
        if plan.penalised is not None:
            self._renew(plan.penalised, logits.shape[-1])
            rows, slots = plan.penalised.rows, plan.penalised.slots
            scores[rows] = penalise(
                scores[rows],
                None if self._seen is None or not plan.penalised.repeats else self._seen[slots],
                None if self._counts is None or not plan.penalised.counts else self._counts[slots],
                plan.penalised.repetition_penalty,
                plan.penalised.presence_penalty,
                plan.penalised.frequency_penalty,
            )
        if held is not None:
            scores[held] = -torch.inf
        return scores

    def _held_back(self, plan: "_Plan", vocabulary: int) -> tuple[torch.Tensor, torch.Tensor] | None:
        """Return rows and tokens, as indices of the logits, that must not be chosen yet."""
        young = tuple(row for row in plan.held if self._positions[plan.slots[row]] < self._least(plan.slots[row]))
        if not young:
            return None
        if self._held is None or self._held[0] != young:
            pairs = [(row, token) for row in young for token in self._endings[plan.slots[row]] if token < vocabulary]
            rows, tokens = self._upload(np.array(pairs, dtype=np.int64).reshape(-1, 2)).unbind(1)
            self._held = young, rows, tokens
        return self._held[1:]

    def _least(self, slot: int) -> int:
        request = self._requests[slot]
        return 0 if request is None else request.sampling.min_new_tokens

    def _renew(self, penalised: "_Penalised", vocabulary: int) -> None:
        """Make room to count tokens, and begin anew in the slots that a new request has taken."""
        shape = len(self._requests), vocabulary
        if self._seen is None and penalised.repeats:
            self._seen = torch.zeros(shape, dtype=torch.bool, device=self._device)
        if self._counts is None and penalised.counts:
            self._counts = torch.zeros(shape, dtype=torch.int32, device=self._device)
        for slot in penalised.slot_numbers:
            request = self._requests[slot]
            if not self._stale[slot] or request is None:
                continue
            self._stale[slot] = False
            prompt = request.token_ids.astype(np.int64)
            if self._counts is not None:
                self._counts[slot].zero_()
            if self._seen is not None:
                self._seen[slot].zero_()
                self._seen[slot].index_fill_(0, self._upload(prompt[prompt < vocabulary]), True)

    def _note(self, tokens: torch.Tensor, plan: "_Plan") -> None:
        """Count the chosen tokens of the rows with penalties."""
        if plan.penalised is None:
            return
        rows, slots = plan.penalised.rows, plan.penalised.slots
        if self._seen is not None:
            self._seen[slots, tokens[rows]] = True
        if self._counts is not None:
            self._counts[slots, tokens[rows]] += 1

    def _noise_of(self, logits: torch.Tensor) -> torch.Tensor:
        """Return by how much rounding may change the logits of each row, float64 of shape [rows]."""
        # Tokens that the model masks, with -inf or the like, say nothing of how large its logits are.
        lowest = threshold(logits.float(), -_MASKED, 0.0).amin(dim=-1)
        return self._noise * torch.maximum(logits.amax(dim=-1), -lowest).double()

    def _columns(self, sampling: list[SamplingParams], names: tuple[str, ...], dtype: type) -> dict[str, torch.Tensor]:
        table = self._upload(np.array([[getattr(params, name) for name in names] for params in sampling], dtype=dtype))
        return {name: table[:, at : at + 1] for at, name in enumerate(names)}

    def _indices(self, values: list[int]) -> torch.Tensor:
        return self._upload(np.array(values, dtype=np.int64))

    def _upload(self, values: npt.NDArray[Any]) -> torch.Tensor:
        tensor = torch.from_numpy(values)
        if self._device.type == "cuda" and len(values):
            tensor = tensor.pin_memory()  # a copy from other memory waits for all that the device has to do
        return tensor.to(self._device, non_blocking=True)


@dataclass(frozen=True)
class _Drawn:
    """Rows whose tokens are drawn, all in one way; their parameters are [rows, 1] float64."""

    rows: torch.Tensor
    part: slice
    """Where their uniform numbers stand among those of all drawn rows."""
    temperature: torch.Tensor
    top_p: torch.Tensor
    top_k: torch.Tensor
    min_p: torch.Tensor
    most: int
    """See `draw`."""


@dataclass(frozen=True)
class _Penalised:
    """Rows with penalties, which are [rows, 1] float32."""

    rows: torch.Tensor
    slots: torch.Tensor
    slot_numbers: tuple[int, ...]
    repeats: bool
    """Whether any has a repetition penalty."""
    counts: bool
    """Whether any has a presence or frequency penalty."""
    repetition_penalty: torch.Tensor
    presence_penalty: torch.Tensor
    frequency_penalty: torch.Tensor


@dataclass(frozen=True)
class _Plan:
    """What the parameters of the requests in some slots say is to be done, until one of them changes."""

    slots: list[int]
    at: npt.NDArray[np.int64]
    """The slots again, as an index."""
    drawn: list[_Drawn]
    drawn_slots: npt.NDArray[np.int64]
    penalised: _Penalised | None
    held: list[int]
    """The rows some of whose tokens must not be chosen at first."""
    none: torch.Tensor
    """[rows] bool: of no row the choice is close, there being no noise."""
    gain: torch.Tensor | float
    """By how much penalties stretch differences of logits, [rows]."""
    asked: tuple[int, ...]
    """The rows that ask for log probabilities."""
    asked_rows: torch.Tensor
    asked_counts: tuple[int, ...]


def _most(params: SamplingParams) -> int:
    """Return how many of the most probable tokens must be looked at to cut the others; 0 if none are cut.

    It follows from the row's own parameters, so that its sums are the same whatever rows are beside it.
    """
    if 0 < params.top_k < _FEW:
        return _FEW
    return _ALL if params.top_k or params.top_p < 1 or params.min_p > 0 else 0


def _written(value: float) -> float:
    """Return a log probability as it is written down: JSON has no infinity."""
    return round(max(value, _LEAST_LOGPROB), 6)


def _logprobs_of(logits: torch.Tensor, tokens: torch.Tensor, plan: _Plan) -> Logprobs | None:
    if not plan.asked:
        return None
    own = logits[plan.asked_rows].float()
    total = own.logsumexp(dim=-1, keepdim=True)
    chosen = own.gather(-1, tokens[plan.asked_rows, None]) - total
    top = own.topk(min(max(plan.asked_counts), own.shape[-1]), dim=-1)
    return Logprobs(plan.asked, plan.asked_counts, chosen.squeeze(-1), top.values - total, top.indices)


def most_probable(logits: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the largest logit of each row, and the first token that has it. NaN counts as the largest.

    In two stages, the maxima of blocks and then one block: several times faster than torch's argmax,
    which looks at tokens one by one. Of few logits numpy finds it at once.
    """
    rows, vocabulary = logits.shape
    if logits.device.type == "cpu" and logits.numel() <= _AT_ONCE:
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


def _to_host(tensor: torch.Tensor) -> torch.Tensor:
    """Return memory to which a tensor is being copied from a GPU: in the order of what the GPU has to do."""
    pinned = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
    return pinned.copy_(tensor, non_blocking=True)


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
    noise: torch.Tensor | None = None,
    most: int = _ALL,
    blind: bool = False,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Draw a token for each row of logits [rows, vocabulary]; the other arguments are [rows, 1], float64.

    top_k and min_p first, then top_p on what is left, as in vLLM: the smallest set of the most
    probable tokens whose renormalised probability reaches top_p. `most` is how many of the most
    probable tokens are looked at for that, more than any top_k, or all; 0 says that nothing is cut.
    `blind`: values must not be read, for that would wait for a device.

    The distribution is inverted in the order of the token ids and not of probability: where two
    tokens are nearly as probable, and far down many are, rounding swaps their places in the latter.
    Returns the tokens and whether a change of the logits by `noise` could change them, both of
    shape [rows].

    Probabilities are float32, as are their sums in blocks; all other sums are float64. Of itself each is
    wrong by at most 2e-6 (`exp` 20 units in the last place, the sum of a block 13) and 4e-7 of the
    largest logit over the temperature, so that a sum c of them moves by at most twice that times
    c*(1 - c). A noise of 1e-5 of the largest logit counts for more wherever that is above 2.4 temperatures.
    """
    block = min(_SUMMED, logits.shape[-1])
    logits = pad(logits.float(), (0, -logits.shape[-1] % block), value=-torch.inf)
    # By how much noise moves a sum c of probabilities, as a share of c*(1 - c): at most by the change of
    # the logits; measured on a model of 30 layers, where the changes cancel out, a twelfth of `noise`.
    shift = None if noise is None else noise / temperature / 4
    unsure: torch.Tensor | float = 0.0
    blind = blind or logits.device.type != "cpu"
    if most:
        logits, unsure = _cut(logits, temperature, top_p, top_k, min_p, shift, min(most, logits.shape[-1]), blind)
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
    chosen = (which * block + at).squeeze(-1)
    if shift is None:
        return chosen, torch.zeros_like(chosen, dtype=torch.bool)
    above = begin + reached.gather(-1, at)
    below = above - probability.gather(-1, at)
    moved = [shift * c * (1 - c / total) + unsure for c in (above, below)]
    close = (above - target < moved[0]) | (target - below < moved[1])
    return chosen, close.squeeze(-1)


def _summed(logits: torch.Tensor, temperature: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the probabilities in blocks, [rows, blocks, block], and up to the end of each block their sum."""
    blocks = (logits / temperature.float()).softmax(dim=-1).view(len(logits), -1, min(_SUMMED, logits.shape[-1]))
    return blocks, blocks.sum(dim=-1).cumsum(dim=-1, dtype=torch.float64)


def _largest(logits: torch.Tensor, count: int, blind: bool) -> torch.Tensor:
    """Return the largest logits of each row, descending."""
    if not blind:  # torch would take ten times as long
        return torch.from_numpy(np.sort(np.partition(logits.numpy(), -count)[:, -count:])).flip(-1)
    return (logits.sort(descending=True) if count == logits.shape[-1] else logits.topk(count)).values


def _cut(
    logits: torch.Tensor,
    temperature: torch.Tensor,
    top_p: torch.Tensor,
    top_k: torch.Tensor,
    min_p: torch.Tensor,
    shift: torch.Tensor | None,
    most: int,
    blind: bool,
) -> tuple[torch.Tensor, torch.Tensor | float]:
    """Return the logits less a constant, with -inf for what is cut, and how much probability noise could move.

    Where values can be read few of the most probable tokens are looked at first, and more where
    these do not tell what is kept; the result is the same.
    """
    only_top_p = (top_k == 0) & (min_p == 0)
    count, whole = most, None
    if not blind:
        count = min(_SOME, most)
        if only_top_p.any():
            blocks, ends = _summed(logits, temperature)
            whole = ends[:, -1:] / blocks.amax(dim=(1, 2))[:, None]
    while True:
        ordered = _largest(logits, count, blind)
        weight = ((ordered.double() - ordered[:, :1]) / temperature).exp()
        in_top_k = (top_k == 0) | (torch.arange(count, device=logits.device) < top_k)
        allowed = in_top_k & (weight >= min_p)
        reached = weight.cumsum(dim=-1)
        mass = reached.gather(-1, (allowed.sum(dim=-1, keepdim=True) - 1).clamp(min=0))
        mass = mass if whole is None else torch.where(only_top_p, whole, mass)
        kept = allowed & ((top_p >= 1) | (reached - weight < top_p * mass))
        # A last token that is kept, or of nearly the least probability, says nothing of those after it.
        near = in_top_k & (weight >= (min_p if shift is None else min_p * (1 - 4 * shift)))
        if count == most or not torch.where(only_top_p, kept, near)[:, -1].any():
            break
        count = min(4 * count, most)
    last = (kept.sum(dim=-1, keepdim=True) - 1).clamp(min=0)  # of a row that is not finite none is kept
    unsure: torch.Tensor | float = 0.0
    if shift is not None:
        kept_mass = reached.gather(-1, last)
        unsure = mass / kept_mass * _unsure_mass(weight / mass, kept, last, top_p, in_top_k, min_p / mass, shift)
    border = ordered.gather(-1, last)
    if blind or ((ordered == border) & ~kept).any():
        # Of equal logits the first tokens are kept, as argmax does.
        level, room = logits == border, last + 1 - (ordered > border).sum(dim=-1, keepdim=True)
        logits = logits.masked_fill(level & (level.cumsum(dim=-1, dtype=torch.int32) > room), -torch.inf)
    # Several times as fast as a mask; what else is cut has less than 1e-43 of the largest probability.
    least = torch.maximum(border, ordered[:, :1] - 100 * temperature.float())
    under = least.nextafter(torch.full_like(least, -torch.inf))
    return threshold(logits - under, 0.0, -torch.inf), unsure


def _unsure_mass(
    share: torch.Tensor,
    kept: torch.Tensor,
    last: torch.Tensor,
    top_p: torch.Tensor,
    in_top_k: torch.Tensor,
    least: torch.Tensor,
    shift: torch.Tensor,
) -> torch.Tensor:
    """Return the probability, [rows, 1], that noise could add to or take from the kept tokens.

    All are shares of what top_k and min_p leave. That is about the last kept token's if its place is
    disputed: by the next one, nearly as probable, or by top_p, which is reached nearly where it or
    the next one begins; and that of all kept tokens that are nearly as probable as the last. And it
    is that of all tokens that have nearly the least probability which min_p allows.
    """
    at_least = in_top_k & (least > 0) & ((share - least).abs() < 4 * shift * least)
    at_least[:, 0] = False  # it is allowed whatever its probability
    allowed = (share * at_least).sum(dim=-1, keepdim=True)
    following = (last + 1).clamp(max=share.shape[-1] - 1)
    p_last, p_next = share.gather(-1, last), share.gather(-1, following)
    disputed = (p_last - p_next < 2 * shift * p_last) & (following > last)
    past_top_p = share.cumsum(dim=-1) - share - torch.where(top_p < 1, top_p, torch.inf)
    for index in (last, following):
        disputed |= past_top_p.gather(-1, index).abs() < shift + allowed
    in_band = kept & (share <= p_last * (1 + 4 * shift))
    at_last = torch.where(disputed, 2 * (share * in_band).sum(dim=-1, keepdim=True), 0.0)
    return torch.where(shift > 0, at_last + 2 * allowed, 0.0)
