"""What the scheduler hands on: the sequences that live in the cache, and what one step computes of them. Host code."""

from dataclasses import dataclass, field

from hpc.arrays import Tokens
from hpc.engine.sequence import Sequence


@dataclass(slots=True, eq=False)
class LiveSequence:
    """A sequence, or a shared prefix, that has a place in the cache."""

    tokens: Tokens
    """The prompt."""
    start: int
    """Its extent in the cache, which holds the positions from `cut` on."""
    capacity: int
    """Tokens that the extent holds; 0 when it has lost its place."""
    slot: int = -1
    sequence: Sequence | None = None
    prefix: "LiveSequence | None" = None
    cut: int = 0
    copies: bool = False
    """It has what it shares in its own extent too."""
    done: int = 0
    """Positions that are stored, or will be by the steps under way."""
    stored: int = 0
    """Of a prefix, the positions that were stored when the step under way began."""
    num_scheduled: int = 0
    """Tokens that have been chosen, or will be by the steps under way; 0 while it has prompt tokens left."""
    limit: int = 0
    """Most tokens that it generates."""
    users: int = 0
    """Rows that read this prefix."""
    endings: frozenset[int] = frozenset()
    """Tokens at which it ends."""
    stop: tuple[str, ...] = ()
    """Texts at which it ends."""

    @property
    def shared(self) -> int:
        """Of its first tokens, how many it reads in the extent of its prefix."""
        return 0 if self.copies else self.cut

    @property
    def live(self) -> bool:
        """Whether it still has its place."""
        return self.capacity > 0


@dataclass(slots=True)
class Chunk:
    """Neighbouring tokens of a row that a step computes."""

    row: LiveSequence
    position: int
    count: int
    chooses: bool
    """Whether the next token is chosen after its last one."""


@dataclass
class ScheduledStep:
    """A step: copies in the cache (source, target, tokens) first, then all else at once."""

    rows: list[LiveSequence] = field(default_factory=list)
    """They decode: the newest token of each is computed, and the next one chosen."""
    positions: list[int] = field(default_factory=list)
    """Of these tokens."""
    prompts: list[Chunk] = field(default_factory=list)
    copies: list[tuple[int, int, int]] = field(default_factory=list)
