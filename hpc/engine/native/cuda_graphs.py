"""Capture decoding steps as CUDA graphs: a thousand small launches are replayed as one.

A graph has a fixed number of rows, the next larger one of `SIZES`; the surplus rows decode a token
behind the extents of the cache, where nobody reads.
"""

import bisect
import contextlib
import logging
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch

from hpc.engine.cache import Cache
from hpc.engine.failure import is_out_of_memory, one_line
from hpc.engine.layers.attention import AttentionMetadata, Behind, Flash, Spans, runs_of

LOGGER = logging.getLogger(__name__)


SIZES = (1, 2, 4, 8, *range(16, 128, 16), *range(128, 256, 32), *range(256, 512, 64), *range(512, 4097, 256))
"""Numbers of rows with a graph: finer than powers of two, which would compute up to twice as many rows as needed; each
graph takes time and memory."""
MAX_DROPS = 2
"""Number of times that graphs give their memory back; after that steps run without graphs."""


class CaptureError(Exception):
    """A step cannot be captured; it may still be computed without a graph."""


class DecodeGraphs:
    """Runs steps in which every row decodes. `fixed`: always with `max_seqs` rows.

    All inputs of a graph live as long as this object, for a graph holds only addresses.
    """

    def __init__(self, model: Any, cache: Cache, max_seqs: int, max_keys: int, fixed: bool) -> None:
        self._model = model
        self._cache = cache
        self._max_rows = SIZES[bisect.bisect_left(SIZES, max_seqs)]
        self._max_keys = max_keys
        self._fixed = fixed
        self._drops = 0
        device = model.device
        new: Any = lambda size, dtype, value=0: torch.full(size, value, dtype=dtype, device=device)  # noqa: E731
        rows, spare = self._max_rows, cache.spare_start
        self._ids = new((1, rows), torch.int64)
        self._positions = new((1, rows), torch.int64)
        self._stored = new((rows,), torch.int64, spare)
        self._key_starts = new((rows + 1,), torch.int32, spare)
        self._key_counts = new((rows,), torch.int32, 1)
        self._rows = torch.arange(rows + 1, dtype=torch.int32, device=device)
        self._all = torch.arange(rows, device=device)
        self._logits: torch.Tensor | None = None
        """[rows, vocabulary], of the latest step: one for all graphs."""
        self._run_starts = new((rows + 1,), torch.int32)
        self._prefix_starts = new((rows + 1,), torch.int32)
        self._prefix_counts = new((rows,), torch.int32)
        self._behind = new((rows,), torch.bool)
        self._graphs: dict[tuple[int, bool], torch.cuda.CUDAGraph] = {}
        """By number of rows, and whether some of them are behind shared prefixes."""
        self._pool: Any = None
        """Memory pool of the graphs: one for all, since one is replayed at a time."""
        self._stream: Any = torch.cuda.Stream()  # type: ignore[no-untyped-call]
        """One stream for all captures: the allocator keeps freed memory apart by stream."""

    def capture_all(self) -> None:
        """Capture a graph of every size, the largest first, for the others use its memory."""
        sizes = [self._max_rows] if self._fixed else SIZES[: SIZES.index(self._max_rows) + 1]
        for size in reversed(sizes):
            self._capture(size)

    def drop(self, max_seqs: int) -> None:
        """Free the graphs and their memory; later ones, of up to `max_seqs` rows, are captured when they are needed."""
        self._graphs, self._pool, self._logits = {}, None, None
        self._max_rows = min(self._max_rows, SIZES[bisect.bisect_left(SIZES, max_seqs)])
        self._drops += 1

    def restore(self) -> None:
        """Allow graphs of as many rows as at first again: the request that took their memory is gone."""
        if self._drops:
            self._graphs, self._pool, self._logits = {}, None, None
            self._max_rows, self._drops = len(self._all), 0

    def can_run(self, spans: Spans) -> bool:
        """Return whether a step can be replayed: it must not have more rows or keys than a graph was captured for."""
        return self._drops < MAX_DROPS and len(spans) <= self._max_rows and int(spans[:, 2].max()) < self._max_keys

    def run(self, input_ids: torch.Tensor, spans: Spans) -> torch.Tensor:
        """Return the logits [rows, vocabulary] after the tokens `input_ids` [rows]; they last until the next call.

        Raises `CaptureError` if there is no graph of that size and none can be made.
        """
        rows = len(spans)
        size = self._max_rows if self._fixed else SIZES[bisect.bisect_left(SIZES, rows)]
        _, _, position, start, _, cut = spans.T
        shares = bool(cut.any())
        host = np.zeros((8 if shares else 4, size), dtype=np.int64)
        host[1:3], host[3] = self._cache.spare_start, 1  # the rows too many
        own = position - cut
        host[:4, :rows] = position, start + own, start, own + 1
        if shares:
            begins, prefix, count = (runs := runs_of(spans)).T
            host[4] = rows  # there the runs too many are, which are empty
            host[4, : len(runs) - 1], host[5, : len(runs)], host[6, : len(runs)] = begins[1:], prefix, count
            host[7, :rows] = cut > 0
        on_device = torch.from_numpy(host).pin_memory().to(self._ids.device, non_blocking=True)
        positions, stored, starts, counts, *more = on_device
        self._ids[0, :rows] = input_ids
        self._positions[0, :size] = positions
        self._stored[:size] = stored
        self._key_starts[:size] = starts
        self._key_counts[:size] = counts
        if shares:
            self._run_starts[1 : size + 1], self._prefix_starts[:size], self._prefix_counts[:size] = more[:3]
            self._behind[:size] = more[3]
        if (size, shares) not in self._graphs:
            try:
                self._capture(size, shares)
            except Exception as error:
                if is_out_of_memory(error):  # without graphs it may do
                    self.drop(self._max_rows)
                raise CaptureError(one_line(error)) from None
        self._graphs[size, shares].replay()
        assert self._logits is not None
        return self._logits[:rows]

    def _capture(self, size: int, shares: bool = False) -> None:
        behind = None
        if shares:
            behind = Behind(
                self._run_starts[: size + 1], self._prefix_starts[: size + 1], self._prefix_counts[:size],
                self._behind[:size], size, self._max_keys,
            )  # fmt: skip
        flash = Flash(
            self._stored[:size], self._rows[: size + 1], self._key_starts[: size + 1], self._key_counts[:size],
            1, self._max_keys, behind,
        )  # fmt: skip
        step = AttentionMetadata(self._cache, [], flash=flash)

        def forward() -> torch.Tensor:
            out: torch.Tensor = self._model(
                input_ids=self._ids[:, :size],
                position_ids=self._positions[:, :size],
                use_cache=False,
                logits_to_keep=self._all[:size],
                engine=step,
            ).logits[0]
            return out

        # Work that is done once, such as loading kernels and choosing algorithms, must not be captured.
        self._stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self._stream):
            logits = forward()
            with _nothing_waits():  # else the capture would fail, and leave the allocator's books open
                forward()
        torch.cuda.current_stream().wait_stream(self._stream)
        if self._logits is None:
            self._logits = torch.empty(self._max_rows, logits.shape[-1], dtype=logits.dtype, device=self._ids.device)
        del logits
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self._pool, stream=self._stream):
            self._logits[:size].copy_(forward())
        self._pool = graph.pool()
        self._graphs[size, shares] = graph
        LOGGER.debug("captured a graph of %d rows", size)


@contextlib.contextmanager
def _nothing_waits() -> Iterator[None]:
    """Make every call that waits for the device raise."""
    before = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode(before)


def warn_of(reason: object) -> None:
    """Log that steps are computed without graphs, and why."""
    LOGGER.warning("CUDA graphs are off, which makes small steps slower: %s", reason)
