"""Lay a planned step out as the arrays of one forward pass: host code alone, and little of it for each row."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from hpc.engine import StepShape
from hpc.engine.attention import Span, Spans
from hpc.engine.schedule import Plan, Row

Ints = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Packed:
    """A step: the rows that decode, then chunks of prompts, then tokens that only fill it up."""

    spans: Spans
    token_ids: Ints
    """[tokens]; 0 for what the host does not know."""
    positions: Ints
    """[tokens]"""
    kept: Ints
    """Tokens whose logits are wanted: of each row that chooses its last but guesses, then all guesses, then any."""
    choosing: list[Row]
    """The rows that choose."""
    shape: StepShape


@dataclass(frozen=True)
class Packer:
    """What all steps of a run have in common."""

    share: bool
    """A shared prefix is read where it lies."""
    known: bool
    """The host knows the newest token of a row that decodes."""
    multiple: int
    """Tokens, and those whose logits are wanted, are filled up to a multiple of it."""
    fixed: tuple[int, int] | None = None
    """Instead, how many they are: in steps that only decode, and in all others."""

    def pack(self, plan: Plan, guesses: Sequence[Sequence[int]] = ()) -> Packed:
        """Lay out a step that computes something. `guesses` follow the newest token of each row that decodes."""
        n, prompts = len(plan.rows), plan.prompts
        rows = plan.rows + [chunk.row for chunk in prompts]
        spans = np.zeros((len(rows), len(Span._fields)), dtype=np.int64)
        first, tokens, position, start, prefix, cut = spans.T
        tokens[:n] = [1 + len(guess) for guess in guesses] if guesses else 1
        position[:n] = plan.positions
        start[:] = [row.start for row in rows]
        if self.share:
            prefix[:] = [row.prefix.start if row.prefix else 0 for row in rows]
            cut[:] = [row.cut for row in rows]
        if prompts:
            tokens[n:] = [chunk.count for chunk in prompts]
            position[n:] = [chunk.position for chunk in prompts]
        ends = tokens.cumsum()
        first[1:] = ends[:-1]
        length = int(ends[-1])
        token_ids, positions = np.zeros((2, self._size(length, bool(prompts))), dtype=np.int64)
        positions[:length] = np.arange(length) + (position - first).repeat(tokens)
        if self.known:
            token_ids[first[:n]] = [row.sequence.token_ids[-1] for row in plan.rows]  # type: ignore[union-attr]
        for chunk, begin, end in zip(prompts, first[n:].tolist(), ends[n:].tolist(), strict=True):
            token_ids[begin:end] = chunk.row.tokens[chunk.position : chunk.position + chunk.count]
        last, choosing, guessed = ends - 1, plan.rows, np.empty(0, dtype=np.int64)
        if prompts:
            choosing = choosing + [chunk.row for chunk in prompts if chunk.chooses]
            last = last[[True] * n + [chunk.chooses for chunk in prompts]]
        if guesses:
            last = first
            guessed = np.setdiff1d(np.arange(length), first)
            token_ids[guessed] = np.concatenate(guesses)
        chosen = len(last) + len(guessed)
        kept = np.zeros(self._size(chosen, False), dtype=np.int64)
        kept[:chosen] = np.concatenate([last, guessed])
        prompt = length - int(ends[n - 1] if n else 0)
        pairs = float((tokens[n:] * (position[n:] + tokens[n:] / 2)).sum()) if prompt else 0.0
        shape = StepShape(length, prompt, chosen, pairs, int((position[:n] + tokens[:n]).sum()))
        return Packed(spans, token_ids, positions, kept, choosing, shape)

    def _size(self, count: int, prompts: bool) -> int:
        """Return to how many so many tokens are filled up, in a step with or without prompts."""
        return self.fixed[prompts] if self.fixed else count + -count % self.multiple
