"""Judge the facts that the doctor gathered: one line for each check. Pure."""

from collections import Counter
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from hpc.engine.registry import check_devices
from hpc.engine.vllm.installed import untested
from hpc.exit import Refusal
from hpc.job import Job
from hpc.mpi.binding import bind_ranks
from hpc.mpi.comm import Buffer, unpack
from hpc.rundir.progress import duration
from hpc.slurm.allocation import Allocation

RUN_BYTES, TEMP_BYTES, CLOCK_S = 2**30, 2**28, 2.0
"""Minimum free space of the run directory (token store and journals) and of a node's temporary folder (compiled
kernels); maximum seconds between two clocks, before the order of events misleads."""
SHARED_TYPES = (
    "nfs", "nfs4", "lustre", "gpfs", "beegfs", "ceph", "cifs", "smb3", "afs", "panfs", "wekafs", "glusterfs", "gfs2",
    "ocfs2", "orangefs", "pvfs2",
)  # fmt: skip
LOCAL_FUSE = ("fuse.fuse-overlayfs", "fuse.squashfuse", "fuse.squashfuse_ll")
"""File systems of containers; most others in user space (sshfs, glusterfs, …) are shared."""
CHECKS = (
    "ranks", "MPI", "GPUs", "vLLM", "corpus", "run directory", "locks", "caches", "model", "space", "clocks",
    "time limit",
)  # fmt: skip

Facts = Mapping[str, Any]
"""The facts of one rank, as JSON values."""
Problem = tuple[str, str, str]
"""The check, the fault, and the way out."""


@dataclass(frozen=True)
class Findings:
    """All facts at the end: all ranks have answered, or the time is up."""

    job: Job
    size: int
    environment: Mapping[str, str]
    """Rank 0's."""
    hellos: Mapping[int, Buffer]
    facts: Mapping[int, Facts]
    """The facts of each rank that answered."""
    trial: Facts | None
    """The result of `trial` at rank 0; None if the file system did not answer."""
    model: Facts | None
    """The result of `resolve` at rank 0; None if it did not end."""
    allocation: Allocation | None
    now: float


@dataclass(frozen=True)
class Line:
    """The outcome of one check, with the way out if it failed."""

    ok: bool
    what: str
    details: str
    fix: str = ""

    def __str__(self) -> str:
        return f"{'ok' if self.ok else 'FIX':<6}{self.what}: {self.details}" + (f"; {self.fix}" if self.fix else "")


def diagnose(findings: Findings) -> list[Line]:
    """Return one line for each check that passed, and one for each fault, with its nodes."""
    wrong: dict[Problem, dict[str, None]] = {problem: {} for problem in problems_of_all(findings)}
    for facts in findings.facts.values():
        for problem in problems_of_rank(facts, findings):
            wrong.setdefault(problem, {})[facts["host"]] = None
    well, lines = well_of_all(findings), []
    for check in CHECKS:
        bad = [
            Line(False, check, f"on {listed(nodes)}: {text}" if nodes else text, fix)
            for (what, text, fix), nodes in wrong.items()
            if what == check
        ]
        lines += bad or ([Line(True, check, well[check])] if check in well else [])
    return lines


