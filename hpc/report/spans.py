"""Put together what each rank did when, from the spans that the ranks wrote."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise

from hpc.rundir.events import FOLLOW


@dataclass(frozen=True)
class Span:
    """What a rank did for a while; times in seconds of the clock."""

    kind: str
    began: float
    ended: float


def chain(begun: Iterable[tuple[str, float]], began: float, ended: float, before: str) -> list[Span]:
    """Return spans without a gap from `began` to `ended`: each of `begun`, a kind and a time, until the next one.

    What was before the first of them is of the kind `before`. A time before that of its predecessor, by a
    clock that was set, counts as the predecessor's.
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
    """Return the spans of a rank with rank 0's in the place of those in which it follows.

    While rank 0 loads or generates, who follows is idle.
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
