"""The scheduler's output: the sequences that live in the cache, and what one step computes of them. Host code."""

from dataclasses import dataclass, field

from hpc.arrays import Tokens
from hpc.engine.sequence import Sequence


@dataclass(slots=True, eq=False)
class LiveSequence:
    """A sequence, or a shared prefix, with a place in the cache."""

    tokens: Tokens
    """The prompt; of a row that is computed anew also what it has generated."""
    start: int
    """Its extent in the cache, which holds the positions from `cut` on."""
    capacity: int
    """Tokens that the extent holds; 0 when it has lost its place."""
    slot: int = -1
    sequence: Sequence | None = None
    prefix: "LiveSequence | None" = None
    cut: int = 0
    copies: bool = False
    """Whether it has a copy of its prefix in its own extent."""
    done: int = 0
    """Positions that are stored, or will be by scheduled steps."""
    stored: int = 0
    """Of a prefix, the positions that were stored when the current step was scheduled."""
    num_scheduled: int = 0
    """Tokens that have been chosen, or will be by scheduled steps; 0 while it has prompt tokens left."""
    is_long: bool = False
    """It has grown, or begun, beyond `EngineLimits.long_from` tokens."""
    limit: int = 0
    """Maximum number of tokens that it generates."""
    users: int = 0
    """Number of rows that read this prefix."""
    endings: frozenset[int] = frozenset()
    """Token ids that end it."""
    stop: tuple[str, ...] = ()
    """Stop strings."""

    @property
    def shared(self) -> int:
        """Number of its first tokens that it reads in the extent of its prefix."""
        return 0 if self.copies else self.cut

    @property
    def live(self) -> bool:
        """Whether it still has its place."""
        return self.capacity > 0


@dataclass(slots=True)
class Chunk:
    """Neighbouring tokens of a row's prompt that a step computes."""

    row: LiveSequence
    position: int
    count: int
    chooses: bool
    """Whether the step chooses the token behind its last one."""


@dataclass
class ScheduledStep:
    """A step: first the copies in the cache (source, target, tokens), then one forward pass."""

    rows: list[LiveSequence] = field(default_factory=list)
    """Rows that decode: the newest token of each is computed, and the next one chosen."""
    positions: list[int] = field(default_factory=list)
    """The positions of these tokens."""
    prompts: list[Chunk] = field(default_factory=list)
    copies: list[tuple[int, int, int]] = field(default_factory=list)
