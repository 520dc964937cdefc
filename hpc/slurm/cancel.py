"""Stop a run, keeping all finished completions, and cancel its Slurm jobs."""

import os
import re
import signal
import socket
import time
from pathlib import Path

from hpc.exit import OK, Refusal
from hpc.rundir import atomic
from hpc.rundir.directory import RunDirectory
from hpc.rundir.lock import is_held
from hpc.slurm.queue import ask_slurm, cancel_job

STOP_S = 60.0
"""Seconds that a run gets to flush its journals before its job is cancelled; a step may take some of them."""


def cancel(path: Path) -> int:
    """Stop a run and cancel its Slurm jobs; return the exit code.

    Raises `Refusal` if the path is no run directory, or if the run belongs to another machine.
    """
    directory = RunDirectory(path)
    directory.recorded_job()
    jobs = [job_id for job_id in directory.slurm_jobs() if (found := ask_slurm(job_id)) is not None and found.live]
    if not jobs and not is_held(directory.path):
        print(f"{path}: nothing runs or waits; it is {directory.state}")
        return OK
    atomic.write(directory.cancelled, time.strftime("%Y-%m-%d %H:%M:%S\n"))  # or the job would requeue itself
    if is_held(directory.path):
        for job_id in jobs:
            cancel_job(job_id, signal="USR2")
        if not jobs:
            _stop_process(directory)
        end = time.monotonic() + STOP_S
        while is_held(directory.path) and time.monotonic() < end:
            time.sleep(0.2)
    for job_id in jobs:
        cancel_job(job_id)
    print(f"{path}: {directory.state}" + "".join(f"; Slurm job {job_id} is cancelled" for job_id in jobs))
    return OK


def _stop_process(directory: RunDirectory) -> None:
    """Send TERM to rank 0, which stops the others."""
    owner = (directory.path / "lock").read_text(errors="replace")
    found = re.match(r"host (\S+), pid (\d+)", owner)
    if found is None or found[1] != socket.gethostname():
        raise Refusal(f"{directory.path} is in use by {owner.strip()}; send its process SIGTERM there")
    os.kill(int(found[2]), signal.SIGTERM)
