"""Steps whose tokens the host has not read yet, with the time that a GPU took for each by its own events."""

from collections.abc import Sequence
from typing import NamedTuple

import torch

from hpc.engine.native.scheduled_step import LiveSequence
from hpc.engine.sampling.choice import SamplerOutput
from hpc.engine.steps import StepShape


class Unread(NamedTuple):
    """The sampled tokens of a step, until the host reads them."""

    rows: list[LiveSequence]
    choice: SamplerOutput | None
    """None if the step chose no token."""
    drafts: list[list[int]]
    """Draft tokens of each row; empty if there are none."""
    verified: list[list[int]]
    """The model's own token behind each draft token, -1 where the logits are not finite."""
    timed: "Timed | None" = None
    """Only on a GPU."""


class Timed(NamedTuple):
    """The time of a step on a GPU: from the end of the step before, or from its own beginning, to its end."""

    shape: StepShape
    began: torch.cuda.Event
    ended: torch.cuda.Event


def began_after(unread: Sequence[Unread]) -> torch.cuda.Event:
    """Return the event at which the time of the next step begins: the end of the step under way, if there is one."""
    before = unread[-1].timed if unread else None
    return before.ended if before is not None else _recorded()


def end_of(shape: StepShape, began: torch.cuda.Event) -> Timed:
    """Record an event behind all work that the device has been given; a step ends there."""
    return Timed(shape, began, _recorded())


def _recorded() -> torch.cuda.Event:
    event: torch.cuda.Event = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
    event.record()
    return event
