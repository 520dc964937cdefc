"""The scheduler, driven by an engine of host code alone: a memory of words, and sequences that end when they are told.

The engine keeps for every token of the cache what a real one would have stored there, and looks at
all that a token attends to when it is computed.
"""

import random
import zlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from hpc.engine.admission import CHUNK, REFILL
from hpc.engine.extents import ALIGN, Extents, aligned
from hpc.engine.native.scheduled_step import LiveSequence, ScheduledStep
from hpc.engine.native.scheduler import ESTIMATE_FROM, Scheduler
from hpc.engine.sequence import Sequence as Growing
from hpc.request import Request
from hpc.sampling_params import SamplingParams
from tests.bench.paced import chunks_of, end
from tests.engine.oracle import request
from tests.fakes import ListSource

MOST_STEPS = 30_000


@dataclass
class Simulated:
    """An engine whose sequences end after a number of tokens that is theirs."""

    requests: list[Request]
    lengths: dict[Any, int] = field(default_factory=dict)
    """Tokens after which a request's samples end, by id; at max_new_tokens if it is not here."""
    cache_tokens: int = 4096
    max_seqs: int = 4
    step_tokens: int = 64
    share: bool = True
    mixed: bool = True
    refill: float = 0.0
    share_from: int = 0

    def __post_init__(self) -> None:
        self.source = ListSource(self.requests)
        self.scheduler = Scheduler(
            Extents(self.cache_tokens), self.max_seqs, self.step_tokens, self.share, self.mixed, self.refill,
            self.share_from,
        )  # fmt: skip
        self.memory: list[Any] = [None] * self.cache_tokens
        self.admitted: list[Any] = []
        self.ended: list[Growing] = []
        self.failed: list[Growing] = []
        self.plans: list[ScheduledStep] = []
        self.most_rows = 0

    def run(self, before_step: Any = lambda simulated: None) -> "Simulated":
        """Make steps until all has ended."""
        while self.scheduler.rows or self.scheduler.waiting or not self.source.exhausted:
            before_step(self)
            self.step()
            assert len(self.plans) < MOST_STEPS, "it goes on for ever"
        return self

    def step(self) -> None:
        """Make one step; fail if a token attends to what is not its own sequence's."""
        scheduler = self.scheduler
        self.admitted += [_name(row) for row in scheduler.admit(self.source)]
        self.failed += scheduler.failed
        scheduler.failed = []
        self.most_rows = max(self.most_rows, len(scheduler.rows))
        plan = scheduler.next()
        self.plans.append(plan)
        for source, target, count in plan.copies:
            self.memory[target : target + count] = self.memory[source : source + count]
        for chunk in chunks_of(plan):
            for position in range(chunk.position, chunk.position + chunk.count):
                at = self._place(chunk.row, position)
                assert chunk.row.start <= at < chunk.row.start + chunk.row.capacity
                self.memory[at] = _content(chunk.row, position)
        for chunk in chunks_of(plan):
            for position in range(chunk.position + chunk.count):
                assert self.memory[self._place(chunk.row, position)] == _content(chunk.row, position)
        for chunk in chunks_of(plan):
            if chunk.chooses:
                self._choose(chunk.row)

    def _place(self, row: LiveSequence, position: int) -> int:
        assert row.prefix is None or row.copies == (not self.share or row.cut < self.share_from)
        if row.prefix is None or row.copies:
            return row.start + position
        return row.start + position - row.cut if position >= row.cut else row.prefix.start + position

    def _choose(self, row: LiveSequence) -> None:
        assert row.sequence is not None
        row.sequence.token_ids.append(0)
        request = row.sequence.request
        if len(row.sequence.token_ids) >= self.lengths.get(request.id, request.sampling.max_new_tokens):
            self.ended.append(row.sequence)
            self.scheduler.finish(row)

    @property
    def computed(self) -> int:
        """Tokens that all steps have computed."""
        return sum(chunk.count for plan in self.plans for chunk in chunks_of(plan))

    @property
    def prefix_tokens(self) -> int:
        """Those of them that were of shared prefixes."""
        return sum(chunk.count for plan in self.plans for chunk in chunks_of(plan) if chunk.row.sequence is None)


def _name(row: LiveSequence) -> Any:
    assert row.sequence is not None
    return row.sequence.request.id, row.sequence.sample


def _content(row: LiveSequence, position: int) -> Any:
    """Return what is stored for a position: it depends on the tokens up to it."""
    if position < len(row.tokens):
        return row.tokens[: position + 1].tobytes()
    return *_name(row), position


