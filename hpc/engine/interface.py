"""The seam of the engines: an engine takes requests from a `Source` and yields sequences as they end.

Tokens in, tokens out: it knows nothing of MPI, files or text. This file imports no engine, so that torch
is loaded with the first engine and not with the command line.
"""

import time
from collections.abc import Callable, Iterable, Iterator
from typing import Protocol

from hpc.engine.bounds import Bounds
from hpc.engine.sequence import Sequence
from hpc.engine.steps import StepLog
from hpc.request import Request

OnStep = Callable[[], bool]
"""An engine calls it once a decoding step; True means: stop now and abandon the sequences in flight."""

IDLE_S = 0.005
"""Seconds that an engine with nothing to do sleeps between two pulls: a rank must answer messages within 10 ms."""


class Source(Protocol):
    """Gives an engine its requests."""

    @property
    def exhausted(self) -> bool:
        """Whether no further request will come."""

    def pull(self, num_tokens: int) -> list[Request]:
        """Return the next requests, at least one: those whose prompts and completions take up to `num_tokens`.

        Never blocks; an empty list now may be followed by requests later.
        """


class Engine(Protocol):
    """Generates sequences. `generate` may be closed at any step and leaves nothing behind."""

    @property
    def steps(self) -> StepLog:
        """The steps so far; empty if the engine does not see its steps."""

    @property
    def bounds(self) -> Bounds | None:
        """Limits of a step and of the KV cache; None if the engine does not tell them."""

    def generate(self, source: Source, on_step: OnStep) -> Iterator[list[Sequence]]:
        """Yield sequences as they end, until the source is exhausted or `on_step` says stop."""


def begin(requests: Iterable[Request]) -> list[Sequence]:
    """Return the sequences of requests, in order: one for each sample."""
    return [Sequence(request, sample=sample) for request in requests for sample in range(request.sampling.n)]


def pull(source: Source, num_tokens: int, on_step: OnStep) -> list[Request]:
    """Wait for requests, with nothing else to do; return an empty list when no more come or `on_step` says stop."""
    while not (requests := source.pull(num_tokens)):
        if source.exhausted or on_step():
            return []
        time.sleep(IDLE_S)
    return requests
