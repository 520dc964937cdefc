"""Ask all ranks and gather their answers, for commands that generate nothing (doctor, calibrate)."""

import time
from collections.abc import Callable, Mapping
from typing import Any

from hpc.mpi.comm import Buffer, Comm, Message, Tag, pack, unpack, wait_for


class Inquiry:
    """Rank 0's side: the greetings of the other ranks, and their answers to its latest question.

    Only the methods named wait_… wait, so that the caller can name a rank that does not answer.
    """

    def __init__(self, world: Comm) -> None:
        self._world = world
        self.others = range(1, world.size)
        self.hellos: dict[int, Buffer] = {}
        """The greetings of the others, by rank."""
        self.answers: dict[int, Buffer] = {}
        """What the others have answered to the latest question, by rank."""

    def ask(self, question: Callable[[int], Mapping[str, Any]]) -> None:
        """Ask every other rank a question of its own."""
        self.answers.clear()
        for rank in self.others:
            self._world.send(rank, Tag.QUESTION, pack(question(rank)))

    def receive(self) -> list[Message]:
        """Receive the messages that have arrived; return the answers among them."""
        answers = []
        for message in self._world.poll():
            if message.tag == Tag.HELLO:
                self.hellos[message.source] = message.array
            elif message.tag == Tag.ANSWER:
                self.answers[message.source] = message.array
                answers.append(message)
            else:
                raise ValueError(f"rank {message.source} sent {Tag(message.tag).name}, which is no answer")
        return answers

    def wait_for_hellos(self) -> list[Buffer]:
        """Wait for the greetings of all other ranks; return them in rank order."""
        return self._wait(self.hellos)

    def wait_for_answers(self) -> list[Buffer]:
        """Wait for the answers of all other ranks; return them in rank order."""
        return self._wait(self.answers)

    def _wait(self, found: Mapping[int, Buffer]) -> list[Buffer]:
        def all_here() -> bool:
            self.receive()
            return len(found) == len(self.others)

        wait_for(all_here)
        return [found[rank] for rank in self.others]

    def dismiss(self) -> None:
        """Tell every other rank to leave."""
        for rank in self.others:
            self._world.send(rank, Tag.BYE, pack())


def answer(
    world: Comm, hello: Buffer, reply: Callable[[dict[str, Any]], Buffer], patience_s: float = float("inf")
) -> bool:
    """Greet rank 0 and `reply` to its questions until it says goodbye; return False if that takes too long."""
    until, left = time.monotonic() + patience_s, False
    world.send(0, Tag.HELLO, hello)

    def take_turn() -> bool:
        nonlocal left
        for message in world.poll():
            if message.tag == Tag.QUESTION:
                world.send(0, Tag.ANSWER, reply(unpack(message.array)[0]))
            left = left or message.tag == Tag.BYE
        return left or time.monotonic() > until

    wait_for(take_turn)
    return left