def problems_of_all(found: Findings) -> Iterator[Problem]:
    """Yield the faults of the allocation as a whole, and those of rank 0."""
    hosts = {rank: " on " + unpack(hello)[0]["host"] for rank, hello in found.hellos.items()}
    silent = [f"{rank}{hosts.get(rank, '')}" for rank in range(found.size) if rank not in found.facts]
    if silent:
        text = f"no answer in time of rank {listed(silent)}"
        yield "ranks", text, "look at these nodes and their file systems, or leave them out (--slurm.exclude)"
    tasks, step = (int(found.environment.get(f"SLURM_{name}") or 0) for name in ("NTASKS", "STEP_NUM_TASKS"))
    asked = tasks or step
    # A mpirun starts its proxies by srun, one on each node: their variables speak of fewer tasks.
    if asked > found.size or (tasks and tasks < found.size and tasks != step):
        text = f"{found.size} in MPI's world, but Slurm speaks of {asked} tasks"
        yield "ranks", text, "start one for each task: srun --mpi=pmi2 or pmix, or mpirun -n with their number"
    libraries = {facts["library"]: facts["host"] for facts in found.facts.values()}
    if len(libraries) > 1:
        text = ", ".join(f"{library} on {host}" for library, host in libraries.items())
        yield "MPI", f"not the same everywhere: {text}", "load one library on all nodes, in setup.sh of the template"
    yield from problems_of_gpus(found)
    try:
        check_devices(found.job)
    except Refusal as refusal:
        yield "vLLM", str(refusal), ""
    tried, model = found.trial, found.model
    if tried is None:
        yield "run directory", "no answer of its file system in time", "choose another --runs"
    else:
        if tried["corpus"]:
            yield "corpus", tried["corpus"], "name it as the compute nodes see it"
        if tried["error"]:
            yield "run directory", f"{tried['run']} cannot be written: {tried['error']}", "choose another --runs"
        elif tried["free"] < RUN_BYTES:
            yield "space", f"{gib(tried['free'])} are left in {tried['run']}", "make room, or choose another --runs"
        if tried["lock"]:
            yield "locks", tried["lock"], "or choose another --runs"
    if model is None or model["error"]:
        text = model["error"] if model else f"{found.job.model} was not found in time"
        yield "model", text, f"name the folder that `scattergen fetch {found.job.model}` prints on the login node"
    min_s, _, ahead, behind = clock_spread(found.facts)
    if min_s > CLOCK_S:
        text = f"that of {ahead} is {min_s:.1f} s ahead of that of {behind}"
        yield "clocks", text, "let the administrators set them (NTP): times in logs and of files would mislead"


def problems_of_gpus(found: Findings) -> Iterator[Problem]:
    """Yield the faults in the assignment of GPUs to ranks."""
    values = [unpack(hello)[0] for _, hello in sorted(found.hellos.items())]
    blind = sorted({value["host"] for value in values if not value["gpus"]})
    seeing = any(value["gpus"] for value in values)
    if found.job.device == "cpu" or (found.job.device == "auto" and not seeing):
        return
    if blind:
        yield "GPUs", f"none visible on {listed(blind)}", "ask for them (--slurm.gpus-per-node), or add --device cpu"
    if len(values) == found.size:
        try:
            bind_ranks([found.hellos[rank] for rank in range(found.size)], gpus_each=found.job.replica_gpus)
        except Refusal as refusal:
            yield "GPUs", str(refusal), ""


def problems_of_rank(facts: Facts, found: Findings) -> Iterator[Problem]:
    """Yield the faults of one rank."""
    if facts["cuda"]:
        yield "GPUs", f"torch cannot use CUDA: {facts['cuda']}", "install a torch that fits the driver, or --device cpu"
    if (vllm := facts.get("vllm")) and (problem := untested(vllm["version"])):
        yield "vLLM", problem, ""
    elif vllm and vllm["error"]:
        text = f"{vllm['version']} cannot be used: {vllm['error']}"
        yield "vLLM", text, "install one that fits the driver, or choose another --engine"
    mounted = "put --runs on a file system that every node mounts and may write to"
    if facts["unshared"]:
        yield "run directory", facts["unshared"], mounted
    elif facts["unshared"] == "" and not facts["seen"]:
        yield "run directory", "rank 0 does not see what is written there", mounted
    if facts["locked"] is False and found.trial and not found.trial["lock"]:
        text = "rank 0's lock on the run directory is not seen, so a second run in it would go unseen"
        yield "locks", text, "put --runs where locks hold between nodes (Lustre: mount with flock), or never start two"
    for cache in facts["caches"]:
        name, elsewhere = f"{cache['name']}={cache['path']}", "set it to a folder on the node's own disk, in setup.sh"
        if cache["error"]:
            yield "caches", f"{name} cannot be written: {cache['error']}", elsewhere
        elif is_shared(cache["type"]):
            yield "caches", f"{name} is on {cache['type']}, where ranks corrupt each other's caches", elsewhere
    if model := facts["model"]:
        size = "{files} weight files of {bytes:,} bytes".format(**model)
        if model["error"]:
            yield "model", f"it cannot be read: {model['error']}", "put it where every node can read it"
        elif not model["files"]:
            yield "model", "it has no .safetensors or .bin file", "name the folder that has the weights"
        elif model != found.facts.get(0, facts)["model"]:
            yield "model", f"it has {size}, and at rank 0 others", "put it where every node reads the same"
    if facts["temp_free"] < TEMP_BYTES:
        text = f"{gib(facts['temp_free'])} are left in {facts['temp']}"
        yield "space", text, "clean it, or set TMPDIR to another disk"


