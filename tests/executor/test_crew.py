"""Rank 0 greets the other ranks, tells them to stop once, and dismisses them whatever they are at."""

from typing import NoReturn

import pytest

from hpc.executor.crew import Crew
from hpc.job import Job
from hpc.mpi.binding import host_info
from hpc.mpi.comm import Buffer, Message, Single, Tag, pack
from hpc.mpi.signals import Stop
from hpc.rundir.progress import Progress


class TwoRanks:
    """Rank 0 of 2: has the messages of the other one, and keeps what is sent to it."""

    rank, size, traffic = 0, 2, (0, 0)

    def __init__(self, *messages: tuple[Tag, Buffer]) -> None:
        self._messages = [Message(1, tag, array) for tag, array in messages]
        self.sent: list[tuple[int, int]] = []

    def send(self, dest: int, tag: int, array: Buffer) -> None:
        self.sent.append((dest, tag))

    def poll(self) -> list[Message]:
        messages, self._messages = self._messages, []
        return messages

    def abort(self, message: str) -> NoReturn:
        raise AssertionError(message)

    def close(self) -> None:
        pass


JOB = Job("m", ("c",), device="cpu")
PROGRESS = (Tag.PROGRESS, pack(Progress().as_json()))


def test_every_rank_that_has_greeted_gets_a_place() -> None:
    places = Crew(TwoRanks((Tag.HELLO, host_info())), Stop()).place_ranks(JOB)
    assert [place.local_rank for place in places] == [0, 1]


def test_a_process_without_others_has_a_crew_of_one() -> None:
    crew = Crew(Single(), Stop())
    assert (len(crew.place_ranks(JOB)), crew.step()) == (1, False)


def test_the_other_ranks_are_told_once_that_all_are_to_stop() -> None:
    world, stop = TwoRanks(), Stop()
    crew = Crew(world, stop)
    stop.request("enough")
    assert [crew.step(), crew.step(), world.sent] == [True, True, [(1, Tag.STOP)]]


def test_a_stop_at_another_rank_stops_rank_0_and_names_that_rank() -> None:
    stop = Stop()
    Crew(TwoRanks((Tag.STOP, pack({"reason": "signal SIGTERM"}))), stop).step()
    assert stop.reason == "signal SIGTERM at rank 1"


def test_progress_before_there_is_anything_to_generate_is_a_fault() -> None:
    with pytest.raises(ValueError, match="rank 1 sent PROGRESS, which rank 0 did not expect"):
        Crew(TwoRanks(PROGRESS), Stop()).step()


def test_ranks_are_dismissed_in_the_middle_of_generating_too() -> None:
    world = TwoRanks((Tag.HELLO, host_info()), PROGRESS)
    Crew(world, Stop()).dismiss()
    assert world.sent == [(1, Tag.BYE)]
