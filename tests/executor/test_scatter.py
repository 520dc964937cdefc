"""What rank 0 hands out reaches the ranks' engines once, in bounded pieces, and before they are idle."""

from collections.abc import Sequence

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hpc.arrays import Floats, Ints
from hpc.corpus.store import TokenStore
from hpc.executor.scatter import Backlog, Dispatcher, piece_bytes
from hpc.mpi.comm import Buffer, unpack
from hpc.plan.arrange import Plan
from hpc.plan.shard import Deal, deal
from hpc.request import Request
from hpc.sampling_params import SamplingParams
from tests.conftest import write_corpus
from tests.stores import read_store

NUM_ROWS = 30
DEFAULTS = SamplingParams(max_new_tokens=16)
BUCKET = 64


@pytest.fixture(scope="module")
def tokens(tmp_path_factory: pytest.TempPathFactory) -> TokenStore:
    """Rows of 1 to 30 tokens; every third has a parameter of its own."""
    folder = tmp_path_factory.mktemp("store")
    rows = [
        {"prompt": "a" * (row + 1), "id": f"é{row}", **({} if row % 3 else {"sampling": {"temperature": 0.5}})}
        for row in range(NUM_ROWS)
    ]
    return read_store(folder, [write_corpus(folder / "c", rows)], DEFAULTS)


def dispatch(
    tokens: TokenStore,
    rows: Sequence[int] = range(NUM_ROWS),
    size: int = 1,
    tail: float = 0.0,
    max_bytes: int = 1 << 20,
    also: dict[int, list[int]] | None = None,
    planned: Deal | None = None,
) -> Dispatcher:
    chosen = np.array(rows, dtype=np.int64)
    costs, buckets = costs_and_buckets(len(chosen))
    planned = planned or deal(costs, buckets, size, tail)
    arranged = Plan(buckets, np.arange(len(chosen)) % 3, np.full_like(chosen, -1), costs, 0.0, planned)
    return Dispatcher(tokens, chosen, also or {}, arranged, max_bytes)


def costs_and_buckets(number: int) -> tuple[Floats, Ints]:
    return np.arange(1, number + 1, dtype=np.float64), np.full(number, BUCKET)


def rows_of(piece: Buffer) -> list[int]:
    rows: list[int] = unpack(piece)[1]["rows"].tolist()
    return rows


def is_last(piece: Buffer) -> bool:
    last: bool = unpack(piece)[0]["last"]
    return last


def drain(backlog: Backlog, num_tokens: int = 1 << 20) -> list[Request]:
    """Pull until it is exhausted, each request being done at once; its asking must have answers."""
    pulled: list[Request] = []
    while not backlog.exhausted:
        taken = backlog.pull(num_tokens)
        pulled += taken
        for request in taken:
            backlog.done(request.row, 1)
    return pulled


@settings(deadline=None)
@given(
    number=st.integers(0, NUM_ROWS),
    size=st.integers(1, 4),
    tail=st.sampled_from([0.0, 0.15, 0.5, 1.0]),
    max_bytes=st.sampled_from([1, 300, 1 << 20]),
    data=st.data(),
)
def test_every_request_is_handed_out_exactly_once_whoever_asks_when(
    tokens: TokenStore, number: int, size: int, tail: float, max_bytes: int, data: st.DataObject
) -> None:
    dispatcher = dispatch(tokens, range(number), size, tail, max_bytes)
    asking, found = list(range(size)), []
    while asking:
        rank = data.draw(st.sampled_from(asking))
        piece = dispatcher.next_piece(rank)
        found += rows_of(piece)
        if is_last(piece):
            asking.remove(rank)
        else:
            assert rows_of(piece)
    assert sorted(found) == list(range(number))


