"""The `native` engine: continuous batching over a model of transformers, whose attention it replaces.

A step is one forward pass over a packed row of tokens: the newest token of every decoding sequence,
and chunks of prompts. Nothing is padded, and a slot that becomes free is taken in the next step, or
together with others (`EngineLimits.refill`). On a CPU the logits of a sequence do not depend on the
other sequences of a step.
"""

import time
from collections.abc import Collection, Iterator
from dataclasses import replace
from typing import Any

import torch

from hpc.engine.bounds import Bounds
from hpc.engine.cache import Cache, token_bytes
from hpc.engine.extents import ALIGN
from hpc.engine.failure import is_out_of_memory, one_line
from hpc.engine.form import KVShape
from hpc.engine.interface import OnStep, Source, begin, pull
from hpc.engine.kernel.kernel import Kernel
from hpc.engine.native.cuda_graphs import DecodeGraphs, warn_of
from hpc.engine.native.limits import EngineLimits
from hpc.engine.native.runner import ModelRunner
from hpc.engine.sequence import Sequence
from hpc.engine.steps import StepLog
from hpc.trim import Decode


class NativeEngine:
    """One replica of a model whose attention is `hpc.engine.layers.attention`.

    `layouts` has the shapes that each layer stores for a token. `decode` turns token ids into text, for
    requests with stop strings only. On a CPU `kernel` attends, or torch if it is None. On a GPU FlashAttention
    attends if `flash` is set, and decoding steps are replayed if `graphs` is set.
    """

    def __init__(
        self,
        model: Any,
        layouts: dict[int, KVShape],
        eos_token_ids: Collection[int],
        decode: Decode,
        limits: EngineLimits,
        kernel: Kernel | None = None,
        flash: bool = False,
        graphs: bool = False,
    ) -> None:
        self._model = model
        self.layouts = layouts
        self._eos_token_ids = eos_token_ids
        self._decode = decode
        self._limits = limits
        self._kernel = kernel
        self.flash = flash
        self.graphs = graphs
        self._kept: tuple[Cache, DecodeGraphs | None] | None = None
        """On a GPU, what one run leaves to the next: capturing takes time, and nobody else needs the memory."""
        self.steps = StepLog()

    @property
    def bounds(self) -> Bounds:
        """Limits of its steps and of its KV cache."""
        each = token_bytes(self.layouts, self._model.dtype, self._kernel.panel if self._kernel else 0)
        limits = self._limits
        return Bounds(limits.max_seqs, limits.step_tokens, limits.cache_bytes // each, each, limits.refill)

    @property
    def context_tokens(self) -> int:
        """Maximum number of tokens of a sequence."""
        return self._limits.context_tokens

    @property
    def device(self) -> torch.device:
        """The device of the model."""
        device: torch.device = self._model.device
        return device

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the model."""
        dtype: torch.dtype = self._model.dtype
        return dtype

    def begin(self) -> ModelRunner:
        """Return a runner with an empty cache. On a GPU only one runner may be at work at a time."""
        if self.device.type == "cuda":
            torch.cuda.set_device(self.device)
        cache, graphs = self._kept or self._new_memory()
        if self.device.type == "cuda":
            cache.forget()
            self._kept = cache, graphs
        limits = self._limits
        if graphs is None:  # no step is replayed: waiting would gain nothing
            limits = replace(limits, refill=0.0)
        else:
            graphs.restore()
        return ModelRunner(
            self._model, cache, limits, self._eos_token_ids, self._decode, self._kernel, self.flash, graphs
        )

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
                if run.measured is not None:
                    for shape, seconds in run.measured:
                        self.steps.add(shape, seconds)
                    run.measured.clear()
                elif run.shape is not None:  # including what the rank does between two steps
                    self.steps.add(run.shape, time.perf_counter() - began)
                if over:
                    return
            if failed := run.recovery.flush():
                yield failed
        finally:
            del run

    def _new_memory(self) -> tuple[Cache, DecodeGraphs | None]:
        """Return a cache, and captured graphs of all sizes over it if they can be captured."""
        cache = self._new_cache()
        if not self.graphs:
            return cache, None
        limits = self._limits
        graphs = DecodeGraphs(self._model, cache, limits.max_seqs, limits.context_tokens, limits.deterministic)
        try:
            with torch.inference_mode():
                graphs.capture_all()
        except Exception as error:  # no request is to blame
            warn_of(one_line(error))
            return cache, None
        return cache, graphs

    def _new_cache(self) -> Cache:
        device, dtype, panel = self._model.device, self._model.dtype, self._kernel.panel if self._kernel else 0
        num_tokens = self.bounds.cache_tokens
        while True:
            try:
                return Cache(self.layouts, num_tokens, dtype, device, panel, ALIGN if self.graphs else 0)
            except Exception as error:
                if not is_out_of_memory(error) or num_tokens < ALIGN:
                    raise
            num_tokens //= 2
