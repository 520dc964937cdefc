"""The order of the runs, most important first, so that a run which its time limit cuts has paired results for the rest.

Pure. A round is a group: every engine once, on the same workloads, one after the other; every other round backwards, so
that a machine that slows down or speeds up favours no engine. A group is begun only if it will probably be finished.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from tests.bench.engines import Variant

FLOAT, HALF = "float32", "bfloat16"
PROBE = "W1p"
MOST_ROUNDS_OF_LONG = 2
"""Of W3 and W4, which are no goals to be ahead by a margin."""

ROUNDS_OF_RANKS = 2
"""Rounds of the short workloads that come first, with the engine in several processes; the others are without."""


@dataclass(frozen=True)
class Cell:
    """One start of an engine: it loads once, and runs its workloads one after the other."""

    variant: Variant
    dtype: str
    workloads: tuple[str, ...]
    round: int

    @property
    def kind(self) -> tuple[str, str, tuple[str, ...]]:
        """What cells that take the same time have in common."""
        return self.variant.label, self.dtype, self.workloads


@dataclass(frozen=True)
class Group:
    """Cells that are compared with one another."""

    cells: tuple[Cell, ...]

    def seconds(self, seen: Mapping[tuple[str, str, tuple[str, ...]], float]) -> float:
        """Predict how long it takes from how long cells of the same kind took; 0 for what was never seen."""
        return sum(seen.get(cell.kind, 0.0) for cell in self.cells)


def schedule(
    variants: Sequence[Variant], workloads: Sequence[str], dtypes: Sequence[str], rounds: int, has_half: bool
) -> list[Group]:
    """Return the groups in the order in which they are to be run.

    `has_half` tells whether this machine computes bfloat16 in hardware. Where it does, bfloat16 is what is compared,
    and float32 on W1 alone; where it does not, float32 is, and of bfloat16 a few requests are timed first.
    """
    fast = [variant for variant in variants if variant.engine.fast]
    slow = [variant for variant in variants if not variant.engine.fast]
    one_process = [variant for variant in fast if not variant.engine.ranks]
    main = HALF if HALF in dtypes and (has_half or FLOAT not in dtypes) else FLOAT
    short = tuple(name for name in ("W1", "W2") if name in workloads)
    groups: list[Group] = []

    def add(chosen: Sequence[Variant], dtype: str, names: Sequence[str], number: int) -> None:
        names = tuple(names)
        if chosen and names and dtype in dtypes:
            order = chosen if number % 2 else chosen[::-1]
            groups.append(Group(tuple(Cell(variant, dtype, names, number) for variant in order)))

    def add_slow() -> None:
        if "W1" in workloads and slow:
            ours = [variant for variant in fast if variant.label == "native"]
            done = {"generate"} if main == FLOAT else set()  # with the reference
            add([*ours, *(v for v in slow if v.engine.name not in done)], main, ("W1q",), 1)

    early = min(ROUNDS_OF_RANKS, rounds)
    for number in range(1, early + 1):
        add(fast, main, short, number)
    for variant in slow:
        if variant.engine.name == "generate":  # the reference for the tokens
            add([variant], FLOAT, [f"{name}q" for name in workloads], 1)
    add_slow()
    for name in ("W4", "W3"):
        add(one_process, main, [name] if name in workloads else [], 1)
    if main == HALF and "W1" in workloads:
        add(fast, FLOAT, ["W1"], 1)
    for number in range(early + 1, rounds + 1):
        add(one_process, main, short, number)
    if main == FLOAT and "W1" in workloads and not has_half:
        add(one_process, HALF, [PROBE], 1)
        add(one_process, HALF, ["W1"], 1)
    for number in range(2, min(MOST_ROUNDS_OF_LONG, rounds) + 1):
        for name in ("W4", "W3"):
            add(one_process, main, [name] if name in workloads else [], number)
        if main == HALF and "W1" in workloads:
            add(fast, FLOAT, ["W1"], number)
    return groups