def well_of_all(found: Findings) -> dict[str, str]:
    """Return the text of each check for the case that it passed; a check that could not be made has none."""
    ranks = Counter(facts["host"] for facts in found.facts.values())
    nodes = f"{len(ranks)} node{'s' * (len(ranks) > 1)}"
    mpi = found.environment.get("SLURM_MPI_TYPE")
    each = "one" if found.job.replica_gpus == 1 else found.job.replica_gpus
    seeing = sum(facts["cuda"] == "" for facts in found.facts.values())
    ends_at = found.allocation and found.allocation.ends_at
    well = {
        "ranks": f"{found.size} on {nodes}: " + listed([f"{count} on {host}" for host, count in ranks.items()]),
        "MPI": listed({facts["library"] for facts in found.facts.values()}) + (f", srun --mpi={mpi}" if mpi else ""),
        "GPUs": f"{each} for each rank; torch can use CUDA on {seeing} of {found.size} ranks",
        "vLLM": f"not in use (--engine {found.job.engine})",
        "caches": listed(
            {f"{c['name']}={c['path']} ({c['type']})": 0 for f in found.facts.values() for c in f["caches"]}
        ),
        "clocks": f"{clock_spread(found.facts)[1]:.2f} s apart at most",
        "time limit": f"ends in {duration(ends_at - found.now)}" if ends_at else "none is known",
    }
    asked = [facts["vllm"]["version"] for facts in found.facts.values() if facts.get("vllm")]
    if versions := dict.fromkeys(filter(None, asked)):
        well["vLLM"] = listed(versions) + ", which was tested"
        if any(facts["vllm"] and facts["vllm"]["error"] is None for facts in found.facts.values()):
            well["vLLM"] += "; whether it can be imported, it did not say in time"
    if not any(may_use_gpus(found.job, hello) for hello in found.hellos.values()):
        well["GPUs"] = f"none in use (--device {found.job.device}): the ranks run on the cores"
    if (tried := found.trial) and tried["folder"]:
        free = min((facts["temp_free"] for facts in found.facts.values()), default=0)
        well["run directory"] = f"{tried['run']}, which every rank reads and writes"
        if tried["busy"]:
            well["run directory"] += "; a run is under way there, and keeps its lock"
        if all(facts["locked"] for facts in found.facts.values()):
            well["locks"] = "rank 0's is seen by every rank"
        well["space"] = f"{gib(tried['free'])} for the run directory, {gib(free)} for a node's temporary files"
        well["corpus"] = f"{tried['files']} file{'s' * (tried['files'] > 1)}, seen from rank 0"
    if found.model:
        read = found.facts.get(0, {}).get("model")
        size = f"{read['files']} weight files, {gib(read['bytes'])}, readable by every rank" if read else "found late"
        well["model"] = f"{found.model['path']}: {size}"
    return well


def clock_spread(facts: Mapping[int, Facts]) -> tuple[float, float, str, str]:
    """Return the minimum and the maximum difference of the clocks in seconds, and the nodes ahead and behind."""
    clocks = [(*one["clock"], one["host"]) for one in facts.values()] or [(0.0, 0.0, "")]
    last, behind = min((offset + error, host) for offset, error, host in clocks)
    first, ahead = max((offset - error, host) for offset, error, host in clocks)
    earliest = min(offset - error for offset, error, _ in clocks)
    return first - last, max(offset + error for offset, error, _ in clocks) - earliest, ahead, behind


def is_shared(kind: str) -> bool:
    """Return whether file systems of this type are shared between nodes."""
    return kind in SHARED_TYPES or (kind.startswith("fuse") and kind not in LOCAL_FUSE)


def listed(names: Collection[str], max_names: int = 8) -> str:
    """Return names separated by commas, the first `max_names` of them."""
    shown = ", ".join(list(names)[:max_names])
    return f"{shown} and {len(names) - max_names} more" if len(names) > max_names else shown


def gib(num_bytes: int) -> str:
    """Return a number of bytes in GiB, for people."""
    return f"{num_bytes / 2**30:.1f} GiB"


def may_use_gpus(job: Job, hello: Buffer) -> bool:
    """Return whether a rank, given its host information, sees GPUs that the job may use."""
    return job.device != "cpu" and bool(unpack(hello)[0]["gpus"])
