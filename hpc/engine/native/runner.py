"""What the native engine does step by step: admit, plan, compute, choose, read; and begin again where a step fails."""

import contextlib
import gc
import logging
import traceback
from collections import deque
from collections.abc import Collection
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from hpc.engine.admission import CHUNK
from hpc.engine.cache import Cache
from hpc.engine.failure import FAULT_AFTER, EngineFault, is_out_of_memory, one_line
from hpc.engine.interface import Source
from hpc.engine.kernel.kernel import Kernel
from hpc.engine.layers.attention import AttentionMetadata, Flash, Spans, flash_spans
from hpc.engine.layers.experts import ROW_MULTIPLE, Experts
from hpc.engine.native.cuda_graphs import CaptureError, DecodeGraphs, warn_of
from hpc.engine.native.drafts import ROWS as DRAFT_ROWS
from hpc.engine.native.drafts import NgramDrafts, accepted
from hpc.engine.native.input_batch import InputBatch, InputBatchBuilder
from hpc.engine.native.scheduler import LiveSequence, ScheduledStep, Scheduler
from hpc.engine.native.unread import Unread, began_after, end_of
from hpc.engine.sampling.draw import most_probable
from hpc.engine.sampling.sampler import Sampler
from hpc.engine.sequence import Sequence
from hpc.engine.steps import StepShape
from hpc.trim import Decode, ending_tokens, ends_with_stop

LOGGER = logging.getLogger(__name__)


@dataclass(frozen=True)
class EngineLimits:
    """How much a step and the cache may hold."""

    max_seqs: int
    """Most sequences that live at a time."""
    step_tokens: int
    """Prompt tokens after which a step takes no further chunk."""
    cache_bytes: int
    """Memory for keys and values; on a GPU 0 stands for what the largest step and the graphs leave."""
    context_tokens: int = 4096
    """Most tokens of a sequence."""
    deterministic: bool = False
    """On a GPU: compute every step in one of two fixed sizes, so that rounding does not depend on the batch."""
    refill: float = 0.0
    """Share of the sequences that must have ended before others begin; see `hpc.engine.admission.Gate`."""
    share_from: int | None = None
    """On a GPU, tokens from which on a shared prefix is read where it lies; None: each sequence has a copy of it."""
    drafts: bool = False
    """Guess tokens of greedy rows; only where what is computed does not depend on the batch."""


