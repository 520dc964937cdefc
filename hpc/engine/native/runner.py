"""Run the native engine step by step: admit, schedule, compute, sample, read; and recover if a step fails."""

import contextlib
import gc
import logging
from collections import deque
from collections.abc import Collection
from typing import Any

import numpy as np
import torch

from hpc.engine.admission import CHUNK
from hpc.engine.cache import Cache
from hpc.engine.failure import EngineFault, Failure, Recovery, Remedy, failure_of
from hpc.engine.interface import Source
from hpc.engine.kernel.kernel import Kernel
from hpc.engine.layers.attention import AttentionMetadata, Flash, Spans, flash_spans
from hpc.engine.layers.experts import ROW_MULTIPLE, Experts
from hpc.engine.native.cuda_graphs import CaptureError, DecodeGraphs, warn_of
from hpc.engine.native.drafts import NgramDrafts, accepted, verified
from hpc.engine.native.input_batch import InputBatch, InputBatchBuilder
from hpc.engine.native.limits import EngineLimits
from hpc.engine.native.scheduled_step import LiveSequence, ScheduledStep
from hpc.engine.native.scheduler import Scheduler
from hpc.engine.native.unread import Unread, began_after, end_of
from hpc.engine.sampling.sampler import Sampler
from hpc.engine.sequence import Sequence
from hpc.engine.steps import StepShape
from hpc.trim import Decode, ending_tokens, ends_with_stop

LOGGER = logging.getLogger(__name__)


