"""The deadline of an attempt: which requests can still end in time. Pure but for the clock that is handed in."""

import statistics
import time
from collections import deque
from collections.abc import Callable

PREFILL_SHARE = 1 / 32
"""Cost of a prompt token in generated tokens: prompts are computed many tokens at once. Only a prior, since the pace of
whole requests is measured."""

_REMEMBERED = 64
"""Requests whose pace counts: the latest, since the load of the node and the lengths of rows change."""
_CAUTION = 1.25
"""A request is admitted if it would end in time though it took a quarter longer than its estimate."""


class Deadline:
    """Admits requests that will end in time at the measured pace; all of them where there is no deadline."""

    def __init__(self, seconds_left: float | None, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._at = None if seconds_left is None else clock() + seconds_left
        self._paces: deque[float] = deque(maxlen=_REMEMBERED)

    @property
    def passed(self) -> bool:
        """Whether the deadline is over."""
        return self._at is not None and self._clock() >= self._at

    def note(self, prompt_tokens: int, new_tokens: int, seconds: float) -> None:
        """Add to the pace a request that took `seconds` from its admission to its end."""
        self._paces.append(seconds / _work(prompt_tokens, new_tokens))

    def admits(self, prompt_tokens: int, new_tokens: int) -> bool:
        """Return whether a request that is begun now will end by the deadline.

        The estimate assumes that it runs to its limit, at the pace that nine in ten of the latest requests kept, and
        adds a quarter. Before two requests have ended there is no pace, and any is admitted.
        """
        if self._at is None:
            return True
        left = self._at - self._clock()
        if len(self._paces) < 2:
            return left > 0
        pace = statistics.quantiles(self._paces, n=10, method="inclusive")[-1]
        return left > _CAUTION * pace * _work(prompt_tokens, new_tokens)


def _work(prompt_tokens: int, new_tokens: int) -> float:
    return max(1, new_tokens) + PREFILL_SHARE * prompt_tokens
