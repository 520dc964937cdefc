"""Read: rank 0 cuts the corpus into blocks, all ranks check and tokenize them, rank 0 writes the token store."""

import time
from collections.abc import Callable, Iterable
from dataclasses import asdict

import numpy as np

from hpc.comm import LONGEST_SLEEP_S, Buffer, Comm, Message, Tag, pack, unpack
from hpc.corpus import Block
from hpc.stop import Stop
from hpc.store import Arrays

BLOCK_BYTES = 1 << 18
"""Long enough that a message costs nothing beside its tokenization, short enough that rank 0 answers."""

AHEAD = 2
"""Blocks that a rank has before it: one to work on, one to go on with."""

CheckBlock = Callable[[Block], Arrays]


def lead(
    comm: Comm,
    blocks: Iterable[Block],
    check_block: CheckBlock,
    append: Callable[[Block, Arrays], None],
    stop: Stop,
    on_message: Callable[[Message], None],
) -> None:
    """Have all blocks checked, and `append` them in their order; return early when told to stop.

    `on_message` gets what is not about rows. The blocks in hand are bounded, however slow one rank is.
    """
    source = iter(blocks)
    given: dict[int, Block] = {}
    answers: dict[int, Arrays] = {}
    waiting = [0] * comm.size
    next_given = next_written = 0
    drained = False

    def take() -> Block | None:
        nonlocal next_given, drained
        if drained or len(given) >= 2 * AHEAD * comm.size:
            return None
        block = next(source, None)
        if block is None:
            drained = True
            return None
        given[next_given] = block
        next_given += 1
        return block

    def advance() -> bool:
        """Do what can be done now; say whether that was anything."""
        nonlocal next_written
        before = (next_given, next_written)
        for message in comm.poll():
            if message.tag == Tag.ROWS:
                values, rows = unpack(message.array)
                answers[values["number"]] = rows
                waiting[message.source] -= 1
            else:
                on_message(message)
        for rank in range(1, comm.size):
            while waiting[rank] < AHEAD and (block := take()) is not None:
                comm.send(rank, Tag.BLOCK, _pack_block(next_given - 1, block))
                waiting[rank] += 1
        if (block := take()) is not None:
            number = next_given - 1
            answers[number] = check_block(block)
        while next_written in answers:
            append(given.pop(next_written), answers.pop(next_written))
            next_written += 1
        return (next_given, next_written) != before

    while not (stop.reason or (drained and not given)):
        if not advance():
            time.sleep(LONGEST_SLEEP_S / 4)


def answer(comm: Comm, message: Message, check_block: CheckBlock) -> None:
    """Check the block that rank 0 has sent, and send back its rows."""
    values, arrays = unpack(message.array)
    number = values.pop("number")
    rows = check_block(Block(**values, data=arrays["data"].tobytes()))
    comm.send(0, Tag.ROWS, pack({"number": number}, **rows))


def _pack_block(number: int, block: Block) -> Buffer:
    values = asdict(block)
    data = values.pop("data")
    return pack({"number": number, **values}, data=np.frombuffer(data, dtype=np.uint8))
