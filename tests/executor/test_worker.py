"""What a rank does with the messages of rank 0, however they come."""

from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import NoReturn

import numpy as np

from hpc.executor.scatter import Dispatcher
from hpc.executor.worker import serve
from hpc.job import Job
from hpc.mpi.binding import Binding
from hpc.mpi.comm import Buffer, Message, Tag, pack, unpack
from hpc.mpi.signals import Stop
from hpc.plan.arrange import Plan
from hpc.plan.shard import Deal
from hpc.rundir.directory import RunDirectory
from hpc.sampling_params import SamplingParams
from tests.conftest import write_corpus
from tests.fakes import EchoLoader
from tests.stores import read_store


class ScriptedWorld:
    """Rank 1 of 2: delivers batches of messages as a script says, and keeps what is sent."""

    rank, size = 1, 2

    def __init__(self, batches: list[list[Message]], answer: Callable[[int], list[Message]]) -> None:
        self._batches = batches
        self._answer = answer
        self.sent: list[tuple[int, Buffer]] = []

    def send(self, dest: int, tag: int, array: Buffer) -> None:
        self.sent.append((tag, array))
        self._batches.append(self._answer(tag))

    def poll(self) -> list[Message]:
        return self._batches.pop(0) if self._batches else []

    def abort(self, message: str) -> NoReturn:
        raise AssertionError(message)

    def close(self) -> None:
        pass


def from_rank_0(tag: Tag, array: Buffer | None = None) -> Message:
    return Message(0, tag, pack() if array is None else array)


def test_a_piece_that_comes_together_with_the_start_is_generated(tmp_path: Path) -> None:
    corpus = write_corpus(tmp_path / "c.jsonl", [{"prompt": "abc"}])
    job = Job(model="echo", corpus=(str(corpus),), runs=str(tmp_path), sampling=SamplingParams(max_new_tokens=5))
    directory = RunDirectory(tmp_path / "run")
    directory.create()
    store = read_store(tmp_path, [corpus], job.sampling)
    rows, none = np.array([0]), np.empty(0, dtype=np.int64)
    arranged = Plan(np.array([3]), np.array([0]), np.array([-1]), np.array([1.0]), 0.0, Deal((none, rows), none))
    dispatcher = Dispatcher(store, rows, {}, arranged, 1 << 20)
    introduction = pack(
        {
            "job": asdict(job),
            "run": str(directory.path),
            "attempt": 1,
            "model_path": "echo",
            "place": asdict(Binding("here", 0, 1)),
            "seconds_left": None,
        }
    )
    together = [
        from_rank_0(Tag.JOB, introduction),
        from_rank_0(Tag.START, pack({"engine": "native"})),
        from_rank_0(Tag.PIECE, dispatcher.next_piece(1)),
    ]
    world = ScriptedWorld([together], lambda tag: [from_rank_0(Tag.BYE)] if tag == Tag.DONE else [])
    assert serve(world, EchoLoader(), Stop()) == 0
    [done] = [unpack(array)[0] for tag, array in world.sent if tag == Tag.DONE]
    assert done["generated_tokens"] == 5
