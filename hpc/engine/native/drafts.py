"""Draft what a greedy row says next from what it has said before, so that one step computes several of its tokens.

Draft tokens are a copy of what followed the last few tokens when they stood together before (prompt lookup decoding,
Saxena 2023). The model computes all draft tokens of a step; those that it does not choose itself are dropped, so the
output is the same with and without.
"""

from collections.abc import Callable

import torch

from hpc.engine.native.scheduled_step import LiveSequence, ScheduledStep
from hpc.engine.sampling.constraint import is_free_from
from hpc.engine.sampling.draw import most_probable
from hpc.engine.sequence import Sequence

NGRAM = 3
"""Tokens that must have stood together before; of the drafts on W1 (tests/bench) 83 % are right then, 65 % with 2."""
MAX_DRAFT = 4
"""Draft tokens of a row in a step."""
ROWS = 12
"""Rows of a step, draft tokens too, up to which reading the weights takes longer than computing with them."""
MIN_ACCEPTED = 0.4
"""Share of the latest draft tokens that must have been right, or there are none for a while."""
LATEST = 32
"""Draft tokens over which that share is averaged, the older ones counting less."""
PAUSE = 32
"""Steps without draft tokens, after which they are tried again."""


class NgramDrafts:
    """The draft tokens of an engine's rows, while they are right often enough."""

    def __init__(self) -> None:
        self._accepted = 1.0
        self._pause = 0
        self._histories: dict[int, _History] = {}

    def propose(self, plan: ScheduledStep, lookahead: Callable[[LiveSequence], int]) -> list[list[int]]:
        """Return draft tokens for each row of a step that only decodes; an empty list if there are none.

        `lookahead` says how many a row has room for.
        """
        if plan.prompts or len(plan.rows) >= ROWS:
            return []
        drafts = self.draft(plan.rows, [lookahead(row) for row in plan.rows])
        return drafts if any(drafts) else []

    def draft(self, rows: list[LiveSequence], lookahead: list[int]) -> list[list[int]]:
        """Return draft tokens for each row, at most its `lookahead` and `ROWS` together with the rows."""
        drafts: list[list[int]] = [[] for _ in rows]
        self._histories = {row.slot: self._of(row) for row in rows}
        if self._pause:
            self._pause -= 1
            return drafts
        left = ROWS - len(rows)
        # The last row to end decides how many steps there are: it comes first.
        for index in sorted(range(len(rows)), key=lambda index: rows[index].num_scheduled - rows[index].limit):
            row = rows[index]
            if left > 0 and row.sequence is not None and _may_be_drafted(row.sequence):
                count = min(MAX_DRAFT, left, lookahead[index])
                drafts[index] = self._histories[row.slot].draft(row.sequence.token_ids, count)
                left -= len(drafts[index])
        return drafts

    def note(self, sequence: Sequence, drafted: int, accepted: int) -> None:
        """Count how many draft tokens a sequence had in a step, and how many of them were right."""
        self.learn(drafted, accepted)
        sequence.guessed += drafted
        sequence.accepted += accepted

    def learn(self, drafted: int, accepted: int) -> None:
        """Update the share of draft tokens that are right, and pause where it is too small."""
        for right in [True] * accepted + [False] * (drafted - accepted):
            self._accepted += (right - self._accepted) / LATEST
        if self._accepted < MIN_ACCEPTED:  # after the pause there is a fair chance for more of them
            self._pause, self._accepted = PAUSE, (1 + MIN_ACCEPTED) / 2

    def _of(self, row: LiveSequence) -> "_History":
        known = self._histories.get(row.slot)
        return known if known is not None and known.row is row else _History(row)


def verified(logits: torch.Tensor, drafts: list[list[int]]) -> list[list[int]]:
    """Return the most probable token behind each draft token, -1 where the logits [tokens, vocabulary] are not finite.

    The logits stand in the order of the rows.
    """
    best, found = most_probable(logits)
    tokens = iter(torch.where(best.isfinite(), found, -1).tolist())
    return [[next(tokens) for _ in draft] for draft in drafts]


def accepted(first: int, draft: list[int], behind: list[int]) -> list[int]:
    """Return the tokens that are known to follow the token `first`: the model's own behind each right draft token.

    `behind` are the model's tokens behind each of the draft, as `verified` returns them.
    """
    found: list[int] = []
    for token, then in zip(draft, behind, strict=True):
        if token != (found or [first])[-1] or then < 0:
            break
        found.append(then)
    return found


def _may_be_drafted(sequence: Sequence) -> bool:
    """Whether a row's next tokens are the most probable ones, whatever they are: no draft token needs the sampler."""
    sampling = sequence.request.sampling
    plain = sampling.greedy and not sampling.penalised and sampling.logprobs is None
    return plain and is_free_from(sampling, len(sequence.token_ids))


class _History:
    """A row's tokens, and where each n-gram of them ended last."""

    def __init__(self, row: LiveSequence) -> None:
        self.row = row
        self._tokens: list[int] = row.tokens.tolist()
        self._prompt_len = len(row.sequence.request.token_ids) if row.sequence is not None else 0
        self._ends: dict[tuple[int, ...], int] = {}
        self._known = NGRAM
        """N-grams that end before this are in `_ends`."""

    def draft(self, generated: list[int], count: int) -> list[int]:
        """Return what followed the last tokens when they stood together before; nothing if they never did."""
        tokens = self._tokens
        tokens += generated[len(tokens) - self._prompt_len :]
        for end in range(self._known, len(tokens)):
            self._ends[tuple(tokens[end - NGRAM : end])] = end
        self._known = max(self._known, len(tokens))
        begin = self._ends.get(tuple(tokens[-NGRAM:]))
        if begin is None:
            return []
        period = len(tokens) - begin
        return [tokens[begin + index % period] for index in range(count)]
