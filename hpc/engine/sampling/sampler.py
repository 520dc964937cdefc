"""Choose the next token of each row: from its logits, its parameters, its tokens and one uniform number."""

from collections.abc import Collection
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch.nn.functional import threshold

from hpc.engine.sampling.choice import Logprobs, SamplerOutput
from hpc.engine.sampling.draw import UNCOUNTED, draw, most_probable, penalise, stream, uniforms
from hpc.request import Request
from hpc.sampling_params import SamplingParams
from hpc.trim import ending_tokens

_MASKED = 1e9
_FEW = 128
_CACHED = 2**19
_DRAWING = ("temperature", "top_p", "top_k", "min_p")
_PENALTIES = ("repetition_penalty", "presence_penalty", "frequency_penalty")


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
        # Made here: a number of the host that is put at an index of the device waits for all that it has to do.
        self._true = torch.ones((), dtype=torch.bool, device=device)
        self._never = torch.full((), -torch.inf, device=device)
        self._plan: _SamplingMetadata | None = None
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

    def choose(self, logits: torch.Tensor, slots: list[int]) -> SamplerOutput:
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
        return SamplerOutput(tokens, close, largest, _logprobs_of(logits, tokens, plan))

    def _plan_of(self, slots: list[int], vocabulary: int) -> "_SamplingMetadata":
        if self._plan is None or self._plan.slots != slots:
            # As many rows at a time as a processor keeps in its cache: twice as fast as all at once.
            together = max(1, self._cached // vocabulary) if self._device.type == "cpu" else len(slots)
            self._plan, self._held = self._make_plan(list(slots), together), None
        return self._plan

    def _make_plan(self, slots: list[int], together: int) -> "_SamplingMetadata":
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
        return _SamplingMetadata(
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

    def _altered(self, logits: torch.Tensor, plan: "_SamplingMetadata") -> torch.Tensor:
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
            scores.index_put_(held, self._never)
        return scores

    def _held_back(self, plan: "_SamplingMetadata", vocabulary: int) -> tuple[torch.Tensor, torch.Tensor] | None:
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

    def _note(self, tokens: torch.Tensor, plan: "_SamplingMetadata") -> None:
        """Count the chosen tokens of the rows with penalties."""
        if plan.penalised is None:
            return
        rows, slots = plan.penalised.rows, plan.penalised.slots
        if self._seen is not None:
            self._seen.index_put_((slots, tokens[rows]), self._true)
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
class _SamplingMetadata:
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
    """Return how many of the most probable tokens must be looked at to cut the others; see `draw`.

    It follows from the row's own parameters, so that its sums are the same whatever rows are beside it.
    """
    if not params.top_k:
        return UNCOUNTED if params.top_p < 1 or params.min_p > 0 else 0
    most = _FEW
    while most <= params.top_k:
        most *= 8
    return most


def _logprobs_of(logits: torch.Tensor, tokens: torch.Tensor, plan: _SamplingMetadata) -> Logprobs | None:
    if not plan.asked:
        return None
    own = logits[plan.asked_rows].float()
    total = own.logsumexp(dim=-1, keepdim=True)
    chosen = own.gather(-1, tokens[plan.asked_rows, None]) - total
    top = own.topk(min(max(plan.asked_counts), own.shape[-1]), dim=-1)
    return Logprobs(plan.asked, plan.asked_counts, chosen.squeeze(-1), top.values - total, top.indices)
