"""A worker: it does what the messages of rank 0 say, until rank 0 says goodbye."""

import logging
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path

from hpc.corpus.tokenize import Checker
from hpc.executor.deadline import Deadline
from hpc.executor.gather import OwnRecords
from hpc.executor.generate import completion_maker, generate_shard
from hpc.executor.heartbeat import Every, Heartbeat
from hpc.executor.read import answer_block
from hpc.executor.scatter import Backlog, piece_bytes
from hpc.job import Job
from hpc.model.loader import Loader
from hpc.mpi.binding import Binding, bind_process, host_info, use_threads
from hpc.mpi.comm import Comm, LostRank, Message, Tag, pack, unpack, wait_for
from hpc.mpi.signals import Stop
from hpc.output.journal import JournalWriter
from hpc.rundir import log
from hpc.rundir.directory import RunDirectory
from hpc.rundir.events import FOLLOW, Events
from hpc.rundir.progress import MESSAGE_S, Progress

LOGGER = logging.getLogger(__name__)


def serve(world: Comm, loader: Loader, stop: Stop) -> int:
    """Serve rank 0 until it says goodbye; return 0, the exit code of every rank above 0."""
    world.send(0, Tag.HELLO, host_info())
    follower = Worker(world, loader, stop)
    try:
        wait_for(follower.take_turn)
    except LostRank:
        raise  # another rank's end, which is no fault of the run
    except Exception:
        follower.note_failure()  # the caller ends all ranks, rank 0 too
        raise
    world.close()
    return 0


@dataclass
class _Assignment:
    """The job and binding that rank 0 sends at the beginning."""

    job: Job
    directory: RunDirectory
    attempt: int
    model_path: Path
    place: Binding
    deadline: Deadline
    events: Events


@dataclass
class Worker:
    """A rank above 0, and its state between two messages."""

    world: Comm
    loader: Loader
    stop: Stop
    records: OwnRecords = field(default_factory=lambda: OwnRecords(Path()))
    clock: float = field(default_factory=time.time)
    """When, in seconds of the clock, it began to wait for rank 0."""
    _assignment: _Assignment | None = None
    _checker: Checker | None = None
    _backlog: Backlog | None = None
    _generated: bool = False
    _stop_told: bool = False
    _left: bool = False

    def take_turn(self) -> bool:
        """Handle the messages that have come, generate if they say so; return whether rank 0 has said goodbye."""
        self.serve()
        if self._backlog is not None and not self._generated:
            self._generated = True
            self._generate(self._backlog)
        return self._left

    def serve(self) -> None:
        """Handle the messages that have come.

        A handler is short: generation begins only after all messages of the batch are handled, since the first piece
        may stand behind START.
        """
        if self.stop.reason and not self._stop_told:
            self._stop_told = True
            self.world.send(0, Tag.STOP, pack({"reason": self.stop.reason}))
        for message in self.world.poll():
            self._actions[message.tag](message)

    def note_failure(self) -> None:
        """Set the state of the run to failed, if rank 0 has sent the run directory."""
        if self._assignment is not None:
            self._assignment.directory.set_failed()

    @property
    def _actions(self) -> dict[int, Callable[[Message], None]]:
        return {
            Tag.JOB: self._begin,
            Tag.BLOCK: self._read,
            Tag.START: self._begin_generating,
            Tag.PIECE: self._add_piece,
            Tag.STOP: lambda message: self._be_stopped(),
            Tag.PULL: lambda message: self._send_records(),
            Tag.BYE: lambda message: self._leave(),
        }

    @property
    def assignment(self) -> _Assignment:
        """The job and binding of this rank; raise `ValueError` if rank 0 has not sent them first."""
        if self._assignment is None:
            raise ValueError("rank 0 sent work before it sent the job")
        return self._assignment

    def _begin(self, message: Message) -> None:
        values, _ = unpack(message.array)
        directory = RunDirectory(Path(values["run"]))
        self._assignment = _Assignment(
            Job.from_json(values["job"]),
            directory,
            values["attempt"],
            Path(values["model_path"]),
            Binding(**values["place"]),
            Deadline(values["seconds_left"]),
            Events(directory.events(values["attempt"], self.world.rank)),
        )
        self.assignment.events.span(FOLLOW, self.clock)
        bind_process(self.assignment.place)  # before anything needs torch
        log.configure(
            self.world.rank, self.world.size, self.assignment.directory.log(values["attempt"], self.world.rank)
        )
        LOGGER.info("%s", self.assignment.place)

    def _read(self, message: Message) -> None:
        if self._checker is None:
            given = self.assignment
            use_threads(given.place.threads)
            given.events.span("import")
            self._checker = self.loader.checker(given.job, given.model_path)
            given.events.span(FOLLOW)
        answer_block(self.world, message, self._checker.check_block)

    def _add_piece(self, message: Message) -> None:
        if self._backlog is None:
            raise ValueError("rank 0 sent requests before it said start")
        self._backlog.add(message.array)

    def _send_records(self) -> None:
        self.world.send(0, Tag.RECORDS, self.records.next_piece(piece_bytes(self.world.size)))

    def _begin_generating(self, message: Message) -> None:
        given, engine = self.assignment, unpack(message.array)[0]["engine"]
        given.job = replace(given.job, engine=engine)  # decided since, for the plan
        defaults = given.job.sampling
        self._backlog = Backlog(
            defaults,
            lambda: self.world.send(0, Tag.ASK, pack()),
            expecting=True,
            deadline=given.deadline,
            on_wait=given.events.wait,
        )

    def _generate(self, backlog: Backlog) -> None:
        given, rank = self.assignment, self.world.rank
        progress, began, events = Progress(), time.monotonic(), given.events
        events.span("load")
        replica = self.loader.load(given.job, given.model_path, given.place)
        progress.load_s, progress.gpu = time.monotonic() - began, replica.gpu
        progress.engine = replica.engine_name or given.job.engine
        path = given.directory.journal(given.attempt, rank)
        self.records, journal = OwnRecords(path), JournalWriter(path)
        events.within(replica.spent)

        def report() -> None:
            self.world.send(0, Tag.PROGRESS, pack(progress.as_json()))

        beat = Heartbeat(self.stop, self.serve, journal, events, progress, Every(MESSAGE_S, report))
        finish = completion_maker(replica.eos_token_ids, replica.decode, replica.goes_on)
        events.span("generate")
        generate_shard(replica.engine, backlog, journal, self.records, progress, beat, finish)
        events.span(FOLLOW)
        events.write("generated", progress.as_json())
        self.world.send(0, Tag.DONE, pack(progress.as_json()))

    def _be_stopped(self) -> None:
        self._stop_told = True  # rank 0 knows
        self.stop.request("rank 0 said stop")

    def _leave(self) -> None:
        if self._assignment is not None:
            self._assignment.events.close()
        self._left = True