@settings(deadline=None, max_examples=50)
@given(
    size=st.integers(1, 4),
    tail=st.sampled_from([0.0, 0.15, 1.0]),
    max_bytes=st.sampled_from([1, 300, 1 << 20]),
    num_tokens=st.sampled_from([1, 200, 1 << 20]),
)
def test_every_request_reaches_an_engine_exactly_once(
    tokens: TokenStore, size: int, tail: float, max_bytes: int, num_tokens: int
) -> None:
    dispatcher = dispatch(tokens, size=size, tail=tail, max_bytes=max_bytes)
    backlogs: list[Backlog] = []

    def add_rank(rank: int) -> None:
        backlogs.append(Backlog(DEFAULTS, lambda: backlogs[rank].add(dispatcher.next_piece(rank))))

    for rank in range(size):
        add_rank(rank)
    found = [request.row for backlog in backlogs for request in drain(backlog, num_tokens)]
    assert sorted(found) == list(range(NUM_ROWS))


def test_a_request_comes_out_as_the_store_has_it(tokens: TokenStore) -> None:
    backlog = Backlog(DEFAULTS, lambda: None)
    backlog.add(dispatch(tokens).next_piece(0))
    for request in drain(backlog):
        sampling = DEFAULTS if request.row % 3 else SamplingParams(max_new_tokens=16, temperature=0.5)
        assert (request.id, request.sampling, request.bucket) == (f"é{request.row}", sampling, BUCKET)
        assert (request.token_ids.tolist(), request.key) == ([97] * (request.row + 1), tokens.key(request.row))


def test_further_rows_travel_with_the_request_they_share(tokens: TokenStore) -> None:
    backlog = Backlog(DEFAULTS, lambda: None)
    backlog.add(dispatch(tokens, range(4), also={1: [7, 9], 3: [8]}).next_piece(0))
    assert [backlog.done(row, 1) for row in range(4)] == [[], [7, 9], [], [8]]


@settings(deadline=None)
@given(max_bytes=st.integers(1, 5000))
def test_a_piece_is_one_request_or_within_its_bytes(tokens: TokenStore, max_bytes: int) -> None:
    dispatcher = dispatch(tokens, max_bytes=max_bytes)
    last = False
    while not last:
        piece = dispatcher.next_piece(0)
        rows, last = rows_of(piece), is_last(piece)
        assert len(rows) == 1 or sum(4 * (row + 1) + 64 for row in rows) <= max_bytes


def test_a_rank_without_a_shard_is_given_of_the_tail(tokens: TokenStore) -> None:
    assert rows_of(dispatch(tokens, size=2, tail=1.0).next_piece(1)) != []


def test_a_rank_gets_all_of_its_shard_at_once_where_it_fits(tokens: TokenStore) -> None:
    planned = deal(*costs_and_buckets(NUM_ROWS), 2, 0.15)
    assert rows_of(dispatch(tokens, size=2, tail=0.15).next_piece(1)) == planned.shards[1].tolist()


def test_a_shard_is_not_the_last_piece_while_there_is_a_tail(tokens: TokenStore) -> None:
    assert not is_last(dispatch(tokens, size=2, tail=0.15).next_piece(0))


def test_a_shard_is_the_last_piece_where_there_is_no_tail(tokens: TokenStore) -> None:
    assert is_last(dispatch(tokens, size=2, tail=0.0).next_piece(0))


def test_who_asks_after_the_end_gets_nothing_and_is_told_so(tokens: TokenStore) -> None:
    dispatcher = dispatch(tokens)
    dispatcher.next_piece(0)
    piece = dispatcher.next_piece(0)
    assert (rows_of(piece), is_last(piece)) == ([], True)


@pytest.mark.parametrize("size", [1, 2, 8, 16, 1000])
def test_pieces_for_all_ranks_together_are_bounded(size: int) -> None:
    assert piece_bytes(size) <= 64 << 20
    assert piece_bytes(size) * size <= 512 << 20


