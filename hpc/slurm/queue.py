"""Ask Slurm about its jobs. Each question has a time limit, and none is repeated within ten seconds."""

import json
import logging
import os
import subprocess
import time
from collections import Counter
from dataclasses import dataclass, replace
from pathlib import Path

from hpc.rundir import atomic
from hpc.rundir.directory import RunDirectory
from hpc.slurm.allocation import Allocation, seconds

LOGGER = logging.getLogger(__name__)


ASK_S = 10.0
_TIMEOUT_S = 15
_MEANING = {
    "RUNNING": "runs",
    "COMPLETING": "is ending",
    "COMPLETED": "completed",
    "FAILED": "failed; its log is in log/",
    "TIMEOUT": "ended at its time limit; submit it again to go on",
    "CANCELLED": "cancelled; submit it again to go on",
    "OUT_OF_MEMORY": "out of memory; ask for more (--slurm.mem), or set a smaller --cache-gib, and submit it again",
    "NODE_FAIL": "a node failed; submit it again to go on",
    "PREEMPTED": "preempted; submit it again to go on",
}
_LIVE = {
    "PENDING",
    "RUNNING",
    "SUSPENDED",
    "COMPLETING",
    "CONFIGURING",
    "REQUEUED",
    "RESIZING",
    "SIGNALING",
    "STAGE_OUT",
}


@dataclass(frozen=True)
class Answer:
    """The state of a job, or of all elements of an array."""

    job_id: str
    counts: dict[str, int]
    """Number of elements in each of Slurm's states: RUNNING, PENDING, …"""
    reason: str = ""
    """Why the job waits."""

    @property
    def live(self) -> bool:
        """Whether the job, or an element of it, runs or waits."""
        return bool(_LIVE & set(self.counts))

    @property
    def states(self) -> str:
        """The states, for people."""
        if len(self.counts) == 1 and sum(self.counts.values()) == 1:
            return next(iter(self.counts))
        return ", ".join(f"{count} {state}" for state, count in sorted(self.counts.items()))


def ask_slurm(job_id: str) -> Answer | None:
    """Ask the queue for the state of a job, then the accounting; return None if neither knows the job."""
    lines = _run("squeue", "--noheader", "--states=all", f"--jobs={job_id}", "--array", "--format=%T|%r")
    if not lines:
        lines = _run("sacct", "--noheader", "--parsable2", "--allocations", f"--jobs={job_id}", "--format=State,Reason")
    found: Counter[str] = Counter()
    reason = ""
    for line in lines:
        state, _, why = line.partition("|")
        if state:
            found[state.split()[0]] += 1  # "CANCELLED by 1000"
            reason = why if why not in ("None", "") else reason
    return Answer(job_id, dict(found), reason) if found else None


def ask_slurm_now_and_then(job_id: str, memory: Path) -> Answer | None:
    """Return the answer of `ask`, or the one kept in `memory` if it is younger than `ASK_S` seconds."""
    try:
        values = json.loads(memory.read_text())
        if values["job_id"] == job_id and 0 <= time.time() - values["time"] < ASK_S:
            return Answer(job_id, values["counts"], values["reason"]) if values["counts"] else None
    except (OSError, ValueError, KeyError):
        pass
    answer = ask_slurm(job_id)
    values = {"job_id": job_id, "time": time.time(), "counts": {}, "reason": ""}
    if answer is not None:
        values |= {"counts": answer.counts, "reason": answer.reason}
    try:
        atomic.write(memory, json.dumps(values) + "\n")
    except OSError:  # somebody else's run
        LOGGER.debug("cannot write %s", memory)
    return answer


def describe_answer(job_id: str, directory: RunDirectory) -> str:
    """Describe the state of a run's latest Slurm job, and what to do."""
    answer = ask_slurm_now_and_then(job_id, directory.path / "slurm_state.json")
    if answer is None:
        return f"Slurm job {job_id}: Slurm does not know it any more"
    begun = directory.state not in ("new", "done")
    texts = []
    for state, count in sorted(answer.counts.items()):
        text = _MEANING.get(state, state)
        if state in ("PENDING", "REQUEUED"):
            text = ("requeued, " if begun else "") + f"waits ({answer.reason or 'for its turn'})"
        texts.append(text if len(answer.counts) == count == 1 else f"{count} {text}")
    return f"Slurm job {job_id}: {'; '.join(texts)}"


def has_slurm() -> Allocation | None:
    """Return the allocation of this process, None outside of Slurm; ask the queue for its end if necessary."""
    allocation = Allocation.of(os.environ)
    if allocation is None or allocation.ends_at is not None:
        return allocation
    lines = _run("squeue", "--noheader", f"--jobs={allocation.job_id}", "--format=%L")
    left = seconds(lines[0]) if lines else None
    return replace(allocation, ends_at=None if left is None else time.time() + left)


def cancel_job(job_id: str, signal: str | None = None) -> bool:
    """Cancel a job, or send a signal to its ranks; return whether Slurm took it."""
    return _call("scancel", *([f"--signal={signal}"] if signal else []), job_id) is not None


def _run(*command: str) -> list[str]:
    """Return the lines that a client command prints; none if it fails, hangs or is missing."""
    return (_call(*command) or "").splitlines()


def _call(*command: str) -> str | None:
    try:
        asked = subprocess.run(
            command, capture_output=True, text=True, timeout=_TIMEOUT_S, check=True, stdin=subprocess.DEVNULL
        )
    except (OSError, subprocess.SubprocessError) as error:
        LOGGER.debug("%s: %s", " ".join(command), error)
        return None
    return asked.stdout
