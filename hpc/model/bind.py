"""Bind a run to what its completions follow from: model, dtype, date, and how rows become prompts."""

import json

from hpc.exit import Refusal
from hpc.job import REFUSING_FIELDS, Job
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
    if prompts := _prompts(job):
        bound["prompts"] = prompts
    earlier = directory.binding_job()
    known = earlier["bound"] if earlier else {}
    if earlier and known.get("prompts", "") != prompts:
        was, now = known.get("prompts") or "rows as they are", prompts or "rows as they are"
        raise Refusal(
            f"{directory.path} was begun with prompts from {was}, and this job makes them from {now}: its completions "
            "would not belong together. Choose another --name, or remove the run directory"
        )
    directory.check_bound(as_bound(model, bound, known) if model else bound)
    return bound


def _prompts(job: Job) -> str:
    """Return what a job says of how rows become prompts, but not of which it refuses; nothing if it says nothing."""
    values = {name: value for name, value in job.prompt_values().items() if name not in REFUSING_FIELDS}
    return json.dumps(values, ensure_ascii=False) if values else ""