class ModelRunner:
    """What lives while an engine generates: the cache, the rows, and the steps whose tokens are not read yet."""

    def __init__(
        self,
        model: Any,
        cache: Cache,
        limits: EngineLimits,
        eos_token_ids: Collection[int],
        decode: Decode,
        kernel: Kernel | None,
        flash: bool = False,
        graphs: DecodeGraphs | None = None,
    ) -> None:
        if model.device.type == "cuda":  # events, streams and pinned memory are the current device's
            torch.cuda.set_device(model.device)
        self._model = model
        self.cache = cache
        self._eos_token_ids = eos_token_ids
        self._decode = decode
        self._kernel = kernel
        self._device: torch.device = model.device
        self._on_cpu = self._device.type == "cpu"
        cuda = self._device.type == "cuda"
        fixed = (limits.max_seqs, limits.step_tokens + CHUNK) if cuda and limits.deterministic else None
        # torch's products are in a model without the kernel, and in the choice between experts.
        ragged = kernel is not None and not any(isinstance(module, Experts) for module in model.modules())
        share = not cuda or (flash and limits.share_from is not None)
        self._packer = InputBatchBuilder(share, not cuda, 1 if ragged else ROW_MULTIPLE, fixed)
        self._has_flash = flash
        self._graphs = graphs
        # Constant where nothing may depend on the batch: they decide how attention divides its work.
        self._least = (CHUNK, limits.context_tokens) if fixed else (0, 0)
        self.scheduler = Scheduler(
            cache.extents, limits.max_seqs, limits.step_tokens, share, mixed=fixed is None, refill=limits.refill,
            share_from=limits.share_from or 0 if cuda else 0,
        )  # fmt: skip
        self._sampler = Sampler(limits.max_seqs, self._device, eos_token_ids)
        self._newest = torch.zeros(limits.max_seqs, dtype=torch.int64, device=self._device)
        """The last token of the row in each slot."""
        self.failed: list[Sequence] = []
        """Failed alone; kept back until another succeeds, for if none does it is the engine's fault."""
        # On a GPU the host reads the tokens of a step while the next one is computed.
        self._lag = 1 if cuda else 0
        self._unread: deque[Unread] = deque()
        self._drafts = NgramDrafts() if limits.drafts and not self._lag else None
        self._faults = 0
        self.shape: StepShape | None = None
        """What the latest step computes."""
        self.measured: list[tuple[StepShape, float]] | None = [] if cuda else None
        """On a GPU, of the steps that were read: how long each took, of the device's own time."""

    @property
    def busy(self) -> bool:
        """Whether anything is under way here."""
        scheduler = self.scheduler
        return bool(scheduler.rows or scheduler.waiting or scheduler.failed or self._unread)

    def admit(self, source: Source) -> list[LiveSequence]:
        """Give places to sequences that wait; return them."""
        admitted = self.scheduler.admit(source)
        for row in admitted:
            assert row.sequence is not None
            request = row.sequence.request
            self._sampler.set(row.slot, request, row.sequence.sample)
            row.endings = ending_tokens(request.sampling, self._eos_token_ids)
            row.stop = request.sampling.stop
        return admitted

    def step(self, source: Source) -> list[Sequence]:
        """Compute one step; return the sequences that have ended."""
        self.admit(source)
        failure, ended, self.shape = None, [], None
        try:
            plan = self.scheduler.next()
            if computes := bool(plan.rows or plan.prompts):
                with torch.inference_mode():
                    self._launch(plan)
            ended = self._read() if len(self._unread) > (self._lag if computes else 0) else []
        except EngineFault:
            raise
        except Exception as error:
            # As text: a handler that keeps its records would keep what the traceback holds, and not free it.
            LOGGER.debug("a step failed:\n%s", traceback.format_exc())
            failure, out_of_memory = one_line(error), is_out_of_memory(error)
        if failure is not None:
            self._recover(failure, out_of_memory)
        elif ended:
            self._faults = 0
            ended += self.failed
            self.failed = []
        too_large, self.scheduler.failed = self.scheduler.failed, []
        return ended + too_large

    def _launch(self, plan: ScheduledStep) -> None:
        """Start the forward pass of a step, and the choice of its tokens."""
        for source, target, num_tokens in plan.copies:
            self.cache.copy(source, target, num_tokens)
        guesses = self._guess(plan)
        step = self._packer.pack(plan, guesses)
        self.shape = step.shape
        began = began_after(self._unread) if self._lag else None
        newest = None
        if self._lag and plan.rows:  # the host does not know their tokens yet
            newest = self._newest[self._upload(np.array([row.slot for row in plan.rows], dtype=np.int64))]
        logits = self._replayed(plan, step, newest)
        if logits is None:
            token_ids, kept = self._upload(step.token_ids[None]), self._upload(step.kept)
            if newest is not None:
                token_ids[0, : len(newest)] = newest
            logits = self._model(
                input_ids=token_ids,
                position_ids=self._upload(step.positions[None]),
                use_cache=False,
                logits_to_keep=kept,
                engine=AttentionMetadata(
                    self.cache, step.spans, self._kernel, flash=self._flash(step.spans), kept=kept
                ),
            ).logits[0]
        rows = step.choosing
        if not rows:
            if began is not None:
                self._unread.append(Unread([], None, [], [], end_of(step.shape, began)))
            return
        choice = self._sampler.choose(logits[: len(rows)], [row.slot for row in rows])
        verified = _verified(logits[len(rows) : step.shape.chosen], guesses) if guesses else []
        timed = None
        if began is not None:
            slots = np.array([row.slot for row in rows], dtype=np.int64)
            self._newest[self._upload(slots)] = choice.tokens
            choice = choice.to_host()
            timed = end_of(step.shape, began)
        self._unread.append(Unread(rows, choice, guesses, verified, timed))

    def _replayed(self, plan: ScheduledStep, step: InputBatch, newest: torch.Tensor | None) -> torch.Tensor | None:
        """Return the logits of a step that a graph can compute; None for any other."""
        if self._graphs is None or newest is None or plan.prompts or not self._graphs.can_run(step.spans):
            return None
        try:
            return self._graphs.run(newest, step.spans)
        except CaptureError as error:  # nothing to be said against a request
            self._graphs = None
            warn_of(error)
            return None

    def _guess(self, plan: ScheduledStep) -> list[list[int]]:
        """Return guesses for each row of a step of few; an empty list if there are none."""
        if self._drafts is None or plan.prompts or len(plan.rows) >= DRAFT_ROWS:
            return []
        guesses = self._drafts.guess(plan.rows, [self.scheduler.spare(row) for row in plan.rows])
        return guesses if any(guesses) else []

    def _flash(self, spans: Spans) -> Flash | None:
        return flash_spans(spans, self._device, *self._least) if self._has_flash else None

    def flush(self) -> None:
        """Read the tokens of all steps under way."""
        while self._unread:
            self._read()
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)

    def _read(self) -> list[Sequence]:
        """Read the tokens of the oldest step; return the sequences that they end."""
        unread = self._unread.popleft()
        if (timed := unread.timed) is not None and self.measured is not None:
            timed.ended.synchronize()
            self.measured.append((timed.shape, timed.began.elapsed_time(timed.ended) / 1000))
        choice = unread.choice
        if choice is None:
            return []
        tokens, finite = choice.tokens.tolist(), choice.finite.tolist()
        logprobs = choice.logprobs.read() if choice.logprobs is not None else {}
        ended = []
        for index, (row, token) in enumerate(zip(unread.rows, tokens, strict=True)):
            sequence = row.sequence
            if not row.room or sequence is None:
                continue  # it had ended, or gave way, when this step was under way
            if finite[index]:
                over = self._append(row, sequence, token)
                if index in logprobs:
                    sequence.logprobs.append(logprobs[index])
            else:
                sequence.error, over = "the model's logits are not finite numbers; try another dtype", True
            if unread.guesses and (guess := unread.guesses[index]):
                behind = accepted(tokens[index], guess, unread.verified[index])
                self._note(sequence, len(guess), len(behind))
                while behind and not over:
                    self.scheduler.advance(row)
                    over = self._append(row, sequence, behind.pop(0))
            if over:
                self.scheduler.finish(row)
                ended.append(sequence)
        return ended

    def _append(self, row: LiveSequence, sequence: Sequence, token: int) -> bool:
        """Let a row have its next token; return whether that is its last."""
        token_ids = sequence.token_ids
        token_ids.append(token)
        if token in row.endings or len(token_ids) >= row.limit:
            return True
        if not row.stop:
            return False
        request = sequence.request
        return ends_with_stop(token_ids, row.stop, self._decode, request.sampling.min_new_tokens, request.token_ids)

    def _note(self, sequence: Sequence, guessed: int, right: int) -> None:
        assert self._drafts is not None
        self._drafts.learn(guessed, right)
        sequence.guessed += guessed
        sequence.accepted += right

    def _recover(self, failure: str, out_of_memory: bool) -> None:
        """Begin again after a step that failed: with less, or one by one; alone, a request fails."""
        rows = list(self.scheduler.rows)
        self._unread.clear()
        self.scheduler.restart_all(alone=not out_of_memory)
        if out_of_memory and self._graphs is not None:
            self._graphs.drop(max(1, self.scheduler.max_seqs // 2))
        gc.collect()
        if self._device.type == "cuda":
            with contextlib.suppress(RuntimeError):
                torch.cuda.empty_cache()
        if out_of_memory and len(rows) > 1:
            self.scheduler.halve()
            LOGGER.warning(
                "out of memory: from now on %d sequences at a time, and steps of about %d tokens",
                self.scheduler.max_seqs, self.scheduler.step_tokens,
            )  # fmt: skip
        if out_of_memory and self.shape is not None and self._packer.halve(self.shape):
            LOGGER.warning(
                "out of memory: the fixed sizes of steps are half as large for now, so that by rounding other "
                "tokens may come than with more memory"
            )
            return
        if out_of_memory and len(rows) > 1:
            return
        if len(rows) > 1:
            LOGGER.warning("a step of %d sequences failed (%s); trying them one by one", len(rows), failure)
            return
        if not rows:
            raise EngineFault(failure)
        sequence = self.scheduler.waiting.popleft()
        sequence.error = "it does not fit in memory, even alone" if out_of_memory else failure
        if out_of_memory:
            self.scheduler.restore()
            self._packer.restore()
            if self._graphs is not None:
                self._graphs.restore()
        self.scheduler.excuse()
        LOGGER.warning("request %r failed alone: %s", sequence.request.id, failure)
        self._faults += not out_of_memory
        if self._faults >= FAULT_AFTER:
            raise EngineFault(f"{self._faults} requests failed one after the other, the last with {failure}")
        self.failed.append(sequence)

    def _upload(self, values: np.ndarray[Any, Any]) -> torch.Tensor:
        tensor = torch.from_numpy(values)
        if self._on_cpu:
            return tensor
        if len(values):
            tensor = tensor.pin_memory()  # a copy from other memory waits for all that the device has to do
        return tensor.to(self._device, non_blocking=True)


def _verified(logits: torch.Tensor, guesses: list[list[int]]) -> list[list[int]]:
    """Return the most probable token behind each guess of each row, -1 where the logits are not finite."""
    best, found = most_probable(logits)
    tokens = iter(torch.where(best.isfinite(), found, -1).tolist())
    return [[next(tokens) for _ in guess] for guess in guesses]
