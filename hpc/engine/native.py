"""The `native` engine: continuous batching over an unmodified model, through its attention alone.

A step is one forward pass over a packed row of tokens: the newest token of every sequence that
decodes, and chunks of prompts. Nothing is padded, and a place that falls free is taken in the next
step. On a CPU the logits of a sequence do not depend on what else is in the step.
"""

import contextlib
import gc
import logging
import time
import traceback
from collections import deque
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from hpc.engine import EngineFault, OnStep, Sequence, Source, StepLog, StepShape, begin, pull
from hpc.engine.attention import Flash, Span, Step, flash_spans
from hpc.engine.batch import FAULT_AFTER, one_line
from hpc.engine.cache import Cache, Layout, token_bytes
from hpc.engine.draft import ROWS as DRAFT_ROWS
from hpc.engine.draft import Drafts, accepted
from hpc.engine.experts import ROW_MULTIPLE, Experts
from hpc.engine.graphs import DecodeGraphs
from hpc.engine.hf import is_out_of_memory
from hpc.engine.kernel import Kernel
from hpc.engine.sample import Choice, Sampler, most_probable
from hpc.engine.schedule import CHUNK, Plan, Row, Scheduler
from hpc.records import Tokens
from hpc.trim import Decode, ending_tokens, ends_with_stop

LOGGER = logging.getLogger(__name__)

HALF = (torch.float16, torch.bfloat16)
"""The types for which torch has FlashAttention."""


@dataclass(frozen=True)
class Limits:
    """How much a step and the cache may hold."""

    max_seqs: int
    """Most sequences that live at a time."""
    step_tokens: int
    """Prompt tokens after which a step takes no further chunk."""
    cache_bytes: int
    """Memory for keys and values."""
    context_tokens: int = 4096
    """Most tokens of a sequence."""
    deterministic: bool = False
    """On a GPU: compute every step in one of two fixed sizes, so that rounding does not depend on the batch."""
    drafts: bool = False
    """Guess tokens of greedy rows; only where what is computed does not depend on the batch."""


@dataclass(frozen=True)
class _Unread:
    """What a step has chosen, until the host reads it."""

    rows: list[Row]
    choice: Choice
    event: torch.cuda.Event | None
    guesses: list[list[int]]
    """Of each row."""
    verified: list[int]
    """The most probable token behind each guess, one row after the other; -1 where the logits are not finite."""


class NativeEngine:
    """One replica of a model whose attention is `hpc.engine.attention`.

    `layouts` says what each layer keeps of a token. `decode` turns token ids to text; it is used for
    requests with stop strings alone. `kernel` attends on a CPU; torch does where it is None.
    """

    def __init__(
        self,
        model: Any,
        layouts: dict[int, Layout],
        eos_token_ids: Collection[int],
        decode: Decode,
        limits: Limits,
        kernel: Kernel | None = None,
    ) -> None:
        self._model = model
        self.layouts = layouts
        self._eos_token_ids = eos_token_ids
        self._decode = decode
        self._limits = limits
        self._kernel = kernel
        self.steps = StepLog()

    @property
    def bounds(self) -> tuple[int, int, int, int]:
        """Most sequences at a time, prompt tokens of a step, tokens of its cache, bytes of each of them."""
        each = token_bytes(self.layouts, self._model.dtype, self._kernel.panel if self._kernel else 0)
        return self._limits.max_seqs, self._limits.step_tokens, self._limits.cache_bytes // each, each

    @property
    def context_tokens(self) -> int:
        """Most tokens of a sequence."""
        return self._limits.context_tokens

    @property
    def device(self) -> torch.device:
        """What computes."""
        device: torch.device = self._model.device
        return device

    @property
    def dtype(self) -> torch.dtype:
        """What it computes in."""
        dtype: torch.dtype = self._model.dtype
        return dtype

    def begin(self) -> "Run":
        """Return what generates: a cache, and nothing under way."""
        return Run(self._model, self._new_cache(), self._limits, self._eos_token_ids, self._decode, self._kernel)

    def generate(self, source: Source, on_step: OnStep) -> Iterator[list[Sequence]]:
        """Yield sequences in the step in which they end, until the source is exhausted or `on_step` says stop."""
        run = self.begin()
        try:
            while run.busy or (requests := pull(source, 1, on_step)):
                if not run.busy:
                    run.scheduler.waiting.extend(begin(requests))
                began = time.perf_counter()
                if ended := run.step(source):
                    yield ended
                over = on_step()
                if run.shape is not None:  # with what the rank does between two steps
                    self.steps.add(run.shape, time.perf_counter() - began)
                if over:
                    return
            if run.failed:
                yield run.failed
        finally:
            del run

    def _new_cache(self) -> Cache:
        device, dtype, panel = self._model.device, self._model.dtype, self._kernel.panel if self._kernel else 0
        num_tokens = self.bounds[2]
        while True:
            try:
                return Cache(self.layouts, num_tokens, dtype, device, panel)
            except Exception as error:
                if not is_out_of_memory(error) or num_tokens < ROW_MULTIPLE:
                    raise
            num_tokens //= 2