def one(identity: Any, length: int, new: int = 1, cut: int = 0, family: int = 0, samples: int = 1) -> Request:
    """Make a request whose first `cut` tokens are its family's."""
    prompt = [family] * cut + [1000 + zlib.crc32(str(identity).encode()) % 1000] * (length - cut)
    sampling = SamplingParams(max_new_tokens=new, temperature=1.0, n=samples)
    made = request(prompt, identity, sampling)
    return Request(made.row, made.id, made.token_ids, made.sampling, made.key, made.bucket, cut)


@st.composite
def simulations(draw: st.DrawFn) -> Simulated:
    """Engines of all sizes with requests of all kinds; some sequences end early."""
    requests, lengths = [], {}
    if draw(st.booleans()):  # what ends at once lets the scheduler think that the others do
        requests += [one(f"short {row}", 1) for row in range(ESTIMATE_FROM)]
    for row in range(draw(st.integers(0, 14))):
        length, new = draw(st.integers(1, 90)), draw(st.integers(1, 90))
        cut = draw(st.sampled_from([0, 0, 7, 32, 40])) if length > 40 else 0
        samples = draw(st.sampled_from([1, 1, 1, 3]))
        requests.append(one(row, length, new, cut, draw(st.integers(0, 1)), samples))
        lengths[row] = draw(st.one_of(st.just(new), st.integers(1, new)))
    return Simulated(
        requests,
        lengths,
        cache_tokens=draw(st.sampled_from([size * ALIGN for size in (1, 3, 5, 8, 16, 128)])),
        max_seqs=draw(st.integers(1, 6)),
        step_tokens=draw(st.sampled_from([1, 32, 64, 600])),
        share=draw(st.booleans()),
        mixed=draw(st.booleans()),
        refill=draw(st.sampled_from([0.0, 1 / 8, 1 / 2])),
        share_from=draw(st.sampled_from([0, 20])),
    )


RELAXED = settings(deadline=None, max_examples=25, suppress_health_check=[HealthCheck.too_slow])


def all_samples(requests: Sequence[Request]) -> list[str]:
    return sorted(str((one.id, sample)) for one in requests for sample in range(one.sampling.n))


def names(sequences: Sequence[Growing]) -> list[str]:
    return sorted(str((sequence.request.id, sequence.sample)) for sequence in sequences)


# Whatever comes.


@RELAXED
@given(simulations())
def test_every_sample_of_every_request_ends_exactly_once(simulated: Simulated) -> None:
    requests = list(simulated.requests)
    simulated.run()
    assert names(simulated.ended + simulated.failed) == all_samples(requests)


@RELAXED
@given(simulations(), st.randoms(use_true_random=False), st.booleans())
def test_with_failures_at_any_step_every_sample_still_ends_exactly_once(
    simulated: Simulated, numbers: random.Random, alone: bool
) -> None:
    requests, left = list(simulated.requests), [4]

    def fail(engine: Simulated) -> None:
        if left[0] and numbers.random() < 0.2:
            left[0] -= 1
            engine.scheduler.preempt_all(isolate=alone)
            if not alone:
                engine.scheduler.shrink()

    simulated.run(fail)
    assert names(simulated.ended + simulated.failed) == all_samples(requests)


@RELAXED
@given(simulations())
def test_never_are_there_more_rows_than_slots(simulated: Simulated) -> None:
    assert simulated.run().most_rows <= simulated.max_seqs


@RELAXED
@given(simulations())
def test_no_slot_is_two_rows_at_a_time(simulated: Simulated) -> None:
    def look(engine: Simulated) -> None:
        slots = [row.slot for row in engine.scheduler.rows]
        assert len(set(slots)) == len(slots)

    simulated.run(look)


@RELAXED
@given(simulations())
def test_a_step_has_all_that_decode_and_at_most_a_chunk_more_than_its_tokens(simulated: Simulated) -> None:
    simulated.run()
    for plan in simulated.plans:
        prompts = sum(c.count for c in chunks_of(plan) if c.position < len(c.row.tokens))
        assert prompts < simulated.step_tokens + CHUNK


@RELAXED
@given(simulations())
def test_a_row_has_at_most_one_token_chosen_a_step(simulated: Simulated) -> None:
    simulated.run()
    for plan in simulated.plans:
        choosing = [id(chunk.row) for chunk in chunks_of(plan) if chunk.chooses]
        assert len(set(choosing)) == len(choosing)


