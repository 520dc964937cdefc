"""Scatter: rank 0 hands out requests in pieces, first each rank's shard, then the tail on demand.

`Dispatcher` lives on rank 0, `Backlog` on every rank; between them travel packed arrays.
"""

import time
from collections import deque
from collections.abc import Callable

import numpy as np

from hpc.arrays import Ints
from hpc.corpus import store
from hpc.corpus.store import TokenStore
from hpc.engine.bounds import seqs_at_once
from hpc.executor.deadline import Deadline
from hpc.job import Job
from hpc.mpi.comm import Buffer, pack, unpack
from hpc.plan.arrange import Plan, make_plan
from hpc.plan.pending import Pending
from hpc.plan.shard import next_piece
from hpc.request import KEY_BYTES, Request
from hpc.sampling_params import SamplingParams

_MIN_BYTES = 64
"""Bytes of a request in a piece besides its tokens and its line: 6 numbers of 8 bytes and the key of 16."""


def piece_bytes(size: int) -> int:
    """Return the largest size of a piece in bytes: 8 MiB, and less where rank 0 holds one for each of many ranks."""
    return min(8 << 20, (512 << 20) // size)


def make_dispatcher(job: Job, tokens: TokenStore, found: Pending, size: int, on_gpu: bool) -> "Dispatcher":
    """Bucket and shard the pending requests for `size` ranks; return the dispatcher that hands them out."""
    # Of the whole corpus, not of what is pending: see `hpc.plan.prefix`.
    asked = tokens.prompts(found.asked)
    at_once = seqs_at_once(job.max_num_seqs, on_gpu)
    plan = make_plan(asked, np.searchsorted(found.asked, found.pending), job, size, at_once=at_once)
    return Dispatcher(tokens, found.pending, found.also, plan, piece_bytes(size))


class Dispatcher:
    """Hands out requests, which are named by their index in `rows`."""

    def __init__(
        self,
        tokens: TokenStore,
        rows: Ints,
        also: dict[int, list[int]],
        plan: Plan,
        max_bytes: int,
    ) -> None:
        """Hold the plan.

        `rows`, of shape [requests], is the first row that asks for a request; `also` names the further
        rows that ask for it. A piece has at most `max_bytes`.
        """
        self._tokens = tokens
        self.rows = rows
        self._also = also
        self._plan = plan
        self._shards = list(plan.shards.shards)
        self._tail = plan.shards.tail
        self._spent = np.cumsum(plan.costs[self._tail])  # once: thousands of ranks ask
        self._max_bytes = max_bytes

    @property
    def padding(self) -> float:
        """Share of the tokens of full buckets that are padding."""
        padded = int(self._plan.buckets.sum())
        return 1 - int(self._tokens.prompt_lengths(self.rows).sum()) / padded if padded else 0.0

    @property
    def shared(self) -> tuple[Ints, Ints]:
        """The number of first tokens that each request shares, and the number of the group that it shares them with."""
        return self._plan.prefixes, self._plan.groups

    def next_piece(self, rank: int) -> Buffer:
        """Return the next piece for a rank, of its shard and then of the tail; the piece says if it is the last."""
        indices = self._shards[rank]
        if len(indices):
            count = len(indices)
        else:
            indices = self._tail
            done = len(self._spent) - len(indices)
            count = next_piece(self._spent, len(self._shards), self._plan.least, done)
        count = self._fitting(indices[:count])
        chosen, rest = indices[:count], indices[count:]
        if len(self._shards[rank]):
            self._shards[rank] = rest
        else:
            self._tail = rest
        last = not len(self._shards[rank]) and not len(self._tail)
        return self._pack(chosen, last)

    def close(self) -> None:
        """Hand out nothing more, since it would not end in time."""
        self._shards = [indices[:0] for indices in self._shards]
        self._tail = self._tail[:0]

    def _fitting(self, indices: Ints) -> int:
        """Return how many of the requests fit into a piece; at least one, however large it is."""
        indices = indices[: max(1, self._max_bytes // _MIN_BYTES)]
        rows = self.rows[indices]
        also = np.array([len(self._also.get(row, ())) for row in rows.tolist()], dtype=np.int64)
        each = 4 * self._tokens.prompt_lengths(rows) + self._tokens.request_bytes(rows) + 8 * also + _MIN_BYTES
        sizes = np.cumsum(each)
        return max(1, int(np.searchsorted(sizes, self._max_bytes, side="right")))

    def _pack(self, indices: Ints, last: bool) -> Buffer:
        rows = self.rows[indices]
        also = [np.array(self._also.get(row, ()), dtype=np.int64) for row in rows.tolist()]
        return pack(
            {"last": last},
            rows=rows,
            buckets=self._plan.buckets[indices],
            prefixes=self._plan.prefixes[indices],
            keys=self._tokens.keys[rows].view(np.uint8),
            lengths=self._tokens.prompt_lengths(rows),
            tokens=self._tokens.all_tokens(rows),
            line_lengths=self._tokens.request_bytes(rows),
            lines=self._tokens.request_lines(rows),
            also_lengths=np.array([len(rows) for rows in also], dtype=np.int64),
            also=np.concatenate([np.empty(0, np.int64), *also]),
        )


class Backlog:
    """The requests of a rank that its engine has not taken yet: the `Source` of that engine.

    It asks for the next piece before the engine runs dry, but never twice at a time, and not before a quarter of what
    the engine took has ended, so that work stays available to other ranks. With `expecting`, the first piece comes
    unasked. A request that would not end before the deadline is passed over. Each time the engine asks, `on_wait` is
    told whether it has nothing to take, and must wait.
    """

    def __init__(
        self,
        defaults: SamplingParams,
        ask: Callable[[], None],
        expecting: bool = False,
        deadline: Deadline | None = None,
        on_wait: Callable[[bool], None] = lambda _: None,
    ) -> None:
        self._defaults = defaults
        self._on_wait = on_wait
        self._ask = ask
        self._requests: deque[Request] = deque()
        self._tokens = 0
        self._expecting = expecting
        self._last = False
        self._deadline = deadline or Deadline(None)
        self._under_way: dict[int, tuple[Request, float]] = {}
        self._max_under_way = 0
        self.also: dict[int, list[int]] = {}
        """By the row of a request, the further rows that it answers."""
        self.waited_s = 0.0
        """Seconds that the engine had nothing to take."""
        self._empty_since: float | None = None

    @property
    def exhausted(self) -> bool:
        """Whether nothing is left, here and at rank 0."""
        return self._last and not self._requests

    def pull(self, num_tokens: int) -> list[Request]:
        """Return the next requests that together hold `num_tokens` at their end, at least one."""
        taken: list[Request] = []
        room = num_tokens
        while self._requests and (not taken or self._requests[0].most_tokens <= room):
            request = self._requests.popleft()
            self._tokens -= request.most_tokens
            if self._deadline.admits(len(request.token_ids), request.sampling.max_new_tokens):
                room -= request.most_tokens
                taken.append(request)
        enough = self._tokens >= num_tokens or len(self._under_way) > 3 * self._max_under_way // 4
        now = time.monotonic()
        self._under_way.update((request.row, (request, now)) for request in taken)
        self._max_under_way = max(self._max_under_way, len(self._under_way))
        if not (enough or self._expecting or self._last):
            self._expecting = True
            self._ask()
        self._note_waiting(not taken and not self.exhausted)
        return taken

    def done(self, row: int, new_tokens: int) -> list[int]:
        """Note that the request of a row has ended with `new_tokens`; return the further rows that it answers."""
        if row in self._under_way:
            request, began = self._under_way.pop(row)
            self._deadline.note(len(request.token_ids), new_tokens, time.monotonic() - began)
        return self.also.pop(row, [])

    def add(self, piece: Buffer) -> None:
        """Add the requests of a piece that rank 0 has sent."""
        values, arrays = unpack(piece)
        self._expecting, self._last = False, values["last"]
        keys = arrays["keys"].tobytes()
        token_ends, line_ends = np.cumsum(arrays["lengths"]), np.cumsum(arrays["line_lengths"])
        also_ends = np.cumsum(arrays["also_lengths"])
        lines = arrays["lines"].tobytes()
        for index, row in enumerate(arrays["rows"].tolist()):
            request = store.parse_request(
                lines[line_ends[index] - arrays["line_lengths"][index] : line_ends[index]],
                row,
                arrays["tokens"][token_ends[index] - arrays["lengths"][index] : token_ends[index]],
                keys[KEY_BYTES * index : KEY_BYTES * (index + 1)],
                int(arrays["buckets"][index]),
                self._defaults,
                int(arrays["prefixes"][index]),
            )
            if arrays["also_lengths"][index]:
                self.also[row] = arrays["also"][
                    also_ends[index] - arrays["also_lengths"][index] : also_ends[index]
                ].tolist()
            self._requests.append(request)
            self._tokens += request.most_tokens

    def _note_waiting(self, waiting: bool) -> None:
        now = time.monotonic()
        if self._empty_since is not None:
            self.waited_s += now - self._empty_since
        self._empty_since = now if waiting else None
        self._on_wait(waiting)
