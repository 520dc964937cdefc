"""Rank 0's side of generating: scatter requests over the ranks, this one too, until nothing is in flight."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from hpc.executor.crew import Crew
from hpc.executor.deadline import Deadline
from hpc.executor.gather import OwnRecords
from hpc.executor.heartbeat import Heartbeat
from hpc.executor.scatter import Dispatcher
from hpc.mpi.binding import Binding
from hpc.mpi.comm import Message, Tag, pack, unpack, wait_for
from hpc.output.journal import JournalWriter
from hpc.rundir.events import Events
from hpc.rundir.progress import Progress, Work, overall


class Display(Protocol):
    """Shows to whoever started a run how far it is."""

    def update(self, work: Work, ranks: Mapping[int, Progress], expected_end: float | None) -> None:
        """Show it, if it is time; called at every step. `expected_end`, as predicted, is in seconds of the clock."""

    def close(self) -> None:
        """Leave the terminal to others."""


@dataclass(frozen=True)
class Generated:
    """What an attempt has generated: nothing, where it was stopped before or nothing was left."""

    own: OwnRecords
    """This rank's."""
    progress: Mapping[int, Progress] = field(default_factory=dict)
    """Of every rank, if any was told to generate."""

    @property
    def total(self) -> Progress:
        """The counts of all ranks."""
        return overall(self.progress)

    def others_with_records(self) -> list[int]:
        """Return the other ranks that have completions to be gathered."""
        return [rank for rank, progress in sorted(self.progress.items()) if rank and progress.requests]


class Generation:
    """Generating on all ranks, as rank 0 leads it: who gets which requests, how far each rank is."""

    def __init__(
        self,
        crew: Crew,
        places: Sequence[Binding],
        work: Work,
        dispatcher: Dispatcher,
        events: Events,
        deadline: Deadline,
        display: Display,
    ) -> None:
        self._crew, self._places, self._work, self._dispatcher = crew, places, work, dispatcher
        self._events, self._deadline, self._display = events, deadline, display
        self.own = Progress()
        """Rank 0's."""
        self.progress = {rank: Progress() for rank in crew.others} | {0: self.own}
        self.expected_end: float | None = None
        """When, in seconds of the clock, all should be over, as predicted; None where nothing is known of it."""
        self._done: set[int] = set()

    def start(self, engine: str) -> None:
        """Tell every other rank to generate, and with what, and scatter their shards; who asks for more is answered."""
        for rank in self._crew.others:
            self._crew.world.send(rank, Tag.START, pack({"engine": engine}))
            # Not on demand: rank 0 may be in a long prefill before the first of them could ask.
            self._crew.world.send(rank, Tag.PIECE, self._dispatcher.next_piece(rank))

    def heartbeat(self, journal: JournalWriter) -> Heartbeat:
        """Return what rank 0 does at each step of its engine, and while it waits for the others."""
        return Heartbeat(self._crew.stop, self._serve, journal, self._events, self.own, self._show)

    def wait_for_others(self, beat: Heartbeat) -> None:
        """Go on answering until no rank has anything in flight."""

        def all_done() -> bool:
            beat()
            return len(self._done) == len(self._crew.others)

        wait_for(all_done)
        self._display.close()
        self._events.write("generated", self.own.as_json())

    def on_message(self, message: Message) -> None:
        """Deal with a message of a rank."""
        if message.tag == Tag.ASK:
            self._crew.world.send(message.source, Tag.PIECE, self._dispatcher.next_piece(message.source))
        elif message.tag in (Tag.PROGRESS, Tag.DONE):
            self.progress[message.source] = Progress.from_json(unpack(message.array)[0])
            self._check_gpus()
            if message.tag == Tag.DONE:
                self._done.add(message.source)
        else:
            self._crew.on_message(message)

    def _serve(self) -> None:
        self._crew.receive(self.on_message)
        if self._deadline.passed:
            self._dispatcher.close()

    def _show(self) -> None:
        self._display.update(self._work, self.progress, self.expected_end)

    def _check_gpus(self) -> None:
        """Raise `RuntimeError` if two ranks of a node compute on one GPU, whatever named it before torch was there."""
        taken: dict[tuple[str, str], int] = {}
        for rank, progress in sorted(self.progress.items()):
            host = self._places[rank].host
            for gpu in filter(None, progress.gpu.split(",")):
                if (other := taken.setdefault((host, gpu), rank)) != rank:
                    raise RuntimeError(
                        f"ranks {other} and {rank} on {host} compute on one GPU, {gpu}; start one rank for each GPU of "
                        "a node, or for --replica-gpus of them, and let it see these alone (CUDA_VISIBLE_DEVICES, or "
                        "the launcher's binding)"
                    )
