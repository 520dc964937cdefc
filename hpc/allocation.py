"""What is asked of Slurm, in submitit's names, and what it gave. Pure: submitit itself is in `hpc.slurm`."""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field

EARLY_SIGNAL_S = 60
"""Slurm looks at the clocks of jobs once a minute: a signal may come so many seconds before its time."""

_TIME = re.compile(r"(?:(\d+)-)?(?:(?:(\d+):)?(\d+):)?(\d+)")


@dataclass(frozen=True)
class Slurm:
    """What the job asks of Slurm; None leaves it to the template, and then to the site."""

    template: str = "default"
    """Site profile: a folder, or the name of one in ./slurm_templates, of the user's or of the package."""
    nodes: int | None = None
    """Nodes; 1 where the template says nothing."""
    tasks_per_node: int | None = None
    """Ranks on each node; as many as GPUs where the template says nothing, else 1."""
    gpus_per_node: int | None = None
    """GPUs on each node, one for each rank."""
    cpus_per_task: int | None = None
    """Cores of each rank."""
    time_min: int | None = None
    """Time limit in minutes; 60 where the template says nothing."""
    signal_delay_s: int = 120
    """Slurm's signal to stop comes so long before the time limit, or up to a minute earlier."""
    partition: str | None = None
    """Queue; `sinfo` lists them."""
    account: str | None = None
    """Who pays."""
    qos: str | None = None
    """Quality of service."""
    constraint: str | None = None
    """Features that the nodes must have: a100."""
    gres: str | None = None
    """Generic resources of each node: gpu:a100:4."""
    mem: str | None = None
    """Memory of a node, as sbatch writes it: 64G."""
    nodelist: str | None = None
    """Nodes that it must have."""
    exclude: str | None = None
    """Nodes that it must not have."""
    exclusive: bool = False
    """Share the nodes with no other job."""
    reservation: str | None = None
    """Name of a reservation."""
    dependency: str | None = None
    """As sbatch writes it: afterok:123."""
    mpi: str | None = None
    """Type for srun --mpi: pmi2 for MPICH and Intel MPI, pmix for Open MPI; the template's otherwise."""
    array: int = 0
    """So many independent jobs instead of one MPI job, each with its share of the rows."""
    max_requeues: int = 50
    """The job puts itself back into the queue at most so often."""
    additional_parameters: Mapping[str, str] = field(default_factory=dict)
    """Any other option of sbatch: mail-type END licenses matlab:1; "true" stands for an option without value."""

    def __post_init__(self) -> None:
        for name in ("nodes", "tasks_per_node", "gpus_per_node", "cpus_per_task", "time_min"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f'"slurm.{name}" is {value}; it must be at least 1')
        for name, least in (("array", 0), ("max_requeues", 0), ("signal_delay_s", 1)):
            if getattr(self, name) < least:
                raise ValueError(f'"slurm.{name}" is {getattr(self, name)}; it must be at least {least}')
        if self.time_min is not None:
            check_time(self.time_min, self.signal_delay_s)
        if self.array and (self.gpus_per_node or 1) > 1:
            raise ValueError(
                f'"slurm.gpus_per_node" is {self.gpus_per_node} with an array; each of its jobs is one rank, on one GPU'
            )
        if self.array and (self.nodes or 1) * (self.tasks_per_node or 1) > 1:
            raise ValueError(
                f'"slurm.array" is {self.array} with {self.nodes or 1} nodes of {self.tasks_per_node or 1} tasks; each '
                "job of an array is one rank: leave nodes and tasks_per_node out"
            )


def check_time(time_min: int, signal_delay_s: int) -> None:
    """Raise `ValueError` if Slurm's signal to stop could come in the first minute."""
    least_s = signal_delay_s + 2 * EARLY_SIGNAL_S
    if 60 * time_min < least_s:
        raise ValueError(
            f'"slurm.time_min" is {time_min}, and the signal to stop comes {signal_delay_s} s before the end, or up to '
            f"{EARLY_SIGNAL_S} s earlier; ask for at least {-(-least_s // 60)} minutes, or set a smaller "
            "slurm.signal_delay_s"
        )


@dataclass(frozen=True)
class Allocation:
    """The Slurm job in which a process runs."""

    job_id: str
    """What names it: of an array's elements each other than the whole, 12_3."""
    restarts: int
    """How often it has been put back into the queue."""
    ends_at: float | None = None
    """When its time limit ends it, in seconds of the clock; None where that is not known."""

    @property
    def submitted_id(self) -> str:
        """What sbatch printed."""
        return self.job_id.partition("_")[0]

    @classmethod
    def of(cls, environment: Mapping[str, str]) -> "Allocation | None":
        """Return the allocation that Slurm's variables speak of; None outside of one.

        SLURM_JOB_ID alone would not do: that of the last element of an array is the whole array's.
        """
        names = ("JOB_ID", "ARRAY_JOB_ID", "ARRAY_TASK_ID", "RESTART_COUNT", "JOB_END_TIME")
        job_id, array_id, task, restarts, ends_at = (environment.get(f"SLURM_{name}", "") for name in names)
        if not job_id:
            return None
        return cls(
            f"{array_id}_{task}" if array_id else job_id,
            int(restarts) if restarts.isdigit() else 0,
            float(ends_at) if ends_at.isdigit() else None,
        )


def seconds(text: str) -> int | None:
    """Return the seconds of Slurm's [days-][[hours:]minutes:]seconds; None for UNLIMITED, INVALID and the like."""
    found = _TIME.fullmatch(text.strip())
    if found is None:
        return None
    days, hours, minutes, rest = (int(part or 0) for part in found.groups())
    return ((days * 24 + hours) * 60 + minutes) * 60 + rest


@dataclass(frozen=True)
class Share:
    """A part of a corpus' rows that a job of its own generates: those with this index, modulo the count."""

    index: int
    count: int

    @classmethod
    def of(cls, text: str) -> "Share | None":
        """Return the share that "3/8" speaks of; None for an empty text; raise `ValueError` for another."""
        if not text:
            return None
        index, _, count = text.partition("/")
        if not (index.isdigit() and count.isdigit() and int(index) < int(count)):
            raise ValueError(f'"share" is {text!r}; it must be an index and a count, from 0/8 to 7/8 for eight shares')
        return cls(int(index), int(count))
