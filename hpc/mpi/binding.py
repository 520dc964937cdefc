"""Assign cores and GPUs to each rank. Rank 0 decides from the host information that every rank sends first."""

import contextlib
import os
import socket
from collections import Counter
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field

from hpc.exit import Refusal
from hpc.mpi import gpus
from hpc.mpi.comm import Buffer, pack, unpack


@dataclass(frozen=True)
class Binding:
    """The node, cores and GPUs of a rank."""

    host: str
    local_rank: int
    threads: int
    """Number of cores for this rank."""
    ranks_on_node: int = 1
    """Ranks on this node, this one included; they share its memory."""
    gpus: Sequence[int] = ()
    """Indices of its own GPUs among the visible ones; empty if no GPU is known."""
    gpu_names: Sequence[str] = ()
    """Names of these GPUs, unique on the node (UUIDs if known); "" where nothing names one."""
    shows: dict[str, str] = field(default_factory=dict)
    """Environment variables that make only these GPUs visible."""

    def __str__(self) -> str:
        """Describe the placement."""
        named = [name or str(index) for name, index in zip(self.gpu_names, self.gpus, strict=True)]
        gpus = f", GPU {' and '.join(named)}" if named else ""
        return f"rank {self.local_rank} of {self.ranks_on_node} on {self.host}, {self.threads} threads{gpus}"


def host_info() -> Buffer:
    """Return the host information of this process: host, cores, GPUs, and the threads of OMP_NUM_THREADS."""
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


def bind_ranks(hellos: Sequence[Buffer], bind_gpus: bool = True, gpus_each: int = 1) -> list[Binding]:
    """Divide the cores and GPUs of each node among its ranks, given the host information of every rank.

    A core counts in equal parts for all ranks that may run on it, whether the launcher binds them
    or not; OMP_NUM_THREADS overrides the count. Each rank gets `gpus_each` GPUs that no other rank has,
    whether the launcher shows it all GPUs of the node or only its own. A rank that sees no GPU gets none if
    `gpus_each` is 1; any other shortage raises `Refusal`.
    """
    values = [unpack(buffer)[0] for buffer in hellos]
    ranks = Counter(value["host"] for value in values)
    sharing = Counter((value["host"], core) for value in values for core in value["cores"])
    seen: Counter[str] = Counter()
    taken: dict[tuple[str, str], int] = {}
    found = []
    for rank, value in enumerate(values):
        host, names = value["host"], _names(value["gpus"], gpus_each) if bind_gpus else []
        local = seen[host]
        seen[host] += 1
        share = sum(1 / sharing[host, core] for core in value["cores"])
        threads = value["threads"] or max(1, int(share + 1e-9))
        own = _free(names, local * gpus_each, gpus_each, {name for at, name in taken if at == host})
        if bind_gpus and len(own) < gpus_each and (names or gpus_each > 1):
            raise Refusal(_too_few(rank, host, ranks[host], names, gpus_each, taken))
        taken |= {(host, names[index]): rank for index in own if names[index]}
        shown = ",".join(value["tokens"][index] for index in own)
        shows = dict.fromkeys(value["variables"], shown) if own else {}
        found.append(Binding(host, local, threads, ranks[host], own, tuple(names[index] for index in own), shows))
    return found


def _names(seen: Sequence[str], gpus_each: int) -> list[str]:
    """Return the names of the GPUs that a rank sees, "" where a name may stand for another GPU on another rank.

    Indices are no names if the rank sees exactly as many GPUs as it needs: control groups may hide the others, and
    index 0 is then another GPU for each rank. UUIDs are compared again once the model is loaded.
    """
    unknown = gpus_each > 1 and len(seen) == gpus_each and all(name.isdigit() for name in seen)
    return [""] * len(seen) if unknown else list(seen)


def _free(names: Sequence[str], first: int, count: int, taken: Collection[str]) -> tuple[int, ...]:
    """Return the indices of `count` GPUs that no other rank has, searched from index `first` on, cyclically."""
    order = [(first + more) % len(names) for more in range(len(names))]
    return tuple(sorted([index for index in order if names[index] not in taken][:count]))


def _too_few(
    rank: int, host: str, ranks: int, names: Sequence[str], wanted: int, taken: Mapping[tuple[str, str], int]
) -> str:
    """Describe a shortage of GPUs: the host, the number found, the number wanted, the way out."""
    if wanted == 1:
        other = taken[host, names[0]]
        return (
            f"ranks {other} and {rank} on {host} would share GPU {names[0]}: {ranks} ranks run there. Start one "
            "rank for each GPU of a node (--slurm.gpus-per-node and --slurm.tasks-per-node alike; mpirun -n), or "
            "add --device cpu"
        )
    if len(names) < wanted:
        return (
            f"rank {rank} on {host} sees {len(names)} GPUs, and --replica-gpus wants {wanted} for each rank, all of "
            "one node: a model is not spread over nodes. Ask for as many (--slurm.gpus-per-node), take a smaller "
            "--replica-gpus, or a model or --vllm.quantization that needs less"
        )
    others = {name for at, name in taken if at == host}
    return (
        f"{ranks} ranks on {host} want {wanted} GPUs each (--replica-gpus), {ranks * wanted} in all, and "
        f"{len(others | set(names))} are found there. Start one rank for every {wanted} GPUs of a node "
        "(--slurm.tasks-per-node, mpirun -n)"
    )


def bind_process(own: Binding) -> None:
    """Hide all GPUs but its own from this process. Call it before torch is imported, which reads the variables once."""
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
    """Limit thread pools that are created later (those of tokenizers) to this rank's share."""
    os.environ.setdefault("RAYON_NUM_THREADS", str(threads))
