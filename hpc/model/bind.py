"""Bind a run to its model, tokenizer, chat template, dtype and date: another attempt must have the same."""

from hpc.job import Job
from hpc.model.find import Model, as_bound
from hpc.rundir.directory import RunDirectory


def bind_run(directory: RunDirectory, job: Job, model: Model | None) -> dict[str, str]:
    """Return the fields that a job binds its run to: only those of the job without a `model`, resolved later on a node.

    Raises `Refusal`, naming the field, if the run in the directory is bound to something else.
    """
    bound: dict[str, str] = {}
    if model is not None:
        bound = {"model": model.revision, "tokenizer": model.tokenizer, "template": model.template}
    if job.dtype != "auto":
        bound["dtype"] = job.dtype
    if job.chat_date:
        bound["chat_date"] = job.chat_date
    earlier = directory.read_job()
    known = earlier["bound"] if earlier else {}
    directory.check_bound(as_bound(model, bound, known) if model else bound)
    return bound
