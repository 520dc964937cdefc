"""One replica: tokens in, tokens out. Knows nothing of MPI, files or text.

An engine is handed a `Source` of requests and yields sequences as they end. This file holds the
seam, and imports no engine: torch is loaded with the first engine, not with the command line.
"""

import time
from collections.abc import Callable, Iterable, Iterator
from typing import Protocol

from hpc.engine.bounds import Bounds
from hpc.engine.sequence import Sequence
from hpc.engine.steps import StepLog
from hpc.request import Request

OnStep = Callable[[], bool]
"""Called once a decoding step; True means: stop now, and leave what is in flight."""

IDLE_S = 0.005
"""How long an engine with nothing to do sleeps between two looks at its source."""


class Source(Protocol):
    """Where an engine gets its requests."""

    @property
    def exhausted(self) -> bool:
        """Whether nothing more will come."""

    def pull(self, num_tokens: int) -> list[Request]:
        """Return the next requests, as many as hold `num_tokens` when they end, at least one.

        Never blocks; the list may be empty now and not later.
        """


class Engine(Protocol):
    """What generates. `generate` may be closed at any step and leaves nothing behind."""

    @property
    def steps(self) -> StepLog:
        """Steps so far; none where the engine does not see them."""

    @property
    def bounds(self) -> Bounds | None:
        """What bounds its steps; None where it has no such."""

    def generate(self, source: Source, on_step: OnStep) -> Iterator[list[Sequence]]:
        """Yield sequences as they end, until the source is exhausted or `on_step` says stop."""


def begin(requests: Iterable[Request]) -> list[Sequence]:
    """Return the sequences of requests, in order: one for each sample."""
    return [Sequence(request, sample=sample) for request in requests for sample in range(request.sampling.n)]


def pull(source: Source, num_tokens: int, on_step: OnStep) -> list[Request]:
    """Wait for requests with nothing else to do; an empty list means that it is over."""
    while not (requests := source.pull(num_tokens)):
        if source.exhausted or on_step():
            return []
        time.sleep(IDLE_S)
    return requests
