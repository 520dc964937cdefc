"""Measure steps of chosen shapes on made-up requests, and the peak speed of the device.

The cache is filled with a constant instead of computed keys and values, so that long sequences cost no prefill.
"""

import time
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from hpc.engine.extents import aligned
from hpc.engine.native.engine import NativeEngine
from hpc.engine.native.runner import ModelRunner
from hpc.engine.native.scheduled_step import LiveSequence
from hpc.engine.sequence import Sequence
from hpc.engine.steps import Measured
from hpc.request import Request
from hpc.sampling_params import SamplingParams

MIN_SHAPES = 5
"""Shapes that are measured however short the time is: a fit of the costs needs them."""
MAX_STEPS = 4
"""Measured steps of a shape, besides the first, which is a warm-up and counts only if no other follows."""
MIN_VOCABULARY = 32
"""Token ids below this exist in every model."""
STORED = 0.01
"""The value of all numbers in the cache: any finite value does."""
LONG = 2048
"""Stored tokens of a long sequence, if the model's context is as long."""


@dataclass(frozen=True)
class Shape:
    """What a measured step computes."""

    decoding: int = 0
    """Number of decoding sequences."""
    stored: int = 0
    """Stored tokens of each of these, or of the prompt."""
    prompt: int = 0
    """Number of prompt tokens."""


class _Nothing:
    """A source that gives nothing and is never exhausted."""

    exhausted = False

    def pull(self, num_tokens: int) -> list[Request]:  # noqa: ARG002  (the signature of a source)
        """Return no request."""
        return []


def shapes(max_seqs: int, step_tokens: int, context_tokens: int, cache_tokens: int) -> list[Shape]:
    """Return the shapes to measure, the most telling first: a trial may have no time for all of them."""
    long = min(LONG, context_tokens // 2, cache_tokens // 4)
    few = min(8, max_seqs, max(1, cache_tokens // 2 // max(1, long)))
    max_count = min(max_seqs, max(1, cache_tokens // 256))
    counts = [n for n in (1, 2, 4, 8, 12, 16, 24, 32, 48, 64, 96, 128, 192, 256, 384, 512) if n <= max_count]
    room = max(1, min(step_tokens, context_tokens - 8, cache_tokens // 2))
    prompts = [n for n in (16, 64, 128, 256, 512, 1024, 2048, 4096, 8192) if n <= room] or [room]
    middle, largest = counts[len(counts) // 2], prompts[-1]
    behind = Shape(prompt=min(largest, 512, context_tokens - long - 8), stored=long)
    first = [
        Shape(1, 32), Shape(prompt=prompts[len(prompts) // 2]), Shape(middle, 32), Shape(few, long), behind,
        Shape(counts[-1], 32), Shape(prompt=largest),
    ]  # fmt: skip
    rest = [Shape(n, 32) for n in reversed(counts)] + [Shape(prompt=n) for n in prompts]
    return list(dict.fromkeys([*first, *rest]))


def trial(engine: NativeEngine, seconds: float) -> list[Measured]:
    """Measure steps for about `seconds`, or longer until the first `MIN_SHAPES` shapes are measured."""
    bounds, run = engine.bounds, engine.begin()
    found: list[Measured] = []
    until = time.perf_counter() + seconds
    planned = shapes(bounds.max_seqs, bounds.step_tokens, engine.context_tokens, bounds.cache_tokens)
    for index, shape in enumerate(planned):
        left = until - time.perf_counter()
        if left <= 0 and index >= MIN_SHAPES:
            break
        found += _measure(run, shape, left / (len(planned) - index))
    return found


def _measure(run: ModelRunner, shape: Shape, seconds: float) -> list[Measured]:
    """Measure steps of one shape for about `seconds`."""
    found: list[Measured] = []
    if run.measured is not None:
        run.measured.clear()
    rows = [_place(run, shape.stored, shape.stored) for _ in range(shape.decoding)]
    until = time.perf_counter() + seconds
    while len(found) <= MAX_STEPS and (not found or time.perf_counter() < until):
        if shape.prompt:
            rows = [_place(run, shape.stored + shape.prompt, shape.stored)]
        run.flush()
        began = time.perf_counter()
        run.step(_Nothing())
        if not all(row.live for row in rows):  # it failed, for want of memory say: what is smaller still tells enough
            run.scheduler.waiting.clear()
            run.scheduler.reset_limits()
            break
        if shape.prompt or run.measured is not None:  # what follows is another step, or what was launched is not done
            run.flush()
        took, did = time.perf_counter() - began, run.shape
        assert did is not None
        if run.measured:  # a GPU tells itself how long it took
            [(did, took)] = run.measured
            run.measured.clear()
        found.append((did.tokens, did.chosen, did.pairs, did.kv, took))
        if shape.prompt:
            _end(run, rows)
    if shape.decoding:
        _end(run, rows)
    return found[1:] or found


def _place(run: ModelRunner, tokens: int, stored: int) -> LiveSequence:
    """Admit a sequence of `tokens` prompt tokens of which `stored` count as computed; if all are, it decodes."""
    prompt = np.random.default_rng(tokens).integers(0, MIN_VOCABULARY, tokens, dtype=np.int32)
    sampling = SamplingParams(max_new_tokens=2 * MAX_STEPS + 2, ignore_eos=True)
    request = Request(0, 0, prompt, sampling, bytes(16), len(prompt))
    run.scheduler.waiting.append(Sequence(request))
    [row] = run.admit(_Nothing())
    for pools in run.cache.layers.values():
        for pool in pools:
            pool[row.start : row.start + aligned(row.capacity)] = STORED  # the kernel keeps ALIGN tokens together
    row.done = stored
    if stored == tokens:
        assert row.sequence is not None
        row.sequence.token_ids.append(int(prompt[0]))
        row.num_scheduled = 1
    return row


def _end(run: ModelRunner, rows: list[LiveSequence]) -> None:
    run.flush()
    for row in rows:
        if row.live:
            run.scheduler.finish(row)


@torch.inference_mode()
def bytes_per_second(device: torch.device) -> float:
    """Measure how fast memory is read: by the product of a vector with a matrix of 256 MiB, which fits in no cache."""
    matrix = torch.full((8192, 8192), 0.5, device=device)
    vector = torch.full((8192,), 0.5, device=device)
    return matrix.nbytes / _fastest(lambda: matrix @ vector, device)


@torch.inference_mode()
def flops_per_second(device: torch.device, dtype: torch.dtype) -> float:
    """Measure the operations per second of a product of two large matrices."""
    size = 8192 if device.type == "cuda" else 1536
    left, right = (torch.full((size, size), 0.5, device=device, dtype=dtype) for _ in range(2))
    return 2 * size**3 / _fastest(lambda: left @ right, device)


def _fastest(work: Any, device: torch.device, rounds: int = 5) -> float:
    times = []
    for _ in range(rounds):
        began = time.perf_counter()
        work()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        times.append(time.perf_counter() - began)
    return min(times)