@RELAXED
@given(simulations())
def test_a_chunk_crosses_no_border(simulated: Simulated) -> None:
    simulated.run()
    for chunk in (chunk for plan in simulated.plans for chunk in chunks_of(plan)):
        begin = chunk.row.cut if chunk.row.sequence else 0
        assert (chunk.position - begin) // CHUNK == (chunk.position + chunk.count - 1 - begin) // CHUNK or (
            chunk.position >= len(chunk.row.tokens)
        )


@RELAXED
@given(simulations())
def test_when_all_has_ended_nothing_but_prefixes_holds_memory(simulated: Simulated) -> None:
    scheduler = simulated.run().scheduler
    extents = scheduler._extents
    scheduler.preempt_all(isolate=False)  # drops prefixes that nobody uses
    assert extents.take(extents.num_tokens) == 0


@RELAXED
@given(simulations())
def test_what_fits_the_cache_alone_is_no_error(simulated: Simulated) -> None:
    fits = {
        str(one.id)
        for one in simulated.requests
        if one.sampling.n == 1 and not one.prefix
        and aligned(len(one.token_ids) + one.sampling.max_new_tokens - 1) <= simulated.cache_tokens
    }  # fmt: skip
    assert not fits & {str(sequence.request.id) for sequence in simulated.run().failed}


@RELAXED
@given(simulations())
def test_what_is_too_large_for_the_cache_is_an_error(simulated: Simulated) -> None:
    large = {
        str(one.id)
        for one in simulated.requests
        if len(one.token_ids) + one.sampling.max_new_tokens - 1 > simulated.cache_tokens
    }
    ended = {str(sequence.request.id) for sequence in simulated.run().ended}
    # One whose end comes early may be through before it is found out.
    assert {name for name in large & ended if simulated.lengths[int(name)] > simulated.cache_tokens} == set()


# Order, and the source.


def test_requests_begin_in_the_order_of_the_source() -> None:
    simulated = Simulated([one(row, 1 + row % 7, 1 + row % 5, samples=1 + row % 3) for row in range(20)]).run()
    assert simulated.admitted == [(row, sample) for row in range(20) for sample in range(1 + row % 3)]


def test_no_more_is_taken_from_the_source_than_there_are_slots() -> None:
    simulated = Simulated([one(row, 3, 9) for row in range(20)], max_seqs=4)
    simulated.step()
    assert (len(simulated.source.requests), len(simulated.scheduler.rows)) == (16, 4)


def test_no_more_is_taken_from_the_source_than_a_step_computes() -> None:
    simulated = Simulated([one(row, 40, 9) for row in range(20)], max_seqs=16, step_tokens=64)
    simulated.step()
    assert len(simulated.source.requests) == 18


def test_of_what_finds_no_room_one_request_alone_is_taken_from_the_source() -> None:
    simulated = Simulated([one(row, 10, ALIGN) for row in range(20)], max_seqs=16, cache_tokens=5 * ALIGN)
    simulated.step()
    assert (len(simulated.scheduler.rows), len(simulated.scheduler.waiting), len(simulated.source.requests)) == (
        2,
        1,
        17,
    )


def test_a_place_that_falls_free_is_taken_in_the_next_step() -> None:
    simulated = Simulated([one(row, 3, 1 if row == 0 else 5) for row in range(5)], max_seqs=4)
    simulated.step()
    simulated.step()
    assert [_name(row) for row in simulated.scheduler.rows] == [(1, 0), (2, 0), (3, 0), (4, 0)]


def test_after_a_restart_the_order_is_what_it_was() -> None:
    simulated = Simulated([one(row, 3, 9, samples=1 + row % 2) for row in range(9)], max_seqs=5)
    simulated.step()
    simulated.scheduler.preempt_all(isolate=False)
    waiting = [(sequence.request.id, sequence.sample) for sequence in simulated.scheduler.waiting]
    assert waiting == [(0, 0), (1, 0), (1, 1), (2, 0), (3, 0), (3, 1)]


def test_after_a_restart_nothing_generated_is_left() -> None:
    simulated = Simulated([one(row, 3, 9) for row in range(3)])
    simulated.step()
    simulated.step()
    simulated.scheduler.preempt_all(isolate=False)
    assert [sequence.token_ids for sequence in simulated.scheduler.waiting] == [[], [], []]


