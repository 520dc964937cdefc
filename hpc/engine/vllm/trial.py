"""Measure the steps that vLLM computes for made-up requests."""

import time
from dataclasses import dataclass

import numpy as np

from hpc.engine.steps import Measured, StepLog
from hpc.engine.vllm.engine import VllmEngine
from hpc.request import Request
from hpc.sampling_params import SamplingParams

MIN_VOCABULARY = 32
"""Number of token ids that every model has."""
NEW_TOKENS = 24
"""New tokens of each made-up request: enough steps that decode, few enough for many requests a second."""
LONG = 2048
"""Tokens of the longest prompts, if the context allows: long enough to see the cost of attention."""


@dataclass
class _Given:
    """A source with a fixed list of requests."""

    requests: list[Request]

    @property
    def exhausted(self) -> bool:
        """Whether nothing more will come."""
        return not self.requests

    def pull(self, num_tokens: int) -> list[Request]:  # noqa: ARG002  (the signature of a source)
        """Return the next request."""
        return [self.requests.pop(0)] if self.requests else []


def served(engine: VllmEngine, seconds: float) -> list[Measured]:
    """Measure vLLM's steps for about `seconds`, on few and many, short and long made-up requests.

    vLLM plans its batches itself, so the shapes of the steps follow from the requests and cannot be chosen.
    """
    max_seqs = engine.bounds.max_seqs
    long = max(1, min(LONG, engine.context_tokens // 2, engine.bounds.cache_tokens // 8))
    counts = [(1, 16), (max_seqs, 16), (4, long), (16, 128), (max_seqs // 2, 16), (2, long), (8, 16), (32, 64)]
    shaped = [(max(1, count), min(length, long)) for count, length in counts]
    new = max(1, min(NEW_TOKENS, engine.context_tokens - long))
    random = np.random.default_rng(0)
    _serve(engine, 2, min(16, long), new, random, float("inf"))  # the first steps take longer
    engine.steps = StepLog()
    until = time.perf_counter() + seconds
    while time.perf_counter() < until:
        for count, length in shaped:
            _serve(engine, count, length, new, random, until)
    return engine.steps.samples


def _serve(engine: VllmEngine, count: int, length: int, new: int, random: np.random.Generator, until: float) -> None:
    sampling = SamplingParams(max_new_tokens=new, ignore_eos=True)
    prompts = random.integers(0, MIN_VOCABULARY, (count, length), dtype=np.int32)
    source = _Given([Request(row, row, p, sampling, bytes(16), length) for row, p in enumerate(prompts)])
    for _ in engine.generate(source, lambda: time.perf_counter() > until):
        pass
