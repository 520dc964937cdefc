"""A loader whose engine takes the time that costs say, and computes nothing: for runs of more ranks than cores.

All else is real: the scheduler's admission, messages, journals, the tail. A prompt's first token is how many tokens
its completion has, which nothing but the engine knows.
"""

import time
from collections.abc import Iterator
from pathlib import Path

from hpc.corpus.limits import PromptLimits
from hpc.corpus.tokenize import Checker
from hpc.engine.bounds import Bounds
from hpc.engine.extents import Extents
from hpc.engine.interface import OnStep, Source, pull
from hpc.engine.native.scheduled_step import Chunk, ScheduledStep
from hpc.engine.native.scheduler import Scheduler
from hpc.engine.sequence import Sequence
from hpc.engine.steps import StepLog
from hpc.forecast.step_costs import StepCosts
from hpc.job import Job
from hpc.model.loader import Replica
from hpc.mpi.binding import Binding
from tests.fakes import ByteTokenizer, EchoLoader, Spelled

COSTS = StepCosts((1, 8, 64, 512), (5e-3, 6e-3, 12e-3, 60e-3), 1e-6, 2e-9, 5e-9)
"""Of a small model on a good device, in seconds."""
BOUNDS = Bounds(64, 512, 1 << 20, 1)
END = 2
VOCABULARY = 1 << 20


class PacedEngine:
    """Steps as the costs say, `slowness` times as long."""

    def __init__(self, slowness: float = 1.0) -> None:
        self._slowness = slowness
        self.steps, self.bounds = StepLog(), None

    def generate(self, source: Source, on_step: OnStep) -> Iterator[list[Sequence]]:
        scheduler = Scheduler(Extents(BOUNDS.cache_tokens), BOUNDS.max_seqs, BOUNDS.step_tokens, share=True)
        due = time.perf_counter()
        while scheduler.rows or (requests := pull(source, 1, on_step)):
            if not scheduler.rows:
                scheduler.waiting.extend(map(Sequence, requests))
                due = time.perf_counter()
            scheduler.admit(source)
            plan = scheduler.next()
            due += self._slowness * COSTS.step(*shape_of(plan))
            time.sleep(max(0.0, due - time.perf_counter()))
            if ended := list(end(scheduler, plan)):
                yield ended
            if on_step():
                return


def shape_of(plan: ScheduledStep) -> tuple[int, int, float, int]:
    """Return tokens, chosen, pairs and kv of a step."""
    tokens, chosen, pairs, kv = 0, 0, 0.0, 0
    for chunk in chunks_of(plan):
        tokens += chunk.count
        chosen += chunk.chooses
        if chunk.position < len(chunk.row.tokens):
            pairs += chunk.count * (chunk.position + chunk.count / 2)
        else:
            kv += chunk.position + 1
    return tokens, chosen, pairs, kv


def chunks_of(plan: ScheduledStep) -> list[Chunk]:
    """Return all that a step computes."""
    decoding = zip(plan.rows, plan.positions, strict=True)
    return [Chunk(row, position, 1, True) for row, position in decoding] + plan.prompts


def end(scheduler: Scheduler, plan: ScheduledStep) -> Iterator[Sequence]:
    """Give each sequence of a step its token, and yield those that have all of theirs."""
    for chunk in chunks_of(plan):
        sequence = chunk.row.sequence
        if not chunk.chooses or sequence is None:
            continue
        all_of_them = min(int(sequence.request.token_ids[0]), sequence.request.sampling.max_new_tokens)
        over = len(sequence.token_ids) + 1 >= all_of_them
        sequence.token_ids.append(END if over else 100)
        if over:
            scheduler.finish(chunk.row)
            yield sequence


class PacedLoader(EchoLoader):
    """Loads a paced engine."""

    def __init__(self, slowness: float = 1.0) -> None:
        super().__init__(model="paced")
        self._slowness = slowness

    def checker(self, job: Job, path: Path) -> Checker:
        return Checker(job.sampling, PromptLimits(VOCABULARY, None), ByteTokenizer())

    def load(self, job: Job, path: Path, place: Binding) -> Replica:
        return Replica(PacedEngine(self._slowness), (END,), Spelled(lambda _: b"x"))
