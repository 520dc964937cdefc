"""What is done about failures; a batch that fails is halved until the request at fault is alone."""

import weakref
from collections.abc import Callable, Collection

import pytest

from hpc.engine.failure import FAULT_AFTER, Bisector, EngineFault, Failure, Recovery, Remedy
from hpc.engine.interface import begin
from hpc.engine.sequence import Sequence as Grown
from hpc.request import RowId
from hpc.sampling_params import SamplingParams
from tests.engine.oracle import request


class Batches:
    """A `generate_batch` that refuses batches with certain ids or too many requests, and remembers all it was given."""

    def __init__(
        self,
        bad: Collection[RowId] = (),
        error: Callable[[], BaseException] = lambda: ValueError("bad request"),
        most: int = 10_000,
    ) -> None:
        self.given: list[list[RowId]] = []
        self.shrunk = 0
        self._bad, self._error, self._most = bad, error, most

    def __call__(self, batch: list[Grown]) -> list[Grown]:
        self.given.append([s.request.id for s in batch])
        if len(batch) > self._most:
            raise MemoryError
        if any(s.request.id in self._bad for s in batch):
            raise self._error()
        return [Grown(s.request, [1], sample=s.sample) for s in batch]

    def shrink(self) -> None:
        self.shrunk += 1

    def bisector(self) -> Bisector:
        return Bisector(self, self.shrink)


def requests(count: int, first: int = 0, n: int = 1) -> list[Grown]:
    """Return the sequences of some requests as they begin."""
    return begin(request([1], index, SamplingParams(temperature=1, n=n)) for index in range(first, first + count))


def run(bisector: Bisector, batch: list[Grown]) -> list[list[tuple[RowId, bool]]]:
    """Return what is yielded: of each sequence its id and whether it was completed."""
    return [[(s.request.id, s.error is None) for s in yielded] for yielded in bisector.run(batch)]


def flush(bisector: Bisector) -> list[tuple[RowId, str | None]]:
    return [(s.request.id, s.error) for yielded in bisector.flush() for s in yielded]


def test_a_batch_that_succeeds_is_yielded_as_it_is() -> None:
    assert run(Batches().bisector(), requests(3)) == [[(0, True), (1, True), (2, True)]]


def test_a_batch_that_succeeds_is_generated_once() -> None:
    batches = Batches()
    run(batches.bisector(), requests(3))
    assert batches.given == [[0, 1, 2]]


@pytest.mark.parametrize("bad", range(7))
def test_one_bad_request_costs_no_other(bad: int) -> None:
    bisector = Batches({bad}).bisector()
    completed = {identity for yielded in run(bisector, requests(7)) for identity, good in yielded if good}
    assert completed == set(range(7)) - {bad}


@pytest.mark.parametrize("bad", range(7))
def test_one_bad_request_becomes_the_only_error(bad: int) -> None:
    bisector = Batches({bad}).bisector()
    yielded = [pair for part in run(bisector, requests(7)) for pair in part]
    errors = [identity for identity, good in yielded if not good] + [identity for identity, _ in flush(bisector)]
    assert errors == [bad]


@pytest.mark.parametrize("bad", [(0, 1), (2, 5), (0, 3, 6), (1, 2, 3, 4)])
def test_every_request_is_yielded_exactly_once(bad: tuple[int, ...]) -> None:
    bisector = Batches(bad).bisector()
    yielded = [identity for part in run(bisector, requests(7)) for identity, _ in part]
    assert sorted([*yielded, *(identity for identity, _ in flush(bisector))]) == list(range(7))


def test_the_halves_of_a_failed_batch_are_generated_in_order() -> None:
    batches = Batches({2})
    run(batches.bisector(), requests(4))
    assert batches.given == [[0, 1, 2, 3], [0, 1], [2, 3], [2], [3]]


def test_an_error_says_type_and_first_line_of_the_exception() -> None:
    bisector = Batches({0}, lambda: ValueError("the first line\nthe second")).bisector()
    run(bisector, requests(1))
    assert flush(bisector) == [(0, "ValueError: the first line")]


def test_an_error_without_a_message_says_its_type() -> None:
    bisector = Batches({0}, ZeroDivisionError).bisector()
    run(bisector, requests(1))
    assert flush(bisector) == [(0, "ZeroDivisionError")]


def test_a_failed_request_is_not_yielded_before_another_succeeds() -> None:
    assert run(Batches({0, 1}).bisector(), requests(2)) == []


def test_a_failed_request_is_yielded_just_before_the_next_that_succeeds() -> None:
    assert run(Batches({0, 1}).bisector(), requests(3)) == [[(0, False), (1, False)], [(2, True)]]


def test_a_success_in_a_later_batch_brings_the_failed_requests_too() -> None:
    bisector = Batches({0}).bisector()
    run(bisector, requests(1))
    assert run(bisector, requests(2, first=1)) == [[(0, False)], [(1, True), (2, True)]]


def test_failed_requests_are_yielded_in_the_order_in_which_they_failed() -> None:
    bisector = Batches({5, 2, 4}).bisector()
    for first in (5, 2, 4):
        run(bisector, requests(1, first))
    assert [identity for identity, _ in flush(bisector)] == [5, 2, 4]


def test_flush_yields_what_failed_after_the_last_success() -> None:
    bisector = Batches({2}).bisector()
    run(bisector, requests(3))
    assert [identity for identity, _ in flush(bisector)] == [2]


