"""What is asked of Slurm, in submitit's names, and what it gave. Pure: submitit itself is in `hpc.slurm.script`."""

import re
from collections.abc import Mapping
from dataclasses import dataclass

_TIME = re.compile(r"(?:(\d+)-)?(?:(?:(\d+):)?(\d+):)?(\d+)")


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
