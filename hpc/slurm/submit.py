"""Submit a batch script through submitit, and print the log of the job."""

import time
from collections.abc import Sequence
from pathlib import Path

from hpc.exit import Refusal
from hpc.job import Job
from hpc.model.find import Model
from hpc.rundir.directory import RunDirectory, run_path
from hpc.rundir.lock import alone
from hpc.slurm.queue import ask_slurm
from hpc.slurm.script import PROGRAM, find_corpus, prepare_run

MAX_WAIT_S = 900.0
"""Seconds to wait for a short job to start and end; after that its log is left to the user."""


def submit_script(job: Job, model: Model, program: Sequence[str] = PROGRAM, verb: str = "run") -> tuple[str, Path]:
    """Submit a job; return Slurm's id and the run directory.

    sbatch receives the bytes of script.sbatch. Raises `Refusal` if a job of this run waits or runs (unless
    `job.force`), or if Slurm refuses the script.
    """
    from submitit.core.utils import FailedJobError, FailedSubmissionError
    from submitit.slurm.slurm import SlurmExecutor

    class Executor(SlurmExecutor):
        """An executor that submits a given text unchanged."""

        def _make_submission_file_text(self, command: str, uid: str) -> str:  # noqa: ARG002
            return text

    if SlurmExecutor.affinity() < 0:
        raise Refusal("there is no srun on PATH, so this is no machine of a Slurm cluster; log in to one")
    directory = RunDirectory(run_path(job, find_corpus(job)))
    directory.create()
    with alone(directory.path, "submit", lambda: False):
        if not job.force:
            refuse_live(directory)
        text = prepare_run(job, program, model, verb)
        directory.cancelled.unlink(missing_ok=True)
        (directory.path / "slurm").mkdir(exist_ok=True)
        executor = Executor(directory.path / "slurm")
        try:
            submitted = executor._submit_command("")
        except (FailedJobError, FailedSubmissionError) as error:
            raise Refusal(f"Slurm did not take the job: {error}") from error
        directory.note_slurm_job(submitted.job_id)
    return submitted.job_id, directory.path


def refuse_live(directory: RunDirectory) -> None:
    """Raise `Refusal` if a Slurm job of this run waits or runs."""
    for job_id in directory.slurm_jobs()[-3:]:
        found = ask_slurm(job_id)
        if found is not None and found.live:
            raise Refusal(
                f"{directory.path} has the Slurm job {job_id}, which is {found.states}: wait for it, stop it "
                f"(scattergen cancel {directory.path}), or submit beside it with --force"
            )


def show_log(job_id: str, path: Path) -> int:
    """Wait until a job ends and print its log; return 0 if it completed, else 1."""
    began = time.monotonic()
    while (answer := ask_slurm(job_id)) is not None and answer.live:
        if time.monotonic() - began > MAX_WAIT_S:
            raise Refusal(f"job {job_id} still is {answer.states}; its output will be {path}/log/slurm-{job_id}.log")
        time.sleep(1)
    print((path / "log" / f"slurm-{job_id}.log").read_text(errors="replace"), end="")
    return 0 if answer is not None and set(answer.counts) == {"COMPLETED"} else 1
