"""Guess what a greedy row says next from what it has said before, so that one step computes several of its tokens.

A guess is a copy of what followed the last few tokens when they stood together before (prompt lookup
decoding, Saxena 2023). The model computes all guesses of a step; those that it does not choose itself
are dropped, so the output is the same with and without.
"""

from hpc.engine.native.scheduler import LiveSequence
from hpc.engine.sampling.constraint import is_free_from
from hpc.engine.sequence import Sequence

NGRAM = 3
"""Tokens that must have stood together before; of the guesses on W1 (tests/bench) 83 % are right then, 65 % with 2."""
MAX_DRAFT = 4
"""Guesses of a row in a step."""
ROWS = 12
"""Rows of a step, guesses too, up to which reading the weights takes longer than computing with them."""
MIN_ACCEPTED = 0.4
"""Share of the latest guesses that must have been right, or there are none for a while."""
PAUSE = 32
"""Steps without guesses, after which they are tried again."""


class NgramDrafts:
    """The guesses of an engine's rows, while they are right often enough."""

    def __init__(self) -> None:
        self._accepted = 1.0
        self._pause = 0
        self._histories: dict[int, _History] = {}

    def guess(self, rows: list[LiveSequence], room: list[int]) -> list[list[int]]:
        """Return for each row of a step its guesses, at most `room` of it; the longest of all first."""
        guesses: list[list[int]] = [[] for _ in rows]
        self._histories = {row.slot: self._of(row) for row in rows}
        if self._pause:
            self._pause -= 1
            return guesses
        spare = ROWS - len(rows)
        # The last row to end decides how many steps there are.
        for index in sorted(range(len(rows)), key=lambda index: rows[index].launched - rows[index].limit):
            row = rows[index]
            if spare > 0 and row.sequence is not None and _can_be_guessed(row.sequence):
                most = min(MAX_DRAFT, spare, room[index])
                guesses[index] = self._histories[row.slot].guess(row.sequence.token_ids, most)
                spare -= len(guesses[index])
        return guesses

    def learn(self, guessed: int, accepted: int) -> None:
        """Take note of how many guesses of a row were right."""
        for right in [True] * accepted + [False] * (guessed - accepted):
            self._accepted += (right - self._accepted) / 32
        if self._accepted < MIN_ACCEPTED:
            self._pause, self._accepted = PAUSE, (1 + MIN_ACCEPTED) / 2

    def _of(self, row: LiveSequence) -> "_History":
        known = self._histories.get(row.slot)
        return known if known is not None and known.row is row else _History(row)


def accepted(first: int, guesses: list[int], verified: list[int]) -> list[int]:
    """Return what is known behind the token `first`: what the model chose behind each guess that was right.

    `verified` are the tokens it chose, below 0 where its logits are not finite.
    """
    found: list[int] = []
    for guess, then in zip(guesses, verified, strict=True):
        if guess != (found or [first])[-1] or then < 0:
            break
        found.append(then)
    return found


def _can_be_guessed(sequence: Sequence) -> bool:
    sampling = sequence.request.sampling
    plain = sampling.greedy and not sampling.penalised and sampling.logprobs is None
    return plain and is_free_from(sampling, len(sequence.token_ids))


class _History:
    """A row's tokens, and where each n-gram of them ended last."""

    def __init__(self, row: LiveSequence) -> None:
        self.row = row
        self._tokens: list[int] = row.tokens.tolist()
        self._ends: dict[tuple[int, ...], int] = {}
        self._known = NGRAM
        """N-grams that end before this are in `_ends`."""

    def guess(self, generated: list[int], most: int) -> list[int]:
        """Return what followed the last tokens when they stood together before; nothing if they never did."""
        tokens = self._tokens
        tokens += generated[len(tokens) - len(self.row.tokens) :]
        for end in range(self._known, len(tokens)):
            self._ends[tuple(tokens[end - NGRAM : end])] = end
        self._known = max(self._known, len(tokens))
        begin = self._ends.get(tuple(tokens[-NGRAM:]))
        if begin is None:
            return []
        period = len(tokens) - begin
        return [tokens[begin + index % period] for index in range(most)]
