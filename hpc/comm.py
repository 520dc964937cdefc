"""Messages between ranks: the only place that knows MPI, and one that can do without it.

Nothing here ever blocks: a rank that blocks in MPI is deaf to signals, and one that spins in it
steals the core of a rank that works. Messages are buffers: a dictionary of numpy arrays and JSON
values, serialised by safetensors.
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

from hpc.job import Refusal

Buffer = npt.NDArray[np.uint8]

LONGEST_SLEEP_S = 0.01
"""A waiting rank looks for messages at least this often."""


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


@dataclass(frozen=True)
class Message:
    """A message that has come in whole."""

    source: int
    tag: int
    array: Buffer


class Comm(Protocol):
    """How the ranks of a run talk: MPI's world, or a single process."""

    @property
    def rank(self) -> int:
        """Index of this process."""

    @property
    def size(self) -> int:
        """Number of processes."""

    @property
    def traffic(self) -> tuple[int, int]:
        """Messages so far, sent and received, and their bytes."""

    def send(self, dest: int, tag: int, array: Buffer) -> None:
        """Begin to send bytes; they must not be changed afterwards. Never blocks."""

    def poll(self) -> list[Message]:
        """Return what has come in since the last call, in order for each source. Never blocks."""

    def abort(self, message: str) -> NoReturn:
        """End all ranks at once with exit code 1, saying why on stderr."""

    def close(self) -> None:
        """Wait until everything sent has left this process."""


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
    """Call `condition` until it is true, sleeping a little longer each time, `LONGEST_SLEEP_S` at most."""
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
        """Say why, and exit with 1."""
        print(message, file=sys.stderr, flush=True)
        os._exit(1)

    def close(self) -> None:
        """Do nothing: nothing was sent."""


class World:
    """MPI's COMM_WORLD, used with non-blocking, matched calls alone."""

    def __init__(self, mpi: Any) -> None:
        self._mpi = mpi
        self._world = mpi.COMM_WORLD
        self.rank: int = self._world.Get_rank()
        self.size: int = self._world.Get_size()
        self.traffic = 0, 0
        self._sending: list[tuple[Any, Buffer]] = []
        self._receiving: list[tuple[Any, Message]] = []

    def send(self, dest: int, tag: int, array: Buffer) -> None:
        """Begin to send bytes, kept alive here until they have left."""
        request = self._world.Isend([array, self._mpi.BYTE], dest, tag)
        self._sending.append((request, array))
        self._count(array)

    def poll(self) -> list[Message]:
        """Make progress, and return the messages that are complete."""
        self._sending = [entry for entry in self._sending if not entry[0].Test()]
        status = self._mpi.Status()
        # A matched probe and a non-blocking receive: a plain Recv of a large message would block
        # until its sender next enters MPI, which may be after a long step of the model.
        while (matched := self._world.Improbe(self._mpi.ANY_SOURCE, self._mpi.ANY_TAG, status)) is not None:
            array = np.empty(status.Get_count(self._mpi.BYTE), dtype=np.uint8)
            message = Message(status.Get_source(), status.Get_tag(), array)
            self._receiving.append((matched.Irecv([array, self._mpi.BYTE]), message))
        ready, waiting, behind = [], [], set()
        for request, message in self._receiving:
            # A small message must not overtake a large one from the same rank.
            if message.source not in behind and request.Test():
                ready.append(message)
                self._count(message.array)
            else:
                behind.add(message.source)
                waiting.append((request, message))
        self._receiving = waiting
        return ready

    def _count(self, array: Buffer) -> None:
        messages, size = self.traffic
        self.traffic = messages + 1, size + array.nbytes

    def abort(self, message: str) -> NoReturn:
        """Say why, and end every rank: left to itself, the others would wait for this one for ever."""
        print(message, file=sys.stderr, flush=True)
        # A launcher that is told of the abort may drop what it has not forwarded yet: once in 12 runs of MPICH.
        time.sleep(0.3)
        self._world.Abort(1)
        os._exit(1)

    def close(self) -> None:
        """Wait for the sends, so that MPI's Finalize has nothing to wait for."""

        def all_sent() -> bool:
            self._sending = [entry for entry in self._sending if not entry[0].Test()]
            return not self._sending

        wait_for(all_sent)


# For each launcher: how many processes it says it started, and which of them this is.
_LAUNCHERS = {
    "MPICH or Intel MPI (mpirun, srun --mpi=pmi2)": ("PMI_SIZE", "PMI_RANK"),
    "Open MPI (mpirun)": ("OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_RANK"),
    "Slurm (srun)": ("SLURM_STEP_NUM_TASKS", "SLURM_PROCID"),
}


def launched_rank() -> int:
    """Return the rank that the launcher gave this process, known before MPI is up; 0 without one."""
    for _, rank_variable in _LAUNCHERS.values():
        if os.environ.get(rank_variable, "").isdigit():
            return int(os.environ[rank_variable])
    return 0


def connect() -> Comm:
    """Return the world this process was started in; a single process where there is no MPI.

    Raises `Refusal` where a launcher started several processes that do not form one world: each of
    them would do all of the work.
    """
    why_no_mpi = ""
    comm: Comm = Single()
    try:
        import mpi4py

        mpi4py.rc.thread_level = "funneled"
        from mpi4py import MPI

        comm = World(MPI)
    except (ImportError, RuntimeError) as error:  # mpi4py raises RuntimeError where no libmpi is found
        why_no_mpi = (str(error) or type(error).__name__).splitlines()[0]
    check_world(comm.size, os.environ, library(), why_no_mpi)
    return comm


def library() -> str:
    """Return what the MPI library of this process calls itself; "none" where it does without one."""
    mpi = sys.modules.get("mpi4py.MPI")
    return "none" if mpi is None else " ".join(mpi.Get_library_version().splitlines()[0].strip("\0 ").split())


def alone() -> Comm:
    """Return a single process that does not touch MPI; raise `Refusal` where a launcher started several."""
    check_world(1, os.environ, "none: a share is generated by one process")
    return Single()


def check_world(size: int, environment: Mapping[str, str], library: str, why_no_mpi: str = "") -> None:
    """Raise `Refusal` if a launcher's variables in `environment` speak of more processes than `size`."""
    for launcher, (size_variable, _) in _LAUNCHERS.items():
        started = environment.get(size_variable, "")
        if size == 1 and started.isdigit() and int(started) > 1:
            found = f"no MPI library could be loaded ({why_no_mpi})" if why_no_mpi else f"the MPI library is {library}"
            raise Refusal(
                f"{launcher} started {started} processes ({size_variable}={started}), but each of them is alone: "
                f"{found}. Start them with the mpirun of that library "
                "(`python -m pip install mpich` brings one), or under srun name its type: "
                "--mpi=pmi2 for MPICH and Intel MPI, --mpi=pmix for Open MPI."
            )
