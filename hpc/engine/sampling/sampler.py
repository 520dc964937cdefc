"""Choose the next token of each row: from its logits, its parameters, its tokens and one uniform number."""

from collections.abc import Collection
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from hpc.arrays import Ints
from hpc.engine.sampling.choice import Logprobs, SamplerOutput
from hpc.engine.sampling.constraint import Constraint, constraint_of
from hpc.engine.sampling.draw import draw, most_probable, penalise, stream, uniforms
from hpc.engine.sampling.metadata import PenalisedRows, SamplingMetadata, make_metadata
from hpc.engine.sampling.rounding import Rounding
from hpc.request import Request

_CACHED_LOGITS = 2**19
"""Logits that are drawn from in one call on a CPU: 2 MiB of float32 stay in a core's cache, twice as fast."""


class Sampler:
    """Chooses tokens for rows that live in numbered slots, and come and go.

    `eos_token_ids` are the model's ending tokens. With `rounding`, the output says which choices
    rounding could have changed.

    Everything that decides what is computed follows from the requests and is known to the host:
    nothing is read from a GPU, which may lag behind.
    """

    def __init__(
        self,
        slots: int,
        device: torch.device,
        eos_token_ids: Collection[int] = (),
        rounding: Rounding | None = None,
    ) -> None:
        self._device = device
        self._on_cpu = device.type == "cpu"
        self._eos_token_ids = eos_token_ids
        self._rounding = rounding
        self._requests: list[Request | None] = [None] * slots
        self._constraints: list[Constraint | None] = [None] * slots
        self._streams = np.zeros(slots, dtype=np.uint64)
        self._positions = np.zeros(slots, dtype=np.uint64)
        self._seen: torch.Tensor | None = None
        """[slots, vocabulary] bool: the token is in the prompt or was generated."""
        self._counts: torch.Tensor | None = None
        """[slots, vocabulary] int32: how often the token was generated."""
        self._stale = [True] * slots
        """Slots whose lines in these two are a previous request's."""
        # Made here: a number of the host that is put at an index of the device waits for all that it has to do.
        self._true = torch.ones((), dtype=torch.bool, device=device)
        self._never = torch.full((), -torch.inf, device=device)
        self._metadata: SamplingMetadata | None = None
        self._forbidden: tuple[list[Ints], tuple[torch.Tensor, torch.Tensor]] | None = None
        """What the constraints said in the latest step, and that as indices of the logits on the device."""

    def set(self, slot: int, request: Request, sample: int = 0) -> None:
        """Let a sample of a new request take a slot; nothing of the previous one is left."""
        sampling = request.sampling
        self._requests[slot] = request
        self._constraints[slot] = constraint_of(sampling, self._eos_token_ids)
        self._streams[slot] = stream(sampling.seed, request.id, sample)
        self._positions[slot] = 0
        self._stale[slot] = True
        self._metadata = None

    def choose(self, logits: torch.Tensor, slots: list[int]) -> SamplerOutput:
        """Return the next tokens of the requests in these slots, whose positions advance by one.

        `logits` has shape [rows, vocabulary], a row for each slot. Greedy rows take the first of the
        most probable tokens.
        """
        metadata = self._metadata_of(slots, logits.shape[-1])
        scores = self._altered(logits, metadata)
        best, tokens = most_probable(scores)
        checked = None
        if self._rounding is not None:
            checked = self._rounding.check(logits, scores, best, tokens, metadata.penalised)
        if metadata.drawn:
            drawn_slots = metadata.drawn_slots
            numbers = self._upload(uniforms(self._streams[drawn_slots], self._positions[drawn_slots]))
        for group in metadata.drawn:
            tokens[group.rows] = draw(
                scores.index_select(0, group.rows),
                group.temperature,
                group.top_p,
                group.top_k,
                group.min_p,
                numbers[group.part, None],
                group.ranked,
                reads=self._on_cpu,
                witness=None if checked is None else checked.of_draw(group),
            )
        self._note(tokens, metadata)
        if metadata.drawn or metadata.constrained:  # nothing else depends on them
            self._positions[metadata.at] += np.uint64(1)
        largest = best if scores is logits else logits.amax(dim=-1)
        close = None if checked is None else checked.close
        return SamplerOutput(tokens, largest, _logprobs_of(logits, tokens, metadata), close)

    def _metadata_of(self, slots: list[int], vocabulary: int) -> SamplingMetadata:
        if self._metadata is None or self._metadata.slots != slots:
            taken = [request for request in (self._requests[slot] for slot in slots) if request is not None]
            if len(taken) < len(slots):
                raise ValueError("a slot is chosen for that no request has taken")
            rows_at_once = max(1, _CACHED_LOGITS // vocabulary) if self._on_cpu else len(slots)
            constraints = [self._constraints[slot] for slot in slots]
            sampling = [request.sampling for request in taken]
            self._metadata = make_metadata(list(slots), sampling, constraints, self._upload, rows_at_once)
            self._forbidden = None
        return self._metadata

    def _altered(self, logits: torch.Tensor, metadata: SamplingMetadata) -> torch.Tensor:
        """Return the logits with penalties, and without the tokens that a constraint forbids.

        The logits themselves where nothing is altered, a copy in float32 otherwise.
        """
        forbidden = self._forbidden_in(metadata, logits.shape[-1]) if metadata.constrained else None
        penalised = metadata.penalised
        if penalised is None and forbidden is None:
            return logits
        scores = logits.to(torch.float32, copy=True)
        if penalised is not None:
            self._renew(penalised, logits.shape[-1])
            rows, slots = penalised.rows, penalised.slots
            scores[rows] = penalise(
                scores[rows],
                None if self._seen is None or not penalised.repeats else self._seen[slots],
                None if self._counts is None or not penalised.counts else self._counts[slots],
                penalised.repetition_penalty,
                penalised.presence_penalty,
                penalised.frequency_penalty,
            )
        if forbidden is not None:
            scores.index_put_(forbidden, self._never)
        return scores

    def _forbidden_in(self, metadata: SamplingMetadata, vocabulary: int) -> tuple[torch.Tensor, torch.Tensor] | None:
        """Return rows and tokens, as indices of the logits, that must not be chosen now; None if there are none."""
        positions = self._positions[metadata.at].tolist()
        by_row = [constraint.forbidden(positions[row]) for row, constraint in metadata.constrained]
        if not any(map(len, by_row)):
            return None
        before = self._forbidden
        if before is None or any(own is not other for own, other in zip(by_row, before[0], strict=True)):
            rows = np.repeat([row for row, _ in metadata.constrained], [len(tokens) for tokens in by_row])
            tokens = np.concatenate(by_row)
            known = tokens < vocabulary
            indices = self._upload(np.stack([rows[known], tokens[known]]))
            self._forbidden = before = by_row, (indices[0], indices[1])
        return before[1]

    def _renew(self, penalised: PenalisedRows, vocabulary: int) -> None:
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

    def _note(self, tokens: torch.Tensor, metadata: SamplingMetadata) -> None:
        """Count the chosen tokens of the rows with penalties."""
        if metadata.penalised is None:
            return
        rows, slots = metadata.penalised.rows, metadata.penalised.slots
        if self._seen is not None:
            self._seen.index_put_((slots, tokens[rows]), self._true)
        if self._counts is not None:
            self._counts[slots, tokens[rows]] += 1

    def _upload(self, values: npt.NDArray[Any]) -> torch.Tensor:
        tensor = torch.from_numpy(values)
        if self._device.type == "cuda" and values.size:
            tensor = tensor.pin_memory()  # a copy from other memory waits for all that the device has to do
        return tensor.to(self._device, non_blocking=True)


def _logprobs_of(logits: torch.Tensor, tokens: torch.Tensor, metadata: SamplingMetadata) -> Logprobs | None:
    if not metadata.asked:
        return None
    own = logits[metadata.asked_rows].float()
    total = own.logsumexp(dim=-1, keepdim=True)
    chosen = own.gather(-1, tokens[metadata.asked_rows, None]) - total
    top = own.topk(min(max(metadata.asked_counts), own.shape[-1]), dim=-1)
    return Logprobs(metadata.asked, metadata.asked_counts, chosen.squeeze(-1), top.values - total, top.indices)
