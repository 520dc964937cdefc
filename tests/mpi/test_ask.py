"""Rank 0 asks all ranks, and they answer; nothing waits but what says so."""

from typing import NoReturn

import pytest

from hpc.mpi.ask import Inquiry, answer
from hpc.mpi.comm import Buffer, Message, Single, Tag, pack, unpack


class Scripted:
    """A rank of three: has some messages, and keeps what is sent."""

    size, traffic = 3, (0, 0)

    def __init__(self, rank: int, *messages: Message) -> None:
        self.rank = rank
        self._messages = list(messages)
        self.sent: list[tuple[int, int, dict[str, object]]] = []

    def send(self, dest: int, tag: int, array: Buffer) -> None:
        self.sent.append((dest, tag, unpack(array)[0]))

    def poll(self) -> list[Message]:
        """Return one message at a time, as they may come."""
        return [self._messages.pop(0)] if self._messages else []

    def abort(self, message: str) -> NoReturn:
        raise AssertionError(message)

    def close(self) -> None:
        pass


def said(rank: int, tag: Tag, value: int) -> Message:
    return Message(rank, tag, pack({"value": value}))


def values(buffers: list[Buffer]) -> list[int]:
    return [unpack(buffer)[0]["value"] for buffer in buffers]


def test_every_other_rank_is_asked_a_question_of_its_own() -> None:
    world = Scripted(0)
    Inquiry(world).ask(lambda rank: {"rank": rank})
    assert world.sent == [(1, Tag.QUESTION, {"rank": 1}), (2, Tag.QUESTION, {"rank": 2})]


def test_answers_come_in_the_order_of_the_ranks_whoever_was_first() -> None:
    inquiry = Inquiry(Scripted(0, said(2, Tag.ANSWER, 20), said(1, Tag.ANSWER, 10)))
    assert values(inquiry.wait_for_answers()) == [10, 20]


def test_a_greeting_that_comes_late_is_no_answer() -> None:
    inquiry = Inquiry(
        Scripted(0, said(1, Tag.HELLO, 1), said(1, Tag.ANSWER, 10), said(2, Tag.HELLO, 2), said(2, Tag.ANSWER, 20))
    )
    assert (values(inquiry.wait_for_answers()), values(inquiry.wait_for_hellos())) == ([10, 20], [1, 2])


def test_the_answers_to_one_question_are_not_those_to_the_next() -> None:
    inquiry = Inquiry(Scripted(0, *(said(rank, Tag.ANSWER, value) for value in (1, 2) for rank in (1, 2))))
    found = []
    for _ in range(2):
        inquiry.ask(lambda _: {})
        found.append(values(inquiry.wait_for_answers()))
    assert found == [[1, 1], [2, 2]]


def test_looking_for_answers_does_not_wait_for_them() -> None:
    inquiry = Inquiry(Scripted(0, said(2, Tag.ANSWER, 20)))
    assert [len(inquiry.receive()), len(inquiry.receive()), list(inquiry.answers)] == [1, 0, [2]]


def test_what_is_no_answer_is_a_fault_that_names_it() -> None:
    with pytest.raises(ValueError, match="rank 1 sent ROWS, which is no answer"):
        Inquiry(Scripted(0, said(1, Tag.ROWS, 1))).receive()


def test_a_process_without_others_waits_for_nobody() -> None:
    assert Inquiry(Single()).wait_for_answers() == []


def test_a_rank_greets_answers_and_leaves_when_it_is_told_to() -> None:
    world = Scripted(1, said(0, Tag.QUESTION, 3), Message(0, Tag.BYE, pack()))
    assert answer(world, pack(), lambda question: pack({"value": question["value"] + 1}))
    assert world.sent == [(0, Tag.HELLO, {}), (0, Tag.ANSWER, {"value": 4})]


def test_a_rank_that_hears_nothing_gives_up_after_its_patience() -> None:
    assert not answer(Scripted(1), pack(), lambda _: pack(), patience_s=0.05)
