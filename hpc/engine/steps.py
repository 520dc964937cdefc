"""What the steps of an engine computed, and how long they took."""

from dataclasses import dataclass, fields
from typing import NamedTuple


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

    def __add__(self, other: "StepTotals") -> "StepTotals":
        """Return what the steps of both computed together."""
        return StepTotals(*(getattr(self, f.name) + getattr(other, f.name) for f in fields(self)))


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
