"""What a rank does with the messages of rank 0, however they come."""

from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import NoReturn

import numpy as np

from hpc.comm import Buffer, Message, Tag, pack, unpack
from hpc.follow import follow
from hpc.job import Job, SamplingParams
from hpc.place import Place
from hpc.plan import Arrangement
from hpc.rundir import RunDirectory
from hpc.scatter import Dispatcher
from hpc.shard import Plan
from hpc.stop import Stop
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
    arranged = Arrangement(np.array([3]), np.array([0]), np.array([-1]), np.array([1.0]), 0.0, Plan((none, rows), none))
    dispatcher = Dispatcher(store, rows, {}, arranged, 1 << 20)
    introduction = pack(
        {
            "job": asdict(job),
            "run": str(directory.path),
            "attempt": 1,
            "model_path": "echo",
            "file_names": ["c.jsonl"],
            "place": asdict(Place("here", 0, 1)),
            "seconds_left": None,
        }
    )
    together = [
        from_rank_0(Tag.JOB, introduction),
        from_rank_0(Tag.START, pack({"engine": "native"})),
        from_rank_0(Tag.PIECE, dispatcher.next_piece(1)),
    ]
    world = ScriptedWorld([together], lambda tag: [from_rank_0(Tag.BYE)] if tag == Tag.DONE else [])
    assert follow(world, EchoLoader(), Stop()) == 0
    [done] = [unpack(array)[0] for tag, array in world.sent if tag == Tag.DONE]
    assert done["generated_tokens"] == 5
