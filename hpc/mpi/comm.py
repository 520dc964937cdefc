"""Messages between ranks: the `Comm` interface, its version for a single process, and the message format.

No call blocks: a rank that blocks in MPI does not handle signals, and one that spins in it takes the core of a
working rank. A message is a buffer that safetensors serialises from numpy arrays and JSON values.
"""

import json
import os
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from enum import IntEnum
from typing import Any, NoReturn, Protocol

import numpy as np
import numpy.typing as npt
from safetensors import numpy as safetensors

Buffer = npt.NDArray[np.uint8]

LONGEST_SLEEP_S = 0.01
"""Longest sleep of a waiting rank: it answers as fast as that, and takes no core from a working rank."""


class Tag(IntEnum):
    """What a message is about, in the order of a run."""

    HELLO = 1
    """rank -> 0: my host"""
    JOB = 2
    """0 -> rank: the resolved job"""
    BLOCK = 3
    """0 -> rank: corpus lines to check and tokenize"""
    ROWS = 4
    """rank -> 0: a block's rows"""
    START = 5
    """0 -> rank: reading is over; generate, with which engine"""
    ASK = 6
    """rank -> 0: I will soon be idle"""
    PIECE = 7
    """0 -> rank: requests; perhaps the last ones"""
    PROGRESS = 8
    """rank -> 0: how far I am"""
    STOP = 9
    """either way: leave what is in flight"""
    DONE = 10
    """rank -> 0: nothing of mine is in flight any more"""
    PULL = 11
    """0 -> rank: send the next completions"""
    RECORDS = 12
    """rank -> 0: completions in the order of their rows"""
    BYE = 13
    """0 -> rank: leave"""
    QUESTION = 14
    """0 -> rank, of a command that generates nothing, between HELLO and BYE: see `hpc.mpi.ask`"""
    ANSWER = 15
    """rank -> 0: the answer to it"""


@dataclass(frozen=True)
class Message:
    """A complete message."""

    source: int
    tag: int
    array: Buffer


class LostRank(Exception):
    """Messages no longer pass: another rank was killed, or its node or the network is gone. Not a fault of the run."""


class Comm(Protocol):
    """The interface through which ranks exchange messages: MPI's world, or a single process."""

    @property
    def rank(self) -> int:
        """Index of this process."""

    @property
    def size(self) -> int:
        """Number of processes."""

    @property
    def traffic(self) -> tuple[int, int]:
        """Number of messages sent and received so far, and their bytes."""

    def send(self, dest: int, tag: int, array: Buffer) -> None:
        """Start sending a buffer, which must not change afterwards. Never blocks; raises `LostRank`."""

    def poll(self) -> list[Message]:
        """Return the messages received since the last call, in order for each source.

        Never blocks; raises `LostRank`.
        """

    def abort(self, message: str) -> NoReturn:
        """End all ranks at once with exit code 1 and print the reason to stderr."""

    def close(self) -> None:
        """Wait until all sends are complete; raises `LostRank`."""


def pack(values: Mapping[str, Any] | None = None, **arrays: npt.NDArray[Any]) -> Buffer:
    """Serialise JSON `values` and numpy `arrays` into one buffer of bytes."""
    header = np.frombuffer(json.dumps(values or {}).encode(), dtype=np.uint8)
    return np.frombuffer(
        safetensors.save({"": header, **{name: np.array(a, order="C") for name, a in arrays.items()}}), dtype=np.uint8
    )


def unpack(array: Buffer) -> tuple[dict[str, Any], dict[str, npt.NDArray[Any]]]:
    """Undo `pack`."""
    arrays = safetensors.load(array.tobytes())
    return json.loads(arrays.pop("").tobytes()), arrays


def wait_for(condition: Callable[[], bool]) -> None:
    """Call `condition` until it is true; sleep between calls, at first shortly, at most `LONGEST_SLEEP_S`."""
    pause = LONGEST_SLEEP_S / 32
    while not condition():
        time.sleep(pause)
        pause = min(2 * pause, LONGEST_SLEEP_S)


class Single:
    """One process without MPI."""

    rank = 0
    size = 1
    traffic = 0, 0

    def send(self, dest: int, tag: int, array: Buffer) -> None:  # noqa: ARG002  (the signature of Comm)
        """Refuse: there is nobody to send to."""
        raise ValueError(f"message {Tag(tag).name} to rank {dest}: this process is the only one")

    def poll(self) -> list[Message]:
        """Return nothing: nobody sends."""
        return []

    def abort(self, message: str) -> NoReturn:
        """Print the reason and exit with 1."""
        print(message, file=sys.stderr, flush=True)
        os._exit(1)

    def close(self) -> None:
        """Do nothing: nothing was sent."""
