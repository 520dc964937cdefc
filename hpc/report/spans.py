"""What each rank did when: spans of time read from its events."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Span:
    """What a rank did for a while; times in seconds of the clock."""

    kind: str
    began: float
    ended: float


class Spans:
    """Spans that follow one another."""

    def __init__(self, began: float) -> None:
        self.done: list[Span] = []
        self._now = began

    def add(self, kind: str, until: float) -> None:
        """Go on with a kind until a moment; nothing if that is over."""
        if until > self._now:
            same = self.done and self.done[-1].kind == kind
            began = self.done.pop().began if same else self._now
            self.done.append(Span(kind, began, until))
            self._now = until
