"""Lay a planned step out as the arrays of one forward pass: host code alone, and little of it for each row."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np

from hpc.arrays import Ints
from hpc.engine.layers.attention import Span, Spans
from hpc.engine.native.scheduled_step import LiveSequence, ScheduledStep
from hpc.engine.steps import StepShape


class InputBatch(NamedTuple):
    """A step: the rows that decode, then chunks of prompts, then tokens that only fill it up."""

    spans: Spans
    token_ids: Ints
    """[tokens]; 0 for what the host does not know."""
    positions: Ints
    """[tokens]"""
    kept: Ints
    """Tokens whose logits are wanted: of each row that chooses its last but drafts, then all drafts, then any."""
    choosing: list[LiveSequence]
    """The rows that choose."""
    shape: StepShape


@dataclass
class InputBatchBuilder:
    """What all steps of a run have in common."""

    share: bool
    """A shared prefix is read where it lies."""
    known: bool
    """The host knows the newest token of a row that decodes."""
    multiple: int
    """Tokens, and those whose logits are wanted, are filled up to a multiple of it."""
    fixed: tuple[int, int] | None = None
    """Instead, how many they are: in steps that only decode, and in all others."""
    _latest: InputBatch | None = field(default=None, init=False)
    """The latest step, if each of its rows decoded a token and nothing else was done."""

    def __post_init__(self) -> None:
        self._first_fixed = self.fixed

    def pack(self, plan: ScheduledStep, drafts: Sequence[Sequence[int]] = ()) -> InputBatch:
        """Lay out a step that computes something. `drafts` follow the newest token of each row that decodes."""
        decodes_only, latest = not plan.prompts and not drafts, self._latest
        if latest is not None and decodes_only and plan.rows == latest.choosing and not plan.copies:
            return self._again(latest, plan)
        packed = self._lay_out(plan, drafts)
        self._latest = packed if decodes_only else None
        return packed

    def _again(self, latest: InputBatch, plan: ScheduledStep) -> InputBatch:
        """Lay out a step that differs from the latest in its tokens and positions alone, as most steps do."""
        n, spans = len(plan.rows), latest.spans.copy()
        token_ids, positions = np.zeros((2, len(latest.token_ids)), dtype=np.int64)
        spans[:, 2] = positions[:n] = plan.positions
        if self.known:
            token_ids[:n] = [row.sequence.token_ids[-1] for row in plan.rows]  # type: ignore[union-attr]
        shape = StepShape(n, 0, n, 0.0, sum(plan.positions) + n)
        return InputBatch(spans, token_ids, positions, latest.kept, plan.rows, shape)

    def _lay_out(self, plan: ScheduledStep, drafts: Sequence[Sequence[int]]) -> InputBatch:
        n, prompts = len(plan.rows), plan.prompts
        rows = plan.rows + [chunk.row for chunk in prompts]
        spans = np.zeros((len(rows), len(Span._fields)), dtype=np.int64)
        first, tokens, position, start, prefix, cut = spans.T
        start[:] = [row.start for row in rows]
        tokens[:n], position[:n] = [1 + len(draft) for draft in drafts] if drafts else 1, plan.positions
        if prompts:
            tokens[n:], position[n:] = zip(*((chunk.count, chunk.position) for chunk in prompts), strict=True)
        if self.share and any(shared := [row.shared for row in rows]):
            cut[:], prefix[:] = shared, [row.prefix.start if row.prefix else 0 for row in rows]
        ends = tokens.cumsum()
        first[1:] = ends[:-1]
        length, prompt = int(ends[-1]), int(tokens[n:].sum()) if prompts else 0
        token_ids, positions = np.zeros((2, self._size(length, prompt > 0)), dtype=np.int64)
        positions[:length] = np.arange(length) + (position - first).repeat(tokens) if length > n else position
        if self.known:
            token_ids[first[:n]] = [row.sequence.token_ids[-1] for row in plan.rows]  # type: ignore[union-attr]
        for chunk, end in zip(prompts, ends[n:].tolist(), strict=True):
            part = chunk.row.tokens[chunk.position : chunk.position + chunk.count]
            token_ids[end - chunk.count : end] = part
        kept, choosing = ends - 1, plan.rows
        if prompts:
            choosing = choosing + [chunk.row for chunk in prompts if chunk.chooses]
            kept = kept[[True] * n + [chunk.chooses for chunk in prompts]]
        if drafts:
            drafted = np.setdiff1d(np.arange(length), first)
            token_ids[drafted] = np.concatenate(drafts)
            kept = np.concatenate([first, drafted])
        chosen = len(kept)
        kept = np.concatenate([kept, np.zeros(self._size(chosen, False) - chosen, dtype=np.int64)])
        pairs = float((tokens * (position + tokens / 2))[n:].sum()) if prompts else 0.0
        shape = StepShape(length, prompt, chosen, pairs, int((position + tokens)[:n].sum()))
        return InputBatch(spans, token_ids, positions, kept, choosing, shape)

    def shrink(self, shape: StepShape) -> bool:
        """Make the fixed sizes half as large; False if there are none, or a step of this shape fills its own."""
        if self.fixed is None or self.fixed[shape.prompt > 0] <= shape.tokens:
            return False
        self.fixed = max(1, self.fixed[0] // 2), max(1, self.fixed[1] // 2)
        return True

    def reset(self) -> None:
        """Make the fixed sizes as large as at first: what did not fit is gone."""
        self.fixed = self._first_fixed

    def _size(self, count: int, prompts: bool) -> int:
        """Return to how many so many tokens are filled up, in a step with or without prompts."""
        return max(count, self.fixed[prompts]) if self.fixed else count + -count % self.multiple
