"""Rank 0 leads generation: it scatters requests over all ranks, itself too, until nothing is in flight."""

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
    """Shows the progress of a run to the person who started it."""

    def update(self, work: Work, ranks: Mapping[int, Progress], expected_end: float | None) -> None:
        """Show the progress if it is time; called at every step. `expected_end` is a prediction, in clock seconds."""

    def close(self) -> None:
        """Leave the terminal to others."""


@dataclass(frozen=True)
class Generated:
    """The records and progress of an attempt; empty if it was stopped before it began, or had nothing to do."""

    own: OwnRecords
    """The records of this rank."""
    progress: Mapping[int, Progress] = field(default_factory=dict)
    """Of every rank; empty if none was told to generate."""

    @property
    def total(self) -> Progress:
        """The counts of all ranks."""
        return overall(self.progress)

    def others_with_records(self) -> list[int]:
        """Return the other ranks that have completions to be gathered."""
        return [rank for rank, progress in sorted(self.progress.items()) if rank and progress.requests]


class Generation:
    """Generation on all ranks, led by rank 0: it hands out requests and collects the progress of each rank."""

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
        """The progress of rank 0."""
        self.progress = {rank: Progress() for rank in crew.others} | {0: self.own}
        self.expected_end: float | None = None
        """Predicted end of generation, in seconds of the clock; None without a calibration."""
        self._done: set[int] = set()

    def start(self, engine: str) -> None:
        """Tell every other rank to generate with this engine, and send it the first piece of its shard."""
        for rank in self._crew.others:
            self._crew.world.send(rank, Tag.START, pack({"engine": engine}))
            # Not on demand: rank 0 may be in a long prefill before the first of them could ask.
            self._crew.world.send(rank, Tag.PIECE, self._dispatcher.next_piece(rank))

    def heartbeat(self, journal: JournalWriter) -> Heartbeat:
        """Return the heartbeat of rank 0, for the steps of its engine and while it waits for the others."""
        return Heartbeat(self._crew.stop, self._serve, journal, self._events, self.own, self._show)

    def wait_for_others(self, beat: Heartbeat) -> None:
        """Answer messages until no rank has anything in flight."""

        def all_done() -> bool:
            beat()
            return len(self._done) == len(self._crew.others)

        wait_for(all_done)
        self._display.close()
        self._events.write("generated", self.own.as_json())

    def on_message(self, message: Message) -> None:
        """Handle a message of a rank."""
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
        """Raise `RuntimeError` if two ranks of a node compute on one GPU, by the UUIDs that torch reports."""
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