class ModelRunner:
    """Holds the state of a generating engine: cache, live sequences, and steps whose tokens are not read yet."""

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
        # torch computes products in a model without the kernel, and in the choice between experts.
        ragged = kernel is not None and not any(isinstance(module, Experts) for module in model.modules())
        share = not cuda or (flash and limits.share_from is not None)
        self._packer = InputBatchBuilder(share, not cuda, 1 if ragged else ROW_MULTIPLE, fixed)
        self._has_flash = flash
        self._graphs = graphs
        # Constant if nothing may depend on the batch: FlashAttention divides its work by these maxima.
        self._flash_bounds = (CHUNK, limits.context_tokens) if fixed else (0, 0)
        self.scheduler = Scheduler(
            cache.extents, limits.max_seqs, limits.step_tokens, share, mixed=fixed is None, refill=limits.refill,
            share_from=limits.share_from or 0 if cuda else 0, long_from=limits.long_from,
        )  # fmt: skip
        self._sampler = Sampler(limits.max_seqs, self._device, eos_token_ids)
        self._newest = torch.zeros(limits.max_seqs, dtype=torch.int64, device=self._device)
        """The last token of the row in each slot."""
        self.recovery = Recovery()
        # On a GPU the host reads the tokens of a step while the next one is computed.
        self._lag = 1 if cuda else 0
        self._unread: deque[Unread] = deque()
        self._drafts = NgramDrafts() if limits.drafts and not self._lag else None
        self.shape: StepShape | None = None
        """The shape of the latest step."""
        self.measured: list[tuple[StepShape, float]] | None = [] if cuda else None
        """On a GPU, shape and seconds of the steps that were read, by the device's own clock."""

    @property
    def busy(self) -> bool:
        """Whether any sequence lives, waits or is still to be yielded."""
        scheduler = self.scheduler
        return bool(scheduler.rows or scheduler.waiting or scheduler.failed or self._unread)

    def admit(self, source: Source) -> list[LiveSequence]:
        """Admit waiting sequences; return the new rows."""
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
            failure = failure_of(error, "a step")
        if failure is not None:
            self._recover(failure)
        elif ended:
            ended += self.recovery.succeed()
        too_large, self.scheduler.failed = self.scheduler.failed, []
        return ended + too_large

    def _launch(self, plan: ScheduledStep) -> None:
        """Start the forward pass of a step, and the sampling of its tokens."""
        for source, target, num_tokens in plan.copies:
            self.cache.copy(source, target, num_tokens)
        drafts = self._drafts.propose(plan, self.scheduler.lookahead) if self._drafts is not None else []
        step = self._packer.pack(plan, drafts)
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
                    self.cache,
                    step.spans,
                    self._kernel,
                    flash=self._flash(step.spans),
                    kept=kept,
                    is_long=None if step.is_long is None else self._upload(step.is_long),
                ),
            ).logits[0]
        rows = step.choosing
        if not rows:
            if began is not None:
                self._unread.append(Unread([], None, [], [], end_of(step.shape, began)))
            return
        choice = self._sampler.choose(logits[: len(rows)], [row.slot for row in rows])
        behind = verified(logits[len(rows) : step.shape.chosen], drafts) if drafts else []
        timed = None
        if began is not None:
            slots = np.array([row.slot for row in rows], dtype=np.int64)
            self._newest[self._upload(slots)] = choice.tokens
            choice = choice.to_host()
            timed = end_of(step.shape, began)
        self._unread.append(Unread(rows, choice, drafts, behind, timed))

    def _replayed(self, plan: ScheduledStep, step: InputBatch, newest: torch.Tensor | None) -> torch.Tensor | None:
        """Return the logits of a step that a CUDA graph can compute; None for any other."""
        if self._graphs is None or newest is None or plan.prompts or not self._graphs.can_run(step.spans):
            return None
        try:
            return self._graphs.run(newest, step.spans)
        except CaptureError as error:  # no request is to blame
            self._graphs = None
            warn_of(error)
            return None

    def _flash(self, spans: Spans) -> Flash | None:
        return flash_spans(spans, self._device, *self._flash_bounds) if self._has_flash else None

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
            if not row.live or sequence is None:
                continue  # it had ended or been preempted while this step was under way
            if finite[index]:
                over = self._append(row, sequence, token)
                if index in logprobs:
                    sequence.logprobs.append(logprobs[index])
            else:
                sequence.error, over = "the model's logits are not finite numbers; try another dtype", True
            if self._drafts is not None and unread.drafts and (draft := unread.drafts[index]):
                behind = accepted(token, draft, unread.verified[index])
                self._drafts.note(sequence, len(draft), len(behind))
                while behind and not over:
                    self.scheduler.advance(row)
                    over = self._append(row, sequence, behind.pop(0))
            if over:
                self.scheduler.finish(row)
                ended.append(sequence)
        return ended

    def _append(self, row: LiveSequence, sequence: Sequence, token: int) -> bool:
        """Append the next token of a row; return whether it is the last one."""
        token_ids = sequence.token_ids
        token_ids.append(token)
        if token in row.endings or len(token_ids) >= row.limit:
            return True
        if not row.stop:
            return False
        request = sequence.request
        return ends_with_stop(token_ids, row.stop, self._decode, request.sampling.min_new_tokens, request.token_ids)

    def _recover(self, failure: Failure) -> None:
        """Begin all rows anew after a step that failed: with less at a time, or one by one; alone, one fails."""
        count, lacks_memory = len(self.scheduler.rows), failure.out_of_memory
        if not count:  # no request is to blame
            raise EngineFault(failure.text)
        self._unread.clear()
        self.scheduler.preempt_all(isolate=not lacks_memory)
        if lacks_memory and self._graphs is not None:
            self._graphs.drop(max(1, self.scheduler.max_seqs // 2))
        gc.collect()
        if self._device.type == "cuda":
            with contextlib.suppress(RuntimeError):
                torch.cuda.empty_cache()
        remedy = self.recovery.remedy(failure, count)
        if remedy is Remedy.SHRINK:
            self.scheduler.shrink()
            LOGGER.warning(
                "out of memory: from now on %d sequences at a time, and steps of about %d tokens",
                self.scheduler.max_seqs, self.scheduler.step_tokens,
            )  # fmt: skip
        if lacks_memory and self.shape is not None and self._packer.shrink(self.shape):
            LOGGER.warning(
                "out of memory: the fixed sizes of steps are half as large for now, so that by rounding other "
                "tokens may come than with more memory"
            )
        elif remedy is Remedy.ISOLATE:
            LOGGER.warning("a step of %d sequences failed (%s); trying them one by one", count, failure.text)
        elif remedy is Remedy.GIVE_UP:
            self._give_up(failure)

    def _give_up(self, failure: Failure) -> None:
        """Make an error of the sequence that failed alone; the others may have as much memory as at first."""
        if failure.out_of_memory:
            self.scheduler.reset_limits()
            self._packer.reset()
            if self._graphs is not None:
                self._graphs.restore()
        self.scheduler.clear_isolated()
        self.recovery.give_up(self.scheduler.waiting.popleft(), failure)

    def _upload(self, values: np.ndarray[Any, Any]) -> torch.Tensor:
        tensor = torch.from_numpy(values)
        if self._on_cpu:
            return tensor
        if len(values):
            tensor = tensor.pin_memory()  # a copy from other memory waits for all that the device has to do
        return tensor.to(self._device, non_blocking=True)