def test_after_a_restart_alone_each_is_tried_by_itself() -> None:
    simulated = Simulated([one(row, 3, 9) for row in range(4)])
    simulated.step()
    simulated.scheduler.preempt_all(isolate=True)
    simulated.most_rows = 0
    while len(simulated.ended) < 4:
        simulated.step()
    assert simulated.most_rows == 1


def test_after_all_have_been_tried_alone_they_are_together_again() -> None:
    simulated = Simulated([one(row, 3, 9) for row in range(12)])
    simulated.step()
    simulated.scheduler.preempt_all(isolate=True)
    while len(simulated.ended) < 4:
        simulated.step()
    simulated.step()
    assert len(simulated.scheduler.rows) == 4


def test_halved_there_are_half_as_many_rows() -> None:
    simulated = Simulated([one(row, 3, 9) for row in range(12)], max_seqs=6)
    simulated.scheduler.shrink()
    assert simulated.run().most_rows == 3


def test_halved_again_and_again_one_row_remains() -> None:
    simulated = Simulated([one(row, 3, 9) for row in range(4)], max_seqs=6)
    for _ in range(9):
        simulated.scheduler.shrink()
    assert simulated.run().most_rows == 1


# Several are admitted together.


@pytest.mark.parametrize(("max_seqs", "cache_tokens"), [(8, 64 * ALIGN), (12, 8 * ALIGN)], ids=["rows", "memory"])
def test_a_full_engine_admits_nobody_until_a_part_has_ended_and_is_then_filled_up(
    max_seqs: int, cache_tokens: int
) -> None:
    requests = [one(row, 3, 1 + row % 8 if row < 8 else 20) for row in range(16)]
    simulated = Simulated(requests, cache_tokens=cache_tokens, max_seqs=max_seqs, refill=1 / 2)
    admitted = []
    for _ in range(5):
        simulated.step()
        admitted.append(len(simulated.admitted))
    assert admitted == [8, 8, 8, 8, 12]


def test_without_a_refill_a_place_in_a_full_engine_is_taken_at_once() -> None:
    simulated = Simulated([one(row, 3, 1 + row % 8 if row < 8 else 20) for row in range(16)], max_seqs=8)
    for _ in range(3):
        simulated.step()
    assert len(simulated.admitted) == 10


def test_filling_up_goes_on_where_a_step_was_full_of_prompts() -> None:
    simulated = Simulated([one(row, 40, 50) for row in range(12)], max_seqs=8, step_tokens=64, refill=1 / 2)
    for _ in range(4):
        simulated.step()
    assert len(simulated.scheduler.rows) == 8


def test_one_that_waits_for_memory_gets_it_as_soon_as_it_is_free() -> None:
    requests = [*(one(row, 3, 2 + 2 * row) for row in range(8)), one("long", 3, 5 * ALIGN - 9)]
    simulated = Simulated(requests, cache_tokens=8 * ALIGN, max_seqs=12, refill=1 / 2)
    while ("long", 0) not in simulated.admitted:
        simulated.step()
    assert len(simulated.ended) == 5


def test_an_engine_whose_source_is_empty_for_now_takes_what_comes_at_once() -> None:
    late = [one(row, 3, 30) for row in range(4, 8)]
    simulated = Simulated([one(row, 3, 30) for row in range(4)], max_seqs=8, refill=1 / 2)
    found = []
    for _ in range(8):
        simulated.source.requests += [late.pop()] if late else []
        simulated.step()
        found.append(len(simulated.scheduler.rows))
    assert found == [5, 6, 7, 8, 8, 8, 8, 8]


def replayed(refill: float) -> tuple[float, int]:
    """Return the share of tokens from steps that only decode, under a load whose rows end early, and the steps."""
    random = np.random.default_rng(0)
    requests = []
    for row in range(1500):
        prompt = np.full(min(1000, max(4, round(60 * random.lognormal(0, 1.15)))), 7, dtype=np.int32)
        limit = min(256, max(4, round(48 * random.lognormal(0, 0.8))))
        prompt[0] = random.integers(1, limit + 1)  # it ends there
        requests.append(Request(row, row, prompt, SamplingParams(max_new_tokens=limit), bytes(16), len(prompt)))
    source = ListSource(sorted(requests, key=lambda request: -request.sampling.max_new_tokens))
    scheduler = Scheduler(Extents(1 << 18), 128, 8192, share=False, refill=refill)
    tokens, steps = {True: 0, False: 0}, 0
    while scheduler.admit(source) or scheduler.rows:
        plan, steps = scheduler.next(), steps + 1
        tokens[not plan.prompts] += len(plan.rows)
        list(end(scheduler, plan))
    return tokens[True] / sum(tokens.values()), steps


