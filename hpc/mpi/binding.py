"""Where each rank runs: its node, its part of the cores, its GPUs. Rank 0 places all ranks by their greetings."""

import os
import socket
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
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
    gpus: Sequence[int] = ()
    """Indices of its own among the GPUs that it sees; none where nothing says that there are any."""
    gpu_names: Sequence[str] = ()
    """What tells these GPUs from the others of the node."""
    shows: dict[str, str] = field(default_factory=dict)
    """Variables of the environment that show it these GPUs alone."""

    def __str__(self) -> str:
        """Return it in words."""
        named = [name or str(index) for name, index in zip(self.gpu_names, self.gpus, strict=True)]
        gpus = f", GPU {' and '.join(named)}" if named else ""
        return f"rank {self.local_rank} of {self.ranks_on_node} on {self.host}, {self.threads} threads{gpus}"


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


def bind_ranks(hellos: Sequence[Buffer], bind_gpus: bool = True, gpus_each: int = 1) -> list[Binding]:
    """Share out the cores and GPUs of each node over its ranks, given every rank's `hello`.

    A core counts in equal parts for the ranks that may run on it, whether the launcher binds them
    or not; OMP_NUM_THREADS, where it is set, goes before. Each rank gets `gpus_each` GPUs that no other has,
    whether the launcher shows it all of the node's or only its own. A rank that sees no GPU gets none where
    one is enough; otherwise raises `Refusal` where a node has too few.
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
    """Return what tells apart the GPUs that a rank sees.

    Indices do not where it sees just as many as it is to have: control groups may hide others from it. What a
    rank computes on is compared again when the model is loaded.
    """
    unknown = gpus_each > 1 and len(seen) == gpus_each and all(name.isdigit() for name in seen)
    return [""] * len(seen) if unknown else list(seen)


def _free(names: Sequence[str], first: int, count: int, taken: Collection[str]) -> tuple[int, ...]:
    """Return which GPUs a rank gets: from the index `first` on, around, the first that no other has."""
    order = [(first + more) % len(names) for more in range(len(names))]
    return tuple(sorted([index for index in order if names[index] not in taken][:count]))


def _too_few(
    rank: int, host: str, ranks: int, names: Sequence[str], wanted: int, taken: Mapping[tuple[str, str], int]
) -> str:
    """Say that a rank cannot have its GPUs alone: what was found on its node, what is wanted, what to do."""
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
    """Let this process see its own GPUs alone. Before torch is imported: what it finds then, it keeps."""
    os.environ.update(own.shows)


def use_threads(threads: int) -> None:
    """Keep thread pools that are made later (of tokenizers) to this rank's share."""
    os.environ.setdefault("RAYON_NUM_THREADS", str(threads))
