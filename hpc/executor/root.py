"""Rank 0's side of the messages: place the ranks, answer them, spread a stop, say how far the run is."""

import logging
import sys
import time
from collections.abc import Mapping
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from hpc.executor.deadline import Deadline
from hpc.executor.scatter import Dispatcher
from hpc.mpi.binding import Binding, bind_ranks, host_info
from hpc.mpi.comm import Buffer, Comm, Message, Tag, pack, unpack, wait_for
from hpc.mpi.signals import Stop
from hpc.output.journal import FSYNC_S, JournalWriter
from hpc.rundir.events import Events
from hpc.rundir.progress import Progress, Work, describe, overall

if TYPE_CHECKING:
    from hpc.report.bar import Bar

LOGGER = logging.getLogger(__name__)


TERMINAL_S, FILE_S = 5.0, 30.0
"""How often the progress is printed to a terminal and to anything else."""


class Root:
    """What rank 0 knows of the other ranks, and says to them."""

    def __init__(self, world: Comm, stop: Stop) -> None:
        self.world = world
        self.stop = stop
        self.progress: dict[int, Progress] = {}
        self._hellos: dict[int, Buffer] = {0: host_info()}
        self._done: set[int] = set()
        self._stop_told = False
        self._dispatcher: Dispatcher | None = None
        self._events: Events | None = None
        self._work: Work | None = None
        self._deadline = Deadline(None)
        self._places: list[Binding] = []
        self._print_s = TERMINAL_S if sys.stderr.isatty() else FILE_S
        self._next_print = 0.0
        self._bar: Bar | None = None
        self.expected_end: float | None = None
        """When, in seconds of the clock, all should be over, as predicted."""

    @property
    def others(self) -> range:
        """All ranks but this one."""
        return range(1, self.world.size)

    def place_ranks(self, device: str) -> Binding:
        """Wait for every rank's greeting and place them all; return rank 0's place."""
        self._wait_for_hellos()
        self._places = bind_ranks([self._hellos[rank] for rank in range(self.world.size)], device != "cpu")
        return self._places[0]

    def introduce(self, values: Mapping[str, Any]) -> None:
        """Tell every other rank what this attempt is about."""
        for rank in self.others:
            self.world.send(rank, Tag.JOB, pack({**values, "place": asdict(self._places[rank])}))

    def start(
        self, work: Work, dispatcher: Dispatcher, own: Progress, events: Events, deadline: Deadline, engine: str
    ) -> None:
        """Tell every other rank to generate, and with what, and scatter their shards; who asks for more is answered."""
        self._work, self._dispatcher, self._events, self._deadline = work, dispatcher, events, deadline
        self.progress = {rank: Progress() for rank in self.others} | {0: own}
        self._next_print = time.monotonic() + self._print_s
        if self.world.size == 1 and sys.stderr.isatty():
            from hpc.report.bar import Bar

            self._bar = Bar()
        for rank in self.others:
            self.world.send(rank, Tag.START, pack({"engine": engine}))
            # Not on demand: rank 0 may be in a long prefill before the first of them could ask.
            self.world.send(rank, Tag.PIECE, dispatcher.next_piece(rank))

    def on_message(self, message: Message) -> None:
        """Deal with a message of a rank."""
        if message.tag == Tag.HELLO:
            self._hellos[message.source] = message.array
        elif message.tag == Tag.ASK and self._dispatcher is not None:
            self.world.send(message.source, Tag.PIECE, self._dispatcher.next_piece(message.source))
        elif message.tag in (Tag.PROGRESS, Tag.DONE):
            self.progress[message.source] = Progress(**unpack(message.array)[0])
            self._check_gpus()
            if message.tag == Tag.DONE:
                self._done.add(message.source)
        elif message.tag == Tag.STOP:
            self.stop.request(f"{unpack(message.array)[0]['reason']} at rank {message.source}")
        else:
            raise ValueError(f"rank {message.source} sent {Tag(message.tag).name}, which rank 0 did not expect")

    def _check_gpus(self) -> None:
        """Raise `RuntimeError` if two ranks of a node compute on one GPU, whatever named it before torch was there."""
        taken: dict[tuple[str, str], int] = {}
        for rank, progress in sorted(self.progress.items()):
            key = self._places[rank].host, progress.gpu
            if progress.gpu and (other := taken.setdefault(key, rank)) != rank:
                raise RuntimeError(
                    f"ranks {other} and {rank} on {key[0]} compute on one GPU, {progress.gpu}; start one rank for each "
                    "GPU of a node, and let it see that alone (CUDA_VISIBLE_DEVICES, or the launcher's binding)"
                )

    def step(self, journal: JournalWriter | None = None) -> bool:
        """Answer what has come in; return whether rank 0 is to stop. Called at every decoding step."""
        self._receive()
        if self.stop.reason and not self._stop_told:
            self._stop_told = True
            for rank in self.others:
                self.world.send(rank, Tag.STOP, pack())
        if journal is not None:
            journal.sync(FSYNC_S)
        if self._dispatcher is not None and self._deadline.passed:
            self._dispatcher.close()
        if self._events is not None:
            self._events.tick("generate", self.progress[0])
        self._print()
        return bool(self.stop.reason)

    def wait_for_others(self) -> None:
        """Go on answering until no rank has anything in flight."""

        def all_done() -> bool:
            self.step()
            return len(self._done) == len(self.others)

        wait_for(all_done)
        if self._bar is not None:
            self._bar.close()
        if self._events is not None:
            self._events.write("generated", asdict(self.progress[0]))

    def requests_left(self) -> int:
        """Return how many of the attempt's requests have not been generated."""
        return self._work.requests - overall(self.progress).requests if self._work else 0

    def ranks_with_records(self) -> list[int]:
        """Return the other ranks that have completions to be gathered."""
        return [rank for rank in self.others if rank in self.progress and self.progress[rank].requests]

    def dismiss(self) -> None:
        """Tell every other rank to leave, and see to it that it is told."""
        self._wait_for_hellos()
        for rank in self.others:
            self.world.send(rank, Tag.BYE, pack())
        self.world.close()

    def _wait_for_hellos(self) -> None:
        def all_here() -> bool:
            self._receive()
            return len(self._hellos) == self.world.size

        wait_for(all_here)

    def _receive(self) -> None:
        for message in self.world.poll():
            self.on_message(message)

    def _print(self) -> None:
        now = time.monotonic()
        if self._work is None:
            return
        if self._bar is not None:
            self._bar.update(self._work, overall(self.progress), self.expected_end)
        elif now >= self._next_print:
            LOGGER.info("%s", describe(self._work, overall(self.progress), time.time(), self.expected_end))
            self._next_print = now + self._print_s