def test_a_load_whose_rows_end_early_is_mostly_replayed_where_several_are_admitted_together() -> None:
    (before, fewest), (share, steps) = replayed(0.0), replayed(REFILL)
    assert before < 0.2
    assert share > 0.7
    assert steps < 1.1 * fewest


# Chunks.


@pytest.mark.parametrize("step_tokens", [32, 512, 1000])
def test_a_long_prompt_is_computed_in_chunks_from_its_own_beginning(step_tokens: int) -> None:
    simulated = Simulated([one(0, 1300)], step_tokens=step_tokens, mixed=True).run()
    chunks = [(chunk.position, chunk.count) for plan in simulated.plans for chunk in chunks_of(plan)]
    assert chunks == [(0, 512), (512, 512), (1024, 276)]


@pytest.mark.parametrize("mixed", [True, False])
def test_prompts_fill_a_step_up_to_its_tokens(mixed: bool) -> None:
    simulated = Simulated([one(row, 20, 5) for row in range(9)], max_seqs=9, step_tokens=50, mixed=mixed)
    simulated.step()
    assert sum(chunk.count for chunk in chunks_of(simulated.plans[0])) == 60


def test_mixed_a_long_prompt_does_not_stall_those_that_decode() -> None:
    simulated = Simulated([one(0, 3, 30), one(1, 2000)], step_tokens=32)
    for _ in range(4):
        simulated.step()
    assert next(len(row.sequence.token_ids) for row in simulated.scheduler.rows if row.sequence) == 4


def test_rows_that_decode_stand_before_prompts_in_a_step() -> None:
    simulated = Simulated([one(row, 40, 5) for row in range(9)], max_seqs=9, step_tokens=50).run()
    for plan in simulated.plans:
        decodes = [chunk.position >= len(chunk.row.tokens) for chunk in chunks_of(plan)]
        assert decodes == sorted(decodes, reverse=True)


# Shared prefixes.


@pytest.mark.parametrize("share", [True, False])
def test_a_prefix_is_computed_once_while_it_is_used(share: bool) -> None:
    requests = [one(row, 60 + row, 5, cut=40) for row in range(12)]
    assert Simulated(requests, share=share).run().prefix_tokens == 40


@pytest.mark.parametrize("share", [True, False])
def test_a_prefix_that_nobody_uses_just_now_is_kept(share: bool) -> None:
    requests = [one(0, 60, 5, cut=40), one(1, 60, 5), one(2, 61, 5, cut=40)]
    assert Simulated(requests, max_seqs=1, share=share).run().prefix_tokens == 40


def test_each_of_several_prefixes_is_computed_once() -> None:
    requests = [one(row, 60 + row, 5, cut=30 + row % 3, family=row % 3) for row in range(12)]
    assert Simulated(requests).run().prefix_tokens == 30 + 31 + 32


def test_what_stands_behind_a_prefix_is_computed_for_each() -> None:
    requests = [one(row, 60 + row, 1, cut=40) for row in range(12)]
    assert Simulated(requests).run().computed == 40 + sum(20 + row for row in range(12))


def test_the_samples_of_a_prompt_share_all_but_its_last_token() -> None:
    assert Simulated([one(0, 50, 1, samples=7)]).run().computed == 49 + 7


def test_a_prefix_that_nobody_uses_is_dropped_when_memory_is_needed() -> None:
    large = one(1, 4 * ALIGN - 9, 5)
    simulated = Simulated([one(0, 60, 5, cut=40), large], cache_tokens=4 * ALIGN, max_seqs=1).run()
    assert (names(simulated.ended), simulated.failed) == (["(0, 0)", "(1, 0)"], [])


def test_the_prefix_that_was_used_last_is_dropped_last() -> None:
    # Room for two prefixes and a row: the third drops the first, whose next user computes it again.
    requests = [one(row, 33, 1, cut=32, family=row % 3) for row in (0, 1, 2, 4, 5)]
    assert Simulated(requests, cache_tokens=3 * ALIGN, max_seqs=1).run().prefix_tokens == 3 * 32


def test_without_sharing_a_row_begins_in_the_step_after_its_prefix() -> None:
    simulated = Simulated([one(0, 60, 5, cut=40)], share=False)
    simulated.step()
    assert simulated.scheduler.rows[0].done == 0
    simulated.step()
    assert (simulated.plans[1].copies[0][2], simulated.scheduler.rows[0].done) == (40, 60)