def test_flush_yields_nothing_where_nothing_failed() -> None:
    bisector = Batches().bisector()
    run(bisector, requests(3))
    assert flush(bisector) == []


def test_flush_yields_nothing_twice() -> None:
    bisector = Batches({0}).bisector()
    run(bisector, requests(1))
    flush(bisector)
    assert flush(bisector) == []


def test_a_batch_that_ends_without_sequences_yields_nothing() -> None:
    assert list(Bisector(lambda batch: [], lambda: None).run(requests(2))) == []


def test_a_batch_that_ends_without_sequences_is_no_success() -> None:
    batches = Batches({0})
    bisector = Bisector(lambda batch: batches(batch)[1:], batches.shrink)
    run(bisector, requests(1))
    run(bisector, requests(1, first=1))
    assert [identity for identity, _ in flush(bisector)] == [0]


def test_eight_requests_that_fail_in_a_row_are_a_fault_of_the_engine() -> None:
    with pytest.raises(EngineFault):
        run(Batches(range(100)).bisector(), requests(8))


def test_seven_requests_that_fail_in_a_row_are_no_fault_of_the_engine() -> None:
    bisector = Batches(range(100)).bisector()
    run(bisector, requests(7))
    assert len(flush(bisector)) == 7


def test_failures_are_counted_over_batches() -> None:
    bisector = Batches(range(100)).bisector()
    for first in range(FAULT_AFTER - 1):
        run(bisector, requests(1, first))
    with pytest.raises(EngineFault):
        run(bisector, requests(1, first=7))


def test_samples_of_one_request_that_fail_are_no_fault_of_the_engine() -> None:
    bisector = Batches(range(100)).bisector()
    run(bisector, requests(7, n=10))
    assert len(flush(bisector)) == 70


def test_eight_requests_of_several_samples_that_fail_in_a_row_are_a_fault_of_the_engine() -> None:
    with pytest.raises(EngineFault):
        run(Batches(range(100)).bisector(), requests(8, n=10))


def test_a_sample_that_fails_is_yielded_as_that_sample() -> None:
    bisector = Batches({0}).bisector()
    list(bisector.run(requests(1, n=3)[2:]))
    assert [s.sample for yielded in bisector.flush() for s in yielded] == [2]


def test_a_success_between_them_makes_failures_no_fault() -> None:
    bisector = Batches({*range(7), *range(8, 15)}).bisector()
    run(bisector, requests(15))
    assert len(flush(bisector)) == 7


def test_a_fault_names_the_requests_that_failed() -> None:
    with pytest.raises(EngineFault, match=r"ids 0, 1, 2, 3, 4, 5, 6, 7\b"):
        run(Batches(range(100)).bisector(), requests(8))


def test_a_fault_says_what_the_last_failure_was() -> None:
    with pytest.raises(EngineFault, match="ValueError: bad request"):
        run(Batches(range(100)).bisector(), requests(8))


def test_what_was_completed_before_a_fault_has_been_yielded() -> None:
    running = Batches(range(1, 100)).bisector().run(requests(16))
    assert [sequence.request.id for sequence in next(running)] == [0]
    with pytest.raises(EngineFault):
        next(running)


def test_requests_that_do_not_fit_in_memory_are_no_fault_of_the_engine() -> None:
    bisector = Batches(range(100), MemoryError).bisector()
    run(bisector, requests(20))
    assert len(flush(bisector)) == 20


def test_a_request_that_does_not_fit_in_memory_alone_says_so() -> None:
    bisector = Batches({0}, MemoryError).bisector()
    run(bisector, requests(1))
    assert flush(bisector) == [(0, "it does not fit in memory, even alone")]


def test_out_of_memory_is_the_reason_of_no_request_that_fits_alone() -> None:
    bisector = Batches(most=1).bisector()
    assert [pair for part in run(bisector, requests(5)) for pair in part] == [(index, True) for index in range(5)]


def test_out_of_memory_shrinks() -> None:
    batches = Batches(most=2)
    run(batches.bisector(), requests(4))
    assert batches.shrunk == 1


def test_what_a_batch_out_of_memory_held_is_free_when_shrinking() -> None:
    held: list[weakref.ref[Batches]] = []
    freed: list[bool] = []

    def generate_batch(batch: list[Grown]) -> list[Grown]:
        cache = Batches()  # stands for tensors
        held.append(weakref.ref(cache))
        if len(batch) > 1:
            raise MemoryError
        return batch

    run(Bisector(generate_batch, lambda: freed.append(held[-1]() is None)), requests(2))
    assert freed == [True]


def test_another_error_does_not_shrink() -> None:
    batches = Batches({0})
    run(batches.bisector(), requests(4))
    assert batches.shrunk == 0


def test_an_interrupt_is_no_failure_of_a_request() -> None:
    with pytest.raises(KeyboardInterrupt):
        run(Batches({0}, KeyboardInterrupt).bisector(), requests(4))


@pytest.mark.parametrize(
    ("num_sequences", "out_of_memory", "remedy"),
    [(2, True, Remedy.SHRINK), (2, False, Remedy.ISOLATE), (1, True, Remedy.GIVE_UP), (1, False, Remedy.GIVE_UP)],
)
def test_memory_shrinks_faults_isolate_and_a_request_alone_is_given_up(
    num_sequences: int, out_of_memory: bool, remedy: Remedy
) -> None:
    assert Recovery().remedy(Failure("", out_of_memory), num_sequences) is remedy