class Asker:
    """Counts how often a backlog asks; its first answer is three requests, the last one if nothing is kept back."""

    def __init__(self, tokens: TokenStore, kept_back: int) -> None:
        self.asked = 0
        plan = Deal((np.arange(3), np.empty(0, np.int64)), np.arange(3, 3 + kept_back))
        self.dispatcher = dispatch(tokens, range(3 + kept_back), planned=plan)
        self.backlog = Backlog(DEFAULTS, self.ask)

    def ask(self) -> None:
        self.asked += 1

    def answer(self) -> None:
        self.backlog.add(self.dispatcher.next_piece(0))


ONE_REQUEST = BUCKET + DEFAULTS.max_new_tokens


def test_an_empty_backlog_asks_at_the_first_pull(tokens: TokenStore) -> None:
    asker = Asker(tokens, kept_back=1)
    asker.backlog.pull(1)
    assert asker.asked == 1


def test_a_backlog_asks_before_it_is_empty(tokens: TokenStore) -> None:
    asker = Asker(tokens, kept_back=1)
    asker.answer()
    asker.backlog.pull(2 * ONE_REQUEST)
    assert (asker.asked, len(asker.backlog.pull(2 * ONE_REQUEST))) == (1, 1)


def test_a_backlog_that_has_enough_for_the_next_pull_does_not_ask(tokens: TokenStore) -> None:
    asker = Asker(tokens, kept_back=1)
    asker.answer()
    asker.backlog.pull(ONE_REQUEST)
    assert asker.asked == 0


def test_a_backlog_asks_once_until_it_is_answered(tokens: TokenStore) -> None:
    asker = Asker(tokens, kept_back=1)
    for _ in range(3):
        asker.backlog.pull(1)
    asker.answer()
    for _ in range(3):
        asker.backlog.pull(3 * ONE_REQUEST)
    assert asker.asked == 2


def test_a_backlog_does_not_ask_while_most_of_what_was_taken_is_under_way(tokens: TokenStore) -> None:
    asker = Asker(tokens, kept_back=1)
    asker.answer()
    for _ in range(4):
        asker.backlog.pull(1)
    assert asker.asked == 0


def test_a_backlog_asks_when_a_quarter_of_what_was_taken_is_done(tokens: TokenStore) -> None:
    asker = Asker(tokens, kept_back=1)
    asker.answer()
    taken = [asker.backlog.pull(1)[0] for _ in range(3)]
    before = asker.asked
    asker.backlog.done(taken[0].row, 1)
    asker.backlog.pull(1)
    assert (before, asker.asked) == (0, 1)


def test_a_backlog_does_not_ask_after_the_last_piece(tokens: TokenStore) -> None:
    asker = Asker(tokens, kept_back=0)
    asker.answer()
    drain(asker.backlog)
    asker.backlog.pull(ONE_REQUEST)
    assert asker.asked == 0


def test_a_backlog_gives_one_request_however_little_room_there_is(tokens: TokenStore) -> None:
    asker = Asker(tokens, kept_back=0)
    asker.answer()
    assert len(asker.backlog.pull(1)) == 1


def test_a_backlog_gives_as_many_requests_as_there_is_room_for(tokens: TokenStore) -> None:
    asker = Asker(tokens, kept_back=0)
    asker.answer()
    assert len(asker.backlog.pull(3 * ONE_REQUEST - 1)) == 2


def test_a_backlog_that_waits_is_empty_and_not_exhausted(tokens: TokenStore) -> None:
    backlog = Asker(tokens, kept_back=0).backlog
    assert (backlog.pull(ONE_REQUEST), backlog.exhausted) == ([], False)


def test_a_backlog_is_not_exhausted_while_it_holds_the_last_requests(tokens: TokenStore) -> None:
    asker = Asker(tokens, kept_back=0)
    asker.answer()
    asker.backlog.pull(2 * ONE_REQUEST)
    before = asker.backlog.exhausted
    asker.backlog.pull(1)
    assert (before, asker.backlog.exhausted) == (False, True)
