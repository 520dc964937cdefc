"""Make a job and sampling parameters of the keywords of a Python call. Pure."""

import difflib
import json
from collections.abc import Mapping
from dataclasses import fields
from typing import Any, Literal, get_args, get_origin, get_type_hints

from hpc.job import Job
from hpc.sampling_params import SamplingParams

TAKEN = (
    "device", "dtype", "context_tokens", "trust_remote_code", "chat_date", "chat_template", "chat_template_kwargs",
    "row_chat_templates", "column", "prompt_template", "system", "last_assistant", "unknown_parameters",
    "source_lang", "target_lang", "instruction", "truncate_prompts", "engine", "max_num_seqs", "cache_gib",
    "replica_gpus", "replica_cpus", "deterministic", "drafts", "buckets", "batch_tokens", "vllm",
)  # fmt: skip
"""Fields of a job that are about model, prompts and engine; the others are about files, ranks and Slurm."""
_SAMPLING = tuple(field.name for field in fields(SamplingParams))
_OTHER_NAMES = {
    "max_tokens": "max_new_tokens",
    "max_completion_tokens": "max_new_tokens",
    "sampling_params": "sampling",
}
"""What other libraries call a parameter."""


def make_job(model: str, parameters: Mapping[str, Any]) -> Job:
    """Return the job of a call, without a corpus.

    Raises `TypeError` for a keyword that is none, `ValueError` for a value that breaks its rule.
    """
    given = {name: value for name, value in parameters.items() if value is not None}
    hints = get_type_hints(Job)
    for name, value in given.items():
        if name in TAKEN and get_origin(hints[name]) is Literal and value not in get_args(hints[name]):
            raise ValueError(f'"{name}" is {value!r}; it must be one of {", ".join(get_args(hints[name]))}')
    own = {name: _as_flag(name, value) for name, value in given.items() if name in TAKEN}
    rest = {name: value for name, value in given.items() if name not in TAKEN}
    return Job(model=str(model), corpus=("-",), sampling=override(SamplingParams(), rest, (*TAKEN, *_SAMPLING)), **own)


def _as_flag(name: str, value: Any) -> Any:
    """Return a value in the form that a job has, from the mapping or list that one writes in Python."""
    if name == "chat_template_kwargs" and isinstance(value, Mapping):
        return json.dumps(value)
    if name == "column":
        pairs = [f"{ours}={column}" for ours, column in value.items()] if isinstance(value, Mapping) else value
        return (pairs,) if isinstance(pairs, str) else tuple(pairs)
    return value


def override(
    defaults: SamplingParams, parameters: Mapping[str, Any], names: tuple[str, ...] = _SAMPLING
) -> SamplingParams:
    """Return sampling parameters with those of a call in their place: a whole set given as `sampling`, or keywords.

    Raises `TypeError` for a keyword that is none of `names`, `ValueError` for a value that breaks its rule.
    """
    values = dict(parameters)
    whole = values.pop("sampling", None)
    for name in values:
        if name not in _SAMPLING:
            raise TypeError(_unknown(name, names))
    if isinstance(whole, SamplingParams):
        defaults = whole
    elif whole is not None:
        values = {**whole, **values}
    return defaults.override({name: _in_python(value) for name, value in values.items()})


def _in_python(value: Any) -> Any:
    """Return a parameter as JSON has it, from a tuple, or a number or an array of numpy."""
    if isinstance(value, tuple):
        return list(value)
    return value.tolist() if callable(getattr(value, "tolist", None)) else value


def _unknown(name: str, names: tuple[str, ...]) -> str:
    """Return the message for an unknown keyword: where it belongs, or which one it may stand for."""
    if name in TAKEN or name == "loader":
        return f'"{name}" is of the model: give it to Generator, or to generate'
    if name in (field.name for field in fields(Job)):
        return f'"{name}" is of a whole job, with files and ranks: hpc.run(hpc.Job(…)) takes it'
    meant = [_OTHER_NAMES[name]] if name in _OTHER_NAMES else difflib.get_close_matches(name, names, 1)
    hint = "".join(f', did you mean "{other}"' for other in meant)
    return f'"{name}" is no parameter{hint}; they are {", ".join(names)}'