class Run:
    """What lives while an engine generates: the cache, the rows, and the steps whose tokens are not read yet."""

    def __init__(
        self,
        model: Any,
        cache: Cache,
        limits: Limits,
        eos_token_ids: Collection[int],
        decode: Decode,
        kernel: Kernel | None,
    ) -> None:
        self._model = model
        self.cache = cache
        self._eos_token_ids = eos_token_ids
        self._decode = decode
        self._kernel = kernel
        self._device: torch.device = model.device
        # torch's products are in a model without the kernel, and in the choice between experts.
        ragged = kernel is not None and not any(isinstance(module, Experts) for module in model.modules())
        self._multiple = 1 if ragged else ROW_MULTIPLE
        cuda = self._device.type == "cuda"
        self._sizes: tuple[int, int] | None = None
        """Tokens of steps that only decode, and of all others, where these are fixed."""
        if cuda and limits.deterministic:
            self._sizes = limits.max_seqs, limits.step_tokens + CHUNK
        self._graphs: DecodeGraphs | None = None
        if cuda and model.dtype in HALF:
            self._graphs = DecodeGraphs(model, cache, limits.max_seqs, limits.context_tokens, self._sizes is not None)
        self.scheduler = Scheduler(
            cache.extents, limits.max_seqs, limits.step_tokens, share=not cuda, mixed=self._sizes is None
        )
        self._sampler = Sampler(limits.max_seqs, self._device, eos_token_ids=eos_token_ids)
        self._newest = torch.zeros(limits.max_seqs, dtype=torch.int64, device=self._device)
        """The last token of the row in each slot."""
        self.failed: list[Sequence] = []
        """Failed alone; kept back until another succeeds, for if none does it is the engine's fault."""
        # On a GPU the host reads the tokens of a step while the next one is computed.
        self._lag = 1 if cuda else 0
        self._unread: deque[_Unread] = deque()
        self._drafts = Drafts() if limits.drafts and not self._lag else None
        self._faults = 0
        self.shape: StepShape | None = None
        """What the latest step computes."""

    @property
    def busy(self) -> bool:
        """Whether anything is under way here."""
        scheduler = self.scheduler
        return bool(scheduler.rows or scheduler.waiting or scheduler.failed or self._unread)

    def admit(self, source: Source) -> list[Row]:
        """Give places to sequences that wait; return them."""
        admitted = self.scheduler.admit(source)
        for row in admitted:
            assert row.sequence is not None
            request = row.sequence.request
            self._sampler.set(row.slot, request, row.sequence.sample)
            row.endings = ending_tokens(request.sampling, self._eos_token_ids)
        return admitted

    def step(self, source: Source) -> list[Sequence]:
        """Compute one step; return the sequences that have ended."""
        self.admit(source)
        failure, ended, self.shape = None, [], None
        try:
            plan = self.scheduler.next()
            if plan.chunks:
                self._launch(plan)
            ended = self._read() if len(self._unread) > (self._lag if plan.chunks else 0) else []
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

    @torch.inference_mode()
    def _launch(self, plan: Plan) -> None:
        """Start the forward pass of a step, and the choice of its tokens."""
        for source, target, num_tokens in plan.copies:
            self.cache.copy(source, target, num_tokens)
        guesses = self._guess(plan)
        spans: list[Span] = []
        positions: list[int] = []
        prompts: list[Tokens] = []
        newest: list[int] = []
        decoding: list[int] = []
        last: list[int] = []
        checked: list[int] = []
        rows: list[Row] = []
        length, prompt, pairs, kv = 0, 0, 0.0, 0
        for chunk, guess in zip(plan.chunks, guesses, strict=True):
            row, end = chunk.row, chunk.position + chunk.count
            prefix, cut = (row.prefix.start, row.cut) if row.prefix and self.scheduler.share else (0, 0)
            spans.append(Span(length, chunk.count, chunk.position, row.start, prefix, cut))
            positions.extend(range(chunk.position, end))
            if chunk.position < len(row.tokens):
                prompts.append(row.tokens[chunk.position : end])
                prompt += chunk.count
                pairs += chunk.count * (chunk.position + chunk.count / 2)
            else:
                assert row.sequence is not None
                decoding.append(row.slot)
                kv += end
                newest.extend([0 if self._lag else row.sequence.token_ids[-1], *guess])
            length += chunk.count
            if chunk.chooses:
                last.append(length - 1 - len(guess))
                checked.extend(range(length - len(guess), length))
                rows.append(row)
        self.shape = StepShape(length, prompt, len(last) + len(checked), pairs, kv)
        decodes = len(decoding) == len(plan.chunks)
        padding = self._sizes[not decodes] - length if self._sizes else -length % self._multiple
        positions.extend([0] * padding)
        tokens: list[Any] = [np.array(newest, dtype=np.int64), *prompts, np.zeros(padding, dtype=np.int64)]
        input_ids = self._upload(np.concatenate(tokens))
        if self._lag and decoding:  # these come first, and the host does not know their tokens yet
            input_ids[: len(decoding)] = self._newest[self._upload(np.array(decoding, dtype=np.int64))]
        if decodes and self._graphs is not None and self._graphs.usable:
            logits = self._graphs.run(input_ids[:length], spans)
        else:
            # The head's product too has a multiple of rows; the logits of the further ones are not looked at.
            kept = last + checked
            more = self._sizes[0] - len(kept) if self._sizes else -len(kept) % self._multiple
            wanted = self._upload(np.array(kept + [0] * more, dtype=np.int64))
            logits = self._model(
                input_ids=input_ids[None],
                position_ids=self._upload(np.array(positions, dtype=np.int64))[None],
                use_cache=False,
                logits_to_keep=wanted,
                engine=Step(self.cache, spans, self._kernel, flash=self._flash(spans), kept=wanted),
            ).logits[0]
        if not rows:
            return
        slots = [row.slot for row in rows]
        choice = self._sampler.choose(logits[: len(rows)], slots)
        verified: list[int] = []
        if checked:
            best, found, _ = most_probable(logits[len(rows) : len(rows) + len(checked)])
            verified = torch.where(best.isfinite(), found, -1).tolist()
        event = None
        if self._lag:
            self._newest[self._upload(np.array(slots, dtype=np.int64))] = choice.tokens
            event = torch.cuda.Event()  # type: ignore[no-untyped-call]
            event.record()
        guesses = [guess for chunk, guess in zip(plan.chunks, guesses, strict=True) if chunk.chooses]
        self._unread.append(_Unread(rows, choice, event, guesses, verified))

    def _guess(self, plan: Plan) -> list[list[int]]:
        """Return the guesses for each chunk of a step, of which they become part."""
        rows = [chunk.row for chunk in plan.chunks]
        few = len(rows) < DRAFT_ROWS and all(chunk.position >= len(chunk.row.tokens) for chunk in plan.chunks)
        if self._drafts is None or not few:
            return [[] for _ in rows]
        guesses = self._drafts.guess(rows, [self.scheduler.spare(row) for row in rows])
        for chunk, guess in zip(plan.chunks, guesses, strict=True):
            chunk.count += len(guess)
        return guesses

    def _flash(self, spans: list[Span]) -> Flash | None:
        half = self._model.dtype in HALF
        return flash_spans(spans, self._device) if self._device.type == "cuda" and half else None

    def flush(self) -> None:
        """Read the tokens of all steps under way."""
        while self._unread:
            self._read()
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)

    def _read(self) -> list[Sequence]:
        """Read the tokens of the oldest step; return the sequences that they end."""
        unread = self._unread.popleft()
        choice, verified = unread.choice, iter(unread.verified)
        if unread.event is not None:
            unread.event.synchronize()
        tokens, finite = choice.tokens.tolist(), choice.finite.tolist()
        logprobs = choice.logprobs.read() if choice.logprobs is not None else {}
        ended = []
        for index, (row, guess) in enumerate(zip(unread.rows, unread.guesses, strict=True)):
            behind = accepted(tokens[index], guess, [next(verified) for _ in guess]) if guess else []
            if not row.live:
                continue  # it had ended, or gave way, when this step was under way
            sequence = row.sequence
            assert sequence is not None
            if finite[index]:
                sequence.token_ids.append(tokens[index])
                if index in logprobs:
                    sequence.logprobs.append(logprobs[index])
            else:
                sequence.error = "the model's logits are not finite numbers; try another dtype"
            if guess and self._drafts is not None:
                self._drafts.learn(len(guess), len(behind))
                sequence.guessed += len(guess)
                sequence.accepted += len(behind)
            while not (over := sequence.error is not None or self._has_ended(row, sequence)) and behind:
                sequence.token_ids.append(behind.pop(0))
                self.scheduler.advance(row)
            if over:
                self.scheduler.finish(row)
                ended.append(sequence)
        return ended

    def _has_ended(self, row: Row, sequence: Sequence) -> bool:
        sampling = sequence.request.sampling
        return (
            len(sequence.token_ids) >= row.limit
            or sequence.token_ids[-1] in row.endings
            or ends_with_stop(sequence.token_ids, sampling.stop, self._decode, sampling.min_new_tokens)
        )

    def _recover(self, failure: str, out_of_memory: bool) -> None:
        """Begin again after a step that failed: with less, or one by one; alone, a request fails."""
        rows = list(self.scheduler.rows)
        self._unread.clear()
        self.scheduler.restart_all(alone=not out_of_memory)
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
        self.scheduler.excuse()
        LOGGER.warning("request %r failed alone: %s", sequence.request.id, failure)
        self._faults += not out_of_memory
        if self._faults >= FAULT_AFTER:
            raise EngineFault(f"{self._faults} requests failed one after the other, the last with {failure}")
        self.failed.append(sequence)

    def _upload(self, values: np.ndarray[Any, Any]) -> torch.Tensor:
        tensor = torch.from_numpy(values)
        if self._device.type == "cuda" and len(values):
            tensor = tensor.pin_memory()  # a copy from other memory waits for all that the device has to do
        return tensor.to(self._device, non_blocking=True)
