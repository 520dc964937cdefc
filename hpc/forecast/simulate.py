"""Simulate a run: the engine's admission, and the shards and tail of a plan, with step costs in place of a model. Pure.

Between two events (a request begins or ends) the steps differ only in the tokens that they read, which grow evenly.
They are summed in closed form, so that a request costs a few operations whatever its length.
"""

import heapq
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from hpc.arrays import Ints
from hpc.engine.admission import CHUNK, Gate
from hpc.engine.bounds import Bounds
from hpc.forecast.step_costs import StepCosts
from hpc.plan.shard import Deal, next_piece


@dataclass(frozen=True)
class Workload:
    """Requests as an engine sees them; arrays of shape [requests]."""

    prompts: Ints
    """Tokens of each prompt."""
    prefixes: Ints
    """Tokens at its beginning that it shares, 0 where it shares none."""
    groups: Ints
    """Number of the prefix that it shares; -1 where it shares none."""
    new: Ints
    """Tokens that each of its samples generates."""
    samples: Ints
    """Samples of each request."""


@dataclass
class SimulatedRank:
    """A simulated rank: its clock, its sequences under way, its queue."""

    costs: StepCosts
    engine: Bounds
    work: Workload
    slowness: float = 1.0
    """Factor on all step costs."""
    clock: float = 0.0
    """Seconds since the first rank began."""
    queue: list[int] = field(default_factory=list)
    """Indices of requests, the next one last."""
    _steps: int = 0
    _live: list[tuple[int, int]] = field(default_factory=list)
    """(step in which it ends, tokens that its end gives back), a heap."""
    _prefill: list[list[int]] = field(default_factory=list)
    """[index, prompt tokens stored, those it shares too once all of them are], in the order of admission."""
    _kv: int = 0
    """Tokens that a decoding step reads."""
    _held: int = 0
    """Tokens of the cache that are reserved."""
    _max_live: int = 0
    _stored: dict[int, int] = field(default_factory=dict)
    """Tokens stored of each shared prefix, by its number."""
    _tokens_of: dict[int, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self._gate = Gate(self.engine.refill)

    @property
    def idle(self) -> bool:
        """Whether nothing is under way or to be begun."""
        return not (self._under_way or self.queue)

    @property
    def asks(self) -> bool:
        """Whether it would ask for more: its queue is empty, and a quarter of what was under way is done."""
        return not self.queue and self._under_way <= 3 * self._max_live // 4

    @property
    def _under_way(self) -> int:
        return len(self._live) + len(self._prefill)

    def advance(self) -> None:
        """Go on until something has ended, or begun."""
        self._admit()
        decoding = len(self._live)
        if self._prefill:
            tokens, chosen, pairs = self._chunks()
            steps = 1
        else:
            tokens, chosen, pairs = 0, 0, 0.0
            steps = max(1, self._live[0][0] - self._steps)
        # kv grows by one for each row and step.
        kv = steps * self._kv + decoding * steps * (steps + 1) // 2
        total = tokens + decoding
        seconds = steps * (self._tokens(total) + self.costs.chosen * (chosen + decoding))
        self.clock += self.slowness * (seconds + self.costs.pair * pairs + self.costs.kv * kv)
        self._steps += steps
        self._kv += decoding * steps
        while self._live and self._live[0][0] <= self._steps:
            self._end(heapq.heappop(self._live)[1])
        while self._prefill and self._prefill[0][1] >= self.work.prompts[self._prefill[0][0]]:
            self._begin_decoding(self._prefill.pop(0)[0])

    def _tokens(self, count: int) -> float:
        if count not in self._tokens_of:
            self._tokens_of[count] = self.costs.tokens(count)
        return self._tokens_of[count]

    def _admit(self) -> None:
        """Admit requests that fit, as the engine's scheduler does. A test holds both to the same steps."""
        work, begun = self.work, 0
        if not self._gate.is_open(self._under_way):
            return
        pending = sum(int(work.prompts[index]) - done for index, done in self._prefill)
        while self.queue and pending < self.engine.step_tokens:
            index = self.queue[-1]
            if self._under_way >= self.engine.max_seqs:
                break
            group, cut = int(work.groups[index]), int(work.prefixes[index])
            fresh = cut if group >= 0 and group not in self._stored else 0
            need = int(work.prompts[index]) - cut + int(work.new[index]) + fresh
            if self._held + need > self.engine.cache_tokens and self._under_way:
                if begun:
                    self._gate.note_full(self._under_way)
                break
            self.queue.pop()
            if group >= 0:
                self._stored.setdefault(group, 0)
            self._held += need
            self._prefill.append([index, 0])
            begun += 1
            pending += int(work.prompts[index])
        if self._under_way >= self.engine.max_seqs:
            self._gate.note_full(self._under_way)
        self._max_live = max(self._max_live, self._under_way)

    def _chunks(self) -> tuple[int, int, float]:
        """Compute a step's worth of prompts; return their tokens, how many end in it, and pairs."""
        room, tokens, chosen, pairs = self.engine.step_tokens, 0, 0, 0.0
        for entry in self._prefill:
            index = entry[0]
            prompt, cut, group = (int(v[index]) for v in (self.work.prompts, self.work.prefixes, self.work.groups))
            if entry[1] < cut:
                before = self._stored[group]
                after, cost = _computed(before, cut, 0, room)
                self._stored[group] = after
                tokens, pairs, room = tokens + after - before, pairs + cost, room - (after - before)
                if after < cut:
                    continue
                entry[1] = cut
            after, cost = _computed(entry[1], prompt, cut, room)
            tokens, pairs, room = tokens + after - entry[1], pairs + cost, room - (after - entry[1])
            chosen += after >= prompt > entry[1]
            entry[1] = after
        return tokens, chosen, pairs

    def _begin_decoding(self, index: int) -> None:
        """Let a request, whose first token has just been chosen, decode the rest."""
        prompt, new = int(self.work.prompts[index]), int(self.work.new[index])
        holds = prompt - int(self.work.prefixes[index]) + new
        if new <= 1:
            self._held -= holds
            return
        heapq.heappush(self._live, (self._steps + new - 1, index))
        self._kv += prompt

    def _end(self, index: int) -> None:
        prompt, new = int(self.work.prompts[index]), int(self.work.new[index])
        self._held -= prompt - int(self.work.prefixes[index]) + new
        self._kv -= prompt + new - 1


def _computed(done: int, end: int, begin: int, room: int) -> tuple[int, float]:
    """Compute chunks up to `end` while there is room; return the tokens done and the pairs of attending tokens."""
    pairs = 0.0
    while done < end and room > 0:
        count = min(CHUNK - (done - begin) % CHUNK, end - done)
        pairs += count * (done + count / 2)
        done, room = done + count, room - count
    return done, pairs


def simulate(
    costs: StepCosts,
    engine: Bounds,
    work: Workload,
    plan: Deal,
    dear: npt.NDArray[np.float64],
    slowness: Mapping[int, float] | None = None,
) -> list[float]:
    """Return, for each rank of a plan, the seconds from the beginning until it has nothing more to do.

    `dear`, shape [requests], are the predicted costs of the plan, which decide the pieces of the tail.
    `slowness` maps slow ranks to the factor on their step costs.
    """
    queued: Callable[[Ints], list[int]] = lambda indices: np.repeat(indices, work.samples[indices])[::-1].tolist()  # noqa: E731
    slow = slowness or {}
    ranks = [
        SimulatedRank(costs, engine, work, slow.get(number, 1.0), queue=queued(indices))
        for number, indices in enumerate(plan.shards)
    ]
    tail = plan.tail
    spent = np.cumsum(dear[tail])
    order = [(0.0, number) for number in range(len(ranks))]
    heapq.heapify(order)
    while order:
        _, number = heapq.heappop(order)
        rank = ranks[number]
        if len(tail) and rank.asks:
            count = next_piece(spent, len(ranks), done=len(spent) - len(tail))
            rank.queue = queued(tail[:count])
            tail = tail[count:]
        if rank.idle:
            continue
        rank.advance()
        heapq.heappush(order, (rank.clock, number))
    return [rank.clock for rank in ranks]
