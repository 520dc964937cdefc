"""When an engine admits sequences: at once, or several together. Pure: the scheduler and the forecast share it."""

CHUNK = 512
"""Prompts are cut here, counted from their own beginning: so what is computed together is fixed."""
REFILL = 1 / 8
"""Share of the sequences that must have ended, where a GPU replays steps that only decode."""
SHARE_FROM = 128
"""Tokens of a prefix from which on a GPU reads it where it lies: a second call costs more than a short one twice."""


class Gate:
    """Whether sequences that wait may begin.

    With `refill` 0 they may at any time. Otherwise an engine that is full, of rows or of memory, is left
    alone until that share of its sequences has ended, and is then filled up again: a step with a prompt
    costs a GPU several times what a replayed one does, and one prompt makes it as dear as many.
    """

    def __init__(self, refill: float = 0.0) -> None:
        self._refill = refill
        self._opens_at: int | None = None
        """Sequences under way; None while it is open."""

    def is_open(self, under_way: int) -> bool:
        """Return whether others may begin beside so many; always beside none."""
        if self._opens_at is not None and under_way <= self._opens_at:
            self._opens_at = None
        return self._opens_at is None

    def note_full(self, under_way: int) -> None:
        """Note that there is no room beside so many."""
        if self._refill and under_way:
            self._opens_at = under_way - max(1, int(self._refill * under_way))