def test_with_sharing_a_row_begins_in_the_step_of_its_prefix() -> None:
    simulated = Simulated([one(0, 60, 5, cut=40)])
    simulated.step()
    assert simulated.scheduler.rows[0].done == 60


def test_a_short_prefix_is_copied_and_a_long_one_is_read_where_it_lies() -> None:
    requests = [one(0, 60, 5, cut=40), one(1, 60, 5, cut=39, family=1)]
    simulated = Simulated(requests, share_from=40)
    for _ in range(2):
        simulated.step()
    assert [row.copies for row in simulated.scheduler.rows] == [False, True]
    assert [count for plan in simulated.plans for _, _, count in plan.copies] == [39]


def test_a_row_waits_until_all_chunks_of_its_prefix_are_computed() -> None:
    simulated = Simulated([one(0, 1200, 5, cut=1100)], step_tokens=32)
    steps = 0
    while not simulated.scheduler.rows or simulated.scheduler.rows[0].done == 0:
        simulated.step()
        steps += 1
    assert steps == 3


def test_while_one_waits_for_its_prefix_another_is_computed() -> None:
    simulated = Simulated([one(0, 60, 5, cut=40), one(1, 20, 5)], share=False, step_tokens=600)
    simulated.step()
    assert [row.done for row in simulated.scheduler.rows] == [0, 20]


# Memory.


def short() -> list[Request]:
    return [one(f"short {row}", 1) for row in range(ESTIMATE_FROM)]


def test_before_lengths_are_known_all_that_a_row_may_need_is_reserved() -> None:
    simulated = Simulated([one(0, 10, 100)])
    simulated.step()
    assert simulated.scheduler.rows[0].capacity == 109


def test_when_others_have_ended_early_less_is_reserved() -> None:
    simulated = Simulated([*short(), one(0, 10, 100)], max_seqs=1)
    while simulated.admitted[-1:] != [(0, 0)]:
        simulated.step()
    assert simulated.scheduler.rows[0].capacity == 10


def test_a_row_that_outgrows_its_extent_is_not_computed_again() -> None:
    requests = [*short(), *(one(row, 10, 100) for row in range(4))]
    assert Simulated(requests).run().computed == ESTIMATE_FROM + 4 * 109


def test_where_there_is_no_room_to_grow_the_youngest_gives_way() -> None:
    simulated = Simulated([*short(), *(one(row, 10, 4 * ALIGN - 9) for row in range(4))], cache_tokens=5 * ALIGN).run()
    assert [name for name in dict.fromkeys(map(_id, simulated.ended)) if isinstance(name, int)] == [0, 1, 2, 3]
    assert simulated.computed > ESTIMATE_FROM + 4 * 4 * ALIGN


def _id(sequence: Growing) -> Any:
    return sequence.request.id


def test_one_alone_that_cannot_grow_where_it_lies_begins_anew_with_room_for_all() -> None:
    simulated = Simulated([*short(), one(0, ALIGN, 3 * ALIGN)], cache_tokens=4 * ALIGN).run()
    assert (len(simulated.ended), simulated.failed) == (ESTIMATE_FROM + 1, [])


def test_an_error_of_size_says_what_is_needed_and_what_there_is() -> None:
    [failed] = Simulated([one(0, 2 * ALIGN, ALIGN + 2)], cache_tokens=3 * ALIGN).run().failed
    assert f"needs {3 * ALIGN + 1} tokens of cache, and there is room for {3 * ALIGN};" in (failed.error or "")


def test_what_is_too_large_does_not_hold_up_the_others() -> None:
    simulated = Simulated([one(0, 100, 5), one(1, 500, 5), one(2, 100, 5)], cache_tokens=256).run()
    assert (names(simulated.ended), names(simulated.failed)) == (["(0, 0)", "(2, 0)"], ["(1, 0)"])


def test_what_fits_the_cache_beside_its_prefix_is_no_error_wherever_the_prefix_lies() -> None:
    early = [one(0, ALIGN, 1), one(1, ALIGN + 1, 1, cut=ALIGN)]
    requests = [*early, one(2, 2 * ALIGN, 2 * ALIGN, cut=ALIGN)]
    assert Simulated(requests, cache_tokens=4 * ALIGN, step_tokens=600).run().failed == []
