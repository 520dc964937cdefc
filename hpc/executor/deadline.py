"""Whether a request can still end in time. Pure but for the clock that is handed in."""

import statistics
import time
from collections import deque
from collections.abc import Callable

PREFILL_SHARE = 1 / 32
"""What a prompt token costs beside a generated one: many are computed at once. A rough prior; the pace is measured."""

_REMEMBERED = 64
_CAUTION = 1.25


class Deadline:
    """Admits the requests that the pace measured so far lets end in time; all of them while there is no deadline."""

    def __init__(self, seconds_left: float | None, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._at = None if seconds_left is None else clock() + seconds_left
        self._paces: deque[float] = deque(maxlen=_REMEMBERED)

    @property
    def passed(self) -> bool:
        """Whether nothing can be begun any more."""
        return self._at is not None and self._clock() >= self._at

    def note(self, prompt_tokens: int, new_tokens: int, seconds: float) -> None:
        """Learn that a request took so many seconds from its admission to its end."""
        self._paces.append(seconds / _work(prompt_tokens, new_tokens))

    def admits(self, prompt_tokens: int, new_tokens: int) -> bool:
        """Say whether a request that is begun now will have ended by the deadline.

        It is taken to run to its limit, at the pace that nine in ten of the latest requests kept, and a
        quarter longer. Before one has ended there is no pace, and it is tried.
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
