"""Where each rank runs: its node, its part of the cores, its GPU. Rank 0 places all ranks by their greetings."""

import contextlib
import os
import socket
from collections import Counter
from collections.abc import Collection, Iterator, Sequence
from dataclasses import asdict, dataclass, field

from hpc.exit import Refusal
from hpc.mpi import gpus
from hpc.mpi.comm import Buffer, pack, unpack


@dataclass(frozen=True)
class Binding:
    """Where a rank runs, among the ranks of its node."""

    host: str
    local_rank: int
    threads: int
    """Its part of the cores that it may run on."""
    ranks_on_node: int = 1
    """How many share the node's memory, this one included."""
    gpu: int | None = None
    """Index among the GPUs that it sees; None where nothing says that there are any."""
    gpu_name: str = ""
    """What tells this GPU from the others of the node."""
    shows: dict[str, str] = field(default_factory=dict)
    """Variables of the environment that show it that GPU alone."""

    def __str__(self) -> str:
        """Return it in words."""
        gpu = f", GPU {self.gpu_name or self.gpu}" if self.gpu is not None else ""
        return f"rank {self.local_rank} of {self.ranks_on_node} on {self.host}, {self.threads} threads{gpu}"


def host_info() -> Buffer:
    """Return what rank 0 must know of this process to place it: its host, cores, GPUs, and its wish for threads."""
    asked, seen = os.environ.get("OMP_NUM_THREADS", ""), asdict(gpus.here(os.environ))
    return pack(
        {
            "host": socket.gethostname(),
            "cores": sorted(os.sched_getaffinity(0)),
            "gpus": seen["names"],
            "tokens": seen["tokens"],
            "variables": seen["variables"],
            "threads": int(asked) if asked.isdigit() and int(asked) else None,
        }
    )


def bind_ranks(hellos: Sequence[Buffer], bind_gpus: bool = True) -> list[Binding]:
    """Share out the cores and GPUs of each node over its ranks, given every rank's `hello`.

    A core counts in equal parts for the ranks that may run on it, whether the launcher binds them
    or not; OMP_NUM_THREADS, where it is set, goes before. Each rank gets one GPU, whether the launcher
    shows it all of the node's or only its own; raises `Refusal` if two would share one.
    """
    values = [unpack(buffer)[0] for buffer in hellos]
    ranks = Counter(value["host"] for value in values)
    sharing = Counter((value["host"], core) for value in values for core in value["cores"])
    seen: Counter[str] = Counter()
    taken: dict[tuple[str, str], int] = {}
    found = []
    for rank, value in enumerate(values):
        host, names = value["host"], value["gpus"] if bind_gpus else []
        local = seen[host]
        seen[host] += 1
        share = sum(1 / sharing[host, core] for core in value["cores"])
        threads = value["threads"] or max(1, int(share + 1e-9))
        gpu = _free(names, local, {name for at, name in taken if at == host})
        name = names[gpu] if gpu is not None else ""
        shows = {} if gpu is None else dict.fromkeys(value["variables"], value["tokens"][gpu])
        if name and (other := taken.setdefault((host, name), rank)) != rank:
            raise Refusal(
                f"ranks {other} and {rank} on {host} would share GPU {name}: {ranks[host]} ranks run there. Start one "
                "rank for each GPU of a node (--slurm.gpus-per-node and --slurm.tasks-per-node alike; mpirun -n), or "
                "add --device cpu"
            )
        found.append(Binding(host, local, threads, ranks[host], gpu, name, shows))
    return found


def _free(names: Sequence[str], local: int, taken: Collection[str]) -> int | None:
    """Return which GPU a rank gets: from that of its place among the ranks on, the first that no other has."""
    order = [(local + more) % len(names) for more in range(len(names))]
    return next((index for index in order if names[index] not in taken), order[0] if order else None)


def bind_process(own: Binding) -> None:
    """Let this process see its own GPU alone. Before torch is imported: what it finds then, it keeps."""
    os.environ.update(own.shows)


@contextlib.contextmanager
def keeping_environment() -> Iterator[None]:
    """Restore the environment at the end: processes that are started afterwards may want all GPUs."""
    before = dict(os.environ)
    try:
        yield
    finally:
        for name in set(os.environ) - set(before):
            del os.environ[name]
        os.environ.update(before)


def use_threads(threads: int) -> None:
    """Keep thread pools that are made later (of tokenizers) to this rank's share."""
    os.environ.setdefault("RAYON_NUM_THREADS", str(threads))
