"""Decide when an engine admits sequences: one by one, or several together. Pure; the forecast uses it too."""

CHUNK = 512
"""Tokens of a chunk of a prompt, counted from the prompt's beginning, so that the batch does not decide what is
computed together."""
REFILL = 1 / 8
"""Share of the sequences that must have ended before others are admitted, on a GPU that replays CUDA graphs of decoding
steps."""
SHARE_FROM = 128
"""Tokens from which on a GPU reads a shared prefix in place: for a shorter one the second call of attention costs more
than reading its copies."""


class Gate:
    """Decides whether waiting sequences may be admitted.

    With `refill` 0 they may at any time. Otherwise an engine whose rows or memory are full admits none until
    that share of its sequences has ended, and is then filled up again: a step with a prompt costs a GPU
    several times a replayed one, and one prompt costs as much as many.
    """

    def __init__(self, refill: float = 0.0) -> None:
        self._refill = refill
        self._opens_at: int | None = None
        """Number of live sequences at which it opens again; None while it is open."""

    def is_open(self, under_way: int) -> bool:
        """Return whether others may be admitted beside `under_way` live sequences; always beside none."""
        if self._opens_at is not None and under_way <= self._opens_at:
            self._opens_at = None
        return self._opens_at is None

    def note_full(self, under_way: int) -> None:
        """Note that the engine is full with `under_way` live sequences."""
        if self._refill and under_way:
            self._opens_at = under_way - max(1, int(self._refill * under_way))
