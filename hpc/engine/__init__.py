"""One replica: tokens in, tokens out. Knows nothing of MPI, files or text.

An engine is handed a `Source` of requests and yields sequences as they end. This file holds the
seam, and imports no engine: torch is loaded with the first engine, not with the command line.
"""

import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import NamedTuple, Protocol

from hpc.records import Request, TokenLogprobs

OnStep = Callable[[], bool]
"""Called once a decoding step; True means: stop now, and leave what is in flight."""

IDLE_S = 0.005
"""How long an engine with nothing to do sleeps between two looks at its source."""


class EngineFault(Exception):
    """The engine itself is broken, and not one request: nothing more can be expected of it."""


@dataclass(slots=True)
class Sequence:
    """A sample of a request while it grows, and when it has ended."""

    request: Request
    token_ids: list[int] = field(default_factory=list)
    """Generated so far; an engine may run past the end, which is then trimmed."""
    error: str | None = None
    """Why this request cannot be completed, for example that it alone does not fit in memory."""
    sample: int = 0
    """Index among the `n` samples of its request, each of which is a sequence of its own."""
    logprobs: list[TokenLogprobs] = field(default_factory=list)
    """Of each token, where the request asks for them."""
    guessed: int = 0
    """Tokens that were guessed while it grew."""
    accepted: int = 0
    """Those among them that the model chose."""


class StepShape(NamedTuple):
    """What a step computes: all that its duration depends on."""

    tokens: int
    """Rows of every linear layer: the newest token of each sequence, and those of prompts."""
    prompt: int
    """Those among them that are of prompts."""
    chosen: int
    """Rows of the head: tokens that are chosen."""
    pairs: float
    """Of prompts, pairs of a token and one that it attends to: the sum of n*(p + n/2) for n behind p."""
    kv: int
    """Stored tokens that the sequences which decode read."""


Measured = tuple[int, int, float, int, float]
"""Of a step: tokens, chosen, pairs and kv of its `StepShape`, and seconds."""


@dataclass
class StepTotals:
    """What all steps of an engine computed, and how long they took."""

    steps: int = 0
    step_tokens: int = 0
    step_prompt: int = 0
    step_chosen: int = 0
    step_pairs: float = 0.0
    step_kv: int = 0
    cached_tokens: int = 0
    """Of prompts, that were in the cache from other requests; an engine that shares otherwise has none."""
    prefill_s: float = 0.0
    """Computing prompts: of a step that also decodes, the part that its prompt tokens are of all."""
    decode_s: float = 0.0


class StepLog:
    """What an engine's steps computed, and how long they took: every one at first, then fewer, evenly."""

    MOST = 4096

    def __init__(self) -> None:
        self.samples: list[Measured] = []
        self.totals = StepTotals()
        self._every = 1

    def add(self, shape: StepShape, seconds: float) -> None:
        """Note a step."""
        totals = self.totals
        totals.steps += 1
        totals.step_tokens += shape.tokens
        totals.step_prompt += shape.prompt
        totals.step_chosen += shape.chosen
        totals.step_pairs += shape.pairs
        totals.step_kv += shape.kv
        prefill_s = seconds * shape.prompt / shape.tokens
        totals.prefill_s += prefill_s
        totals.decode_s += seconds - prefill_s
        if totals.steps % self._every == 0:
            self.samples.append((shape.tokens, shape.chosen, shape.pairs, shape.kv, seconds))
        if len(self.samples) == self.MOST:
            self.samples = self.samples[1::2]
            self._every *= 2


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
    def bounds(self) -> tuple[int, int, int, int, float] | None:
        """The values of `hpc.predict.Bounds`; None where it has no such."""

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
