"""Pack a scheduled step into the arrays of one forward pass. Host code only, and little of it for each row."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from hpc.arrays import Ints
from hpc.engine.layers.attention import Span, Spans
from hpc.engine.native.scheduled_step import LiveSequence, ScheduledStep
from hpc.engine.steps import StepShape


class InputBatch(NamedTuple):
    """A packed step: the rows that decode, then chunks of prompts, then tokens that only fill it up."""

    spans: Spans
    token_ids: Ints
    """[tokens]; 0 for tokens that the host does not know yet."""
    positions: Ints
    """[tokens]"""
    kept: Ints
    """Tokens whose logits are wanted: of each row that chooses its last but drafts, then all drafts, then any."""
    choosing: list[LiveSequence]
    """The rows whose next token is chosen."""
    shape: StepShape
    is_long: npt.NDArray[np.bool_] | None = None
    """[tokens]: see `AttentionMetadata`."""


@dataclass
class InputBatchBuilder:
    """Packs the steps of a run."""

    share: bool
    """Whether a shared prefix is read in place."""
    known: bool
    """Whether the host knows the newest token of a row that decodes."""
    multiple: int
    """The number of tokens, and of those whose logits are wanted, is filled up to a multiple of it."""
    fixed: tuple[int, int] | None = None
    """Instead of `multiple`: the fixed number of tokens of steps that only decode, and of all others."""
    _latest: InputBatch | None = field(default=None, init=False)
    """The latest step, if it only decoded."""

    def __post_init__(self) -> None:
        self._first_fixed = self.fixed

    def pack(self, plan: ScheduledStep, drafts: Sequence[Sequence[int]] = ()) -> InputBatch:
        """Pack a step that is not empty. `drafts` follow the newest token of each row that decodes."""
        decodes_only, latest = not plan.prompts and not drafts, self._latest
        if latest is not None and decodes_only and plan.rows == latest.choosing and not plan.copies:
            return self._again(latest, plan)
        packed = self._lay_out(plan, drafts)
        self._latest = packed if decodes_only else None
        return packed

    def _again(self, latest: InputBatch, plan: ScheduledStep) -> InputBatch:
        """Pack a step that differs from the latest only in tokens and positions, as nearly all steps do."""
        n, spans = len(plan.rows), latest.spans.copy()
        token_ids, positions = np.zeros((2, len(latest.token_ids)), dtype=np.int64)
        spans[:, 2] = positions[:n] = plan.positions
        if self.known:
            token_ids[:n] = [row.sequence.token_ids[-1] for row in plan.rows]  # type: ignore[union-attr]
        shape = StepShape(n, 0, n, 0.0, sum(plan.positions) + n)
        return InputBatch(spans, token_ids, positions, latest.kept, plan.rows, shape, latest.is_long)

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
        is_long = None
        if any(row.is_long for row in rows):
            is_long = np.zeros(len(token_ids), dtype=np.bool_)
            is_long[:length] = np.repeat([row.is_long for row in rows], tokens)
        return InputBatch(spans, token_ids, positions, kept, choosing, shape, is_long)

    def shrink(self, shape: StepShape) -> bool:
        """Halve the fixed sizes; return False if there are none, or if a step of this shape needs all of its size."""
        if self.fixed is None or self.fixed[shape.prompt > 0] <= shape.tokens:
            return False
        self.fixed = max(1, self.fixed[0] // 2), max(1, self.fixed[1] // 2)
        return True

    def reset(self) -> None:
        """Make the fixed sizes as large as at first: the request that did not fit is gone."""
        self.fixed = self._first_fixed

    def _size(self, count: int, prompts: bool) -> int:
        """Return the number of tokens to which `count` is filled up, in a step with or without prompts."""
        return max(count, self.fixed[prompts]) if self.fixed else count + -count % self.multiple
