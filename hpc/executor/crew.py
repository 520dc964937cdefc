"""Rank 0 and its workers: greet them, place them, send them the job, pass on a stop, dismiss them."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from typing import Any

from hpc.job import Job
from hpc.mpi.binding import Binding, bind_ranks, host_info
from hpc.mpi.comm import Buffer, Comm, Message, Tag, pack, unpack, wait_for
from hpc.mpi.signals import Stop


class Crew:
    """All ranks of a run, from their greeting to their leaving; `hpc.executor.root.Generation` has them generate.

    A process without others is a crew of one.
    """

    def __init__(self, world: Comm, stop: Stop) -> None:
        self.world = world
        self.stop = stop
        self._hellos: dict[int, Buffer] = {0: host_info()}
        self._stop_told = False

    @property
    def others(self) -> range:
        """All ranks but this one."""
        return range(1, self.world.size)

    def place_ranks(self, job: Job) -> tuple[Binding, ...]:
        """Wait for the greeting of every rank; return the binding of each, that of rank 0 first."""
        self._wait_for_hellos(self.on_message)
        hellos = [self._hellos[rank] for rank in range(self.world.size)]
        return tuple(bind_ranks(hellos, job.device != "cpu", job.replica_gpus))

    def introduce(self, values: Mapping[str, Any], places: Sequence[Binding]) -> None:
        """Send every other rank the values of this attempt, and its binding."""
        for rank in self.others:
            self.world.send(rank, Tag.JOB, pack({**values, "place": asdict(places[rank])}))

    def on_message(self, message: Message) -> None:
        """Handle a message that may come at any time: a greeting, or a stop."""
        if message.tag == Tag.HELLO:
            self._hellos[message.source] = message.array
        elif message.tag == Tag.STOP:
            self.stop.request(f"{unpack(message.array)[0]['reason']} at rank {message.source}")
        else:
            raise ValueError(f"rank {message.source} sent {Tag(message.tag).name}, which rank 0 did not expect")

    def receive(self, on_message: Callable[[Message], None]) -> None:
        """Give all messages that have come to `on_message`; tell the others if all are to stop."""
        for message in self.world.poll():
            on_message(message)
        if self.stop.reason and not self._stop_told:
            self._stop_told = True
            for rank in self.others:
                self.world.send(rank, Tag.STOP, pack())

    def step(self) -> bool:
        """Handle all messages that have come; return whether all are to stop."""
        self.receive(self.on_message)
        return bool(self.stop.reason)

    def dismiss(self) -> None:
        """Tell every other rank to leave, and wait until the messages have been sent."""

        def greet_alone(message: Message) -> None:
            if message.tag == Tag.HELLO:
                self.on_message(message)

        self._wait_for_hellos(greet_alone)
        for rank in self.others:
            self.world.send(rank, Tag.BYE, pack())
        self.world.close()

    def _wait_for_hellos(self, on_message: Callable[[Message], None]) -> None:
        def all_here() -> bool:
            for message in self.world.poll():
                on_message(message)
            return len(self._hellos) == self.world.size

        wait_for(all_here)
