"""Record what the steps of an engine computed and how long they took."""

from dataclasses import dataclass, fields
from typing import NamedTuple


class StepShape(NamedTuple):
    """The amounts of work of a step, on which its duration depends."""

    tokens: int
    """Rows of every linear layer: the newest token of each decoding sequence, and prompt tokens."""
    prompt: int
    """Prompt tokens among them."""
    chosen: int
    """Rows of the head: tokens whose next token is chosen."""
    pairs: float
    """Pairs of a prompt token and one that it attends to: the sum of n*(p + n/2) over chunks of n tokens behind p."""
    kv: int
    """Stored tokens that decoding sequences attend to."""


Measured = tuple[int, int, float, int, float]
"""A measured step: tokens, chosen, pairs and kv of its `StepShape`, then seconds."""


@dataclass
class StepTotals:
    """Sums over all steps of an engine; the fields named step_ are those of `StepShape`."""

    steps: int = 0
    step_tokens: int = 0
    step_prompt: int = 0
    step_chosen: int = 0
    step_pairs: float = 0.0
    step_kv: int = 0
    cached_tokens: int = 0
    """Prompt tokens found in the cache of earlier requests; 0 for an engine that shares planned prefixes."""
    prefill_s: float = 0.0
    """Seconds for prompts: of a step that also decodes, the share of its prompt tokens."""
    decode_s: float = 0.0

    def __add__(self, other: "StepTotals") -> "StepTotals":
        """Return the sums over the steps of both."""
        return StepTotals(*(getattr(self, f.name) + getattr(other, f.name) for f in fields(self)))


class StepLog:
    """A sample of an engine's steps: every step at first, then every second, every fourth and so on; and the totals."""

    MAX_SAMPLES = 4096
    """Enough to fit costs to, and few enough to send."""

    def __init__(self) -> None:
        self.samples: list[Measured] = []
        self.totals = StepTotals()
        self._every = 1

    def add(self, shape: StepShape, seconds: float) -> None:
        """Record a step."""
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
        if len(self.samples) == self.MAX_SAMPLES:
            self.samples = self.samples[1::2]
            self._every *= 2
