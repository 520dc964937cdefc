"""Implement `Comm` with MPI, and find out which launcher started this process. Only this module imports mpi4py."""

import contextlib
import os
import sys
import time
from collections.abc import Iterator, Mapping
from typing import Any, NoReturn

import numpy as np

from hpc.exit import Refusal
from hpc.mpi.comm import Buffer, Comm, LostRank, Message, Single, wait_for


class World:
    """MPI's COMM_WORLD, used through non-blocking matched probes, sends and receives."""

    def __init__(self, mpi: Any) -> None:
        self._mpi = mpi
        self._world = mpi.COMM_WORLD
        self.rank: int = self._world.Get_rank()
        self.size: int = self._world.Get_size()
        self.traffic = 0, 0
        self._sending: list[tuple[Any, Buffer]] = []
        self._receiving: list[tuple[Any, Message]] = []

    def send(self, dest: int, tag: int, array: Buffer) -> None:
        """Start sending a buffer, and keep it alive until the send is complete."""
        with self._reaching_others():
            request = self._world.Isend([array, self._mpi.BYTE], dest, tag)
        self._sending.append((request, array))
        self._count(array)

    def poll(self) -> list[Message]:
        """Advance sends and receives; return the complete messages."""
        with self._reaching_others():
            return self._poll()

    def _poll(self) -> list[Message]:
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
        """Print the reason and end every rank: the others would wait for this one for ever."""
        print(message, file=sys.stderr, flush=True)
        # A launcher that is told of the abort may drop what it has not forwarded yet: once in 12 runs of MPICH.
        time.sleep(0.3)
        self._world.Abort(1)
        os._exit(1)

    def close(self) -> None:
        """Wait for the sends, so that MPI's Finalize does not block."""

        def all_sent() -> bool:
            self._sending = [entry for entry in self._sending if not entry[0].Test()]
            return not self._sending

        with self._reaching_others():
            wait_for(all_sent)

    @contextlib.contextmanager
    def _reaching_others(self) -> Iterator[None]:
        """Raise `LostRank` for an error of MPI.

        Some transports report the death of a rank so (libfabric), before the launcher kills the ranks that are left;
        others do not notice it (UCX).
        """
        try:
            yield
        except self._mpi.Exception as error:
            raise LostRank(
                f"MPI no longer reaches every rank: one was killed, or a node or the network is gone ({error}); every "
                "finished completion is in the journals, and the same command goes on"
            ) from error


# For each launcher: how many processes it says it started, and which of them this is.
_LAUNCHERS = {
    "MPICH or Intel MPI (mpirun, srun --mpi=pmi2)": ("PMI_SIZE", "PMI_RANK"),
    "Open MPI (mpirun)": ("OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_RANK"),
    "Slurm (srun)": ("SLURM_STEP_NUM_TASKS", "SLURM_PROCID"),
}


def launched_rank() -> int:
    """Return the rank that the launcher assigned, without starting MPI; 0 without a launcher."""
    for _, rank_variable in _LAUNCHERS.values():
        if os.environ.get(rank_variable, "").isdigit():
            return int(os.environ[rank_variable])
    return 0


def launched_size() -> int:
    """Return how many processes the launcher says it started, or MPI has where it is up already; 1 without one."""
    texts = (os.environ.get(size_variable, "") for size_variable, _ in _LAUNCHERS.values())
    sizes = [int(text) for text in texts if text.isdigit()]
    mpi = sys.modules.get("mpi4py.MPI")
    if mpi is not None and mpi.Is_initialized() and not mpi.Is_finalized():
        sizes.append(mpi.COMM_WORLD.Get_size())
    return max(sizes, default=1)


def connect() -> Comm:
    """Return the world of this process; a single process if there is no MPI.

    Raises `Refusal` if a launcher started several processes that do not form one world: each would do all of the
    work.
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
    check_world(comm.size, os.environ, mpi_library(), why_no_mpi)
    return comm


def mpi_library() -> str:
    """Return name and version of the loaded MPI library; "none" if there is none."""
    mpi = sys.modules.get("mpi4py.MPI")
    return "none" if mpi is None else " ".join(mpi.Get_library_version().splitlines()[0].strip("\0 ").split())


def is_alone() -> Comm:
    """Return a single process without starting MPI; raise `Refusal` if a launcher started several."""
    check_world(1, os.environ, "none: a share is generated by one process")
    return Single()


def check_world(size: int, environment: Mapping[str, str], library: str, why_no_mpi: str = "") -> None:
    """Raise `Refusal` if a launcher's variables in `environment` name more processes than `size`."""
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
