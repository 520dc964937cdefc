"""Read from Slurm's variables which job a process runs in, and until when. Pure."""

import re
from collections.abc import Mapping
from dataclasses import dataclass

_TIME = re.compile(r"(?:(\d+)-)?(?:(?:(\d+):)?(\d+):)?(\d+)")


@dataclass(frozen=True)
class Allocation:
    """The Slurm job in which a process runs."""

    job_id: str
    """The job's id; each element of an array has its own, such as 12_3."""
    restarts: int
    """How many times the job was requeued."""
    ends_at: float | None = None
    """When the time limit ends the job, in seconds since the epoch; None if unknown."""

    @property
    def submitted_id(self) -> str:
        """The id that sbatch printed: that of the whole array."""
        return self.job_id.partition("_")[0]

    @classmethod
    def of(cls, environment: Mapping[str, str]) -> "Allocation | None":
        """Return the allocation that Slurm's variables describe; None outside of Slurm.

        SLURM_JOB_ID is not enough: the last element of an array has the id of the whole array there.
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
