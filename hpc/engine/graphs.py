"""CUDA graphs of decoding steps: a step of a small model is a thousand small launches, replayed as one.

A graph has a fixed number of rows, the next larger one of `SIZES`; the rows too many decode a token
in an extent of their own that nobody reads.
"""

import bisect
import logging
from typing import Any

import numpy as np
import torch

from hpc.engine.attention import Flash, Spans, Step
from hpc.engine.cache import ALIGN, Cache

LOGGER = logging.getLogger(__name__)

SIZES = (1, 2, 4, 8, *range(16, 4097, 16))
"""Rows of a graph: finer than powers of two, which compute up to twice what is needed."""


class DecodeGraphs:
    """Runs steps in which every row decodes. `fixed`: always with `max_seqs` rows."""

    def __init__(self, model: Any, cache: Cache, max_seqs: int, most_keys: int, fixed: bool) -> None:
        self._model = model
        self._cache = cache
        self._most = SIZES[bisect.bisect_left(SIZES, max_seqs)]
        self._most_keys = most_keys
        self._fixed = fixed
        self._spare = cache.extents.take(ALIGN)
        """Where the rows too many are."""
        device = model.device
        new: Any = lambda size, dtype: torch.zeros(size, dtype=dtype, device=device)  # noqa: E731
        self._ids = new((1, self._most), torch.int64)
        self._positions = new((1, self._most), torch.int64)
        self._stored = new(self._most, torch.int64)
        self._key_starts = new(self._most + 1, torch.int32)
        self._key_counts = new(self._most, torch.int32)
        self._rows = torch.arange(self._most + 1, dtype=torch.int32, device=device)
        self._graphs: dict[int, tuple[torch.cuda.CUDAGraph, torch.Tensor]] = {}
        self._pool: Any = None

    @property
    def usable(self) -> bool:
        """Whether graphs can be had at all."""
        return self._spare is not None

    def run(self, input_ids: torch.Tensor, spans: Spans) -> torch.Tensor:
        """Return the logits [rows, vocabulary] after the tokens `input_ids` [rows]; they last until the next call."""
        rows = len(spans)
        size = self._most if self._fixed else SIZES[bisect.bisect_left(SIZES, rows)]
        spare = self._spare or 0
        host = np.zeros((4, size), dtype=np.int64)
        host[1:3], host[3] = spare, 1  # the rows too many
        _, _, position, start, _, _ = spans.T
        host[:, :rows] = position, start + position, start, position + 1
        positions, stored, starts, counts = torch.from_numpy(host).pin_memory().to(self._ids.device, non_blocking=True)
        self._ids[0, :rows] = input_ids
        self._positions[0, :size] = positions
        self._stored[:size] = stored
        self._key_starts[:size] = starts
        self._key_counts[:size] = counts
        if size not in self._graphs:
            self._capture(size)
        graph, logits = self._graphs[size]
        graph.replay()
        return logits[:rows]

    def _capture(self, size: int) -> None:
        flash = Flash(
            self._stored[:size], self._rows[: size + 1], self._key_starts[: size + 1], self._key_counts[:size],
            1, self._most_keys,
        )  # fmt: skip
        step = Step(self._cache, [], flash=flash)
        keep = torch.arange(size, device=self._ids.device)

        def forward() -> torch.Tensor:
            out: torch.Tensor = self._model(
                input_ids=self._ids[:, :size],
                position_ids=self._positions[:, :size],
                use_cache=False,
                logits_to_keep=keep,
                engine=step,
            ).logits[0]
            return out

        stream: Any = torch.cuda.Stream()  # type: ignore[no-untyped-call]
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(2):  # what is done once, as loading kernels and choosing algorithms, is not for a graph
                forward()
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self._pool):
            logits = forward()
        self._pool = graph.pool()
        self._graphs[size] = graph, logits
        LOGGER.debug("captured a graph of %d rows", size)
