"""Make a timeline without gaps of the spans that a rank wrote."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise

from hpc.rundir.events import FOLLOW


@dataclass(frozen=True)
class Span:
    """An activity of a rank; times in seconds of the clock."""

    kind: str
    began: float
    ended: float


def chain(begun: Iterable[tuple[str, float]], began: float, ended: float, before: str) -> list[Span]:
    """Return spans that cover `began` to `ended`. Each of `begun`, kind and time, lasts until the next one.

    The time before the first is of the kind `before`. A time earlier than its predecessor's, from a clock
    that was set, counts as the predecessor's.
    """
    kinds, times = [before], [began]
    for kind, time in begun:
        kinds.append(kind)
        times.append(min(max(time, times[-1]), ended))
    found: list[Span] = []
    for kind, (since, until) in zip(kinds, pairwise([*times, ended]), strict=True):
        if until > since:
            same = found and found[-1].kind == kind
            found.append(Span(kind, found.pop().began if same else since, until))
    return found


def followed(spans: Iterable[Span], leading: Sequence[Span]) -> list[Span]:
    """Replace each span "follow" of a rank by the spans of rank 0 in that time.

    A rank that follows while rank 0 loads or generates is idle.
    """
    found: list[Span] = []
    for span in spans:
        if span.kind != FOLLOW:
            found.append(span)
            continue
        for other in leading:
            began, ended = max(span.began, other.began), min(span.ended, other.ended)
            if began < ended:
                kind = "idle" if other.kind in ("load", "build", "generate", "wait") else other.kind
                found.append(Span(kind, began, ended))
    return chain(((span.kind, span.began) for span in found), found[0].began, found[-1].ended, "other") if found else []
