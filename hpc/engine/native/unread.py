"""Steps whose tokens the host has not read yet, and how long a GPU took for each, by its own events."""

from collections.abc import Sequence
from typing import NamedTuple

import torch

from hpc.engine.native.scheduled_step import LiveSequence
from hpc.engine.sampling.choice import SamplerOutput
from hpc.engine.steps import StepShape


class Unread(NamedTuple):
    """What a step has chosen, until the host reads it."""

    rows: list[LiveSequence]
    choice: SamplerOutput | None
    """None where no row chooses."""
    drafts: list[list[int]]
    """Draft tokens of each row; empty if there are none."""
    verified: list[list[int]]
    """The most probable token behind each of these, -1 where the logits are not finite."""
    timed: "Timed | None" = None
    """Of a GPU."""


class Timed(NamedTuple):
    """A step of a GPU: from the end of the step before, or its own beginning, to its end."""

    shape: StepShape
    began: torch.cuda.Event
    ended: torch.cuda.Event


def began_after(unread: Sequence[Unread]) -> torch.cuda.Event:
    """Return where the time of the next step begins: while another is under way, at that one's end."""
    before = unread[-1].timed if unread else None
    return before.ended if before is not None else _recorded()


def end_of(shape: StepShape, began: torch.cuda.Event) -> Timed:
    """Note that a step ends where the device is when it has done all that it was given."""
    return Timed(shape, began, _recorded())


def _recorded() -> torch.cuda.Event:
    event: torch.cuda.Event = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
    event.record()
    return event
