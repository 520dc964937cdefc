"""Flags: the fields of a job, in the groups that the help shows them in."""

import ast
import functools
import inspect
import itertools
import re
import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import Field, dataclass, field, fields, make_dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, get_args, get_origin, get_type_hints

from hpc.engine_args import Vllm
from hpc.job import Job, Slurm
from hpc.sampling_params import SamplingParams

GROUPS: Mapping[str, Sequence[str]] = {
    "model": ("model", "device", "dtype", "context_tokens", "trust_remote_code", "chat_date"),
    "corpus and output": (
        "corpus", "name", "runs", "limit", "share", "truncate_prompts", "return_token_ids", "max_error_rate",
        "retry_errors", "force", "show",
    ),
    "sampling": ("sampling",),
    "engine": ("engine", "tail", "max_num_seqs", "cache_gib", "replica_gpus", "replica_cpus"),
    "native engine": ("deterministic", "drafts"),
    "hf engine": ("buckets", "batch_tokens"),
    "vllm engine": ("vllm",),
    "Slurm": ("slurm",),
}  # fmt: skip
"""The fields of a job by their group; the name of a section stands for all of its fields."""
SECTIONS: Mapping[str, Any] = {"sampling": SamplingParams, "vllm": Vllm, "slurm": Slurm}
METAVARS = {"model": "FOLDER|FILE.gguf|HUB-ID", "corpus": "FILE [FILE ...]"}
"""Of the flags that must be given: the short help says no more of them."""
JOB_HELP = "The job.json of a run directory: its values in the place of flags; flags beside it go before them."
MARGIN, COLUMN, TWO_BOXES = 10, 38, 130
"""Columns of a line that tyro leaves to its box; the column at which the short help of a flag begins; the columns from
which on tyro puts two boxes beside each other."""


@dataclass(frozen=True)
class Uses:
    """Annotates the job of a verb with the names of the fields that the verb uses: they alone are its flags."""

    names: Sequence[str]
    instead: Mapping[str, Any] = field(default_factory=dict)
    """Values of the fields that have no default and are no flags."""


def flags_of(verb: type, base: Job | None, short: bool) -> type:
    """Return a dataclass of a verb's flags for tyro; `command_of` makes the verb of what tyro returns.

    The values of `base` are the defaults. With `short`, the compact help says of each flag what fits its line.
    """
    import tyro

    parts: list[tuple[str, Any, Any]] = []
    for title, names in _groups(verb):
        flags = [_flag(owner, each, base, short) for name in names for owner, each in _leaves(name)]
        group = make_dataclass(_identifier(title), flags, kw_only=True)
        parts.append((_identifier(title), Annotated[group, tyro.conf.arg(name=title, help="")], field()))
    parts.append(("job", Annotated[Path | None, _configured("job", JOB_HELP, "FILE", short)], None))
    parts += [_flag(verb, each, None, short) for each in _own(verb)]
    return make_dataclass(verb.__name__, parts, namespace={"__doc__": verb.__doc__}, kw_only=True)


def command_of(verb: type, flags: Any, base: Job | None) -> Any:
    """Return the verb that flags stand for; raise `ValueError`, as a job does, for a value that breaks its rule."""
    values = {**_uses(verb).instead, **({} if base is None else vars(base))}
    for title, names in _groups(verb):
        given = vars(getattr(flags, _identifier(title)))
        values |= {name: SECTIONS[name](**given) if name in SECTIONS else given[name] for name in names}
    return verb(job=Job(**values), **{each.name: getattr(flags, each.name) for each in _own(verb)})


def _uses(verb: type) -> Uses:
    metadata = getattr(get_type_hints(verb, include_extras=True)["job"], "__metadata__", ())
    return metadata[0] if metadata else Uses([each.name for each in fields(Job)])


def _groups(verb: type) -> Iterator[tuple[str, list[str]]]:
    """Yield the title and the names of each group of which the verb uses a field."""
    used = _uses(verb).names
    for title, names in GROUPS.items():
        if chosen := [name for name in names if name in used]:
            yield title, chosen


def _own(verb: type) -> list[Field[Any]]:
    """Return the verb's own fields, besides its job."""
    return [each for each in fields(verb) if each.name != "job"]


def _leaves(name: str) -> Iterator[tuple[type, Field[Any]]]:
    """Yield the fields, with the class they are of, that a field of a job stands for: itself, or a section's."""
    owner = SECTIONS.get(name, Job)
    yield from ((owner, each) for each in fields(owner) if owner is not Job or each.name == name)


def _flag(owner: type, each: Field[Any], base: Job | None, short: bool) -> tuple[str, Any, Any]:
    """Return name, type and default of a field as a field of flags: its full name is in its type."""
    section = next((name for name, kind in SECTIONS.items() if kind is owner), None)
    name = each.name if section is None else f"{section}.{each.name}"
    hint, text = get_type_hints(owner)[each.name], _docs(owner)[each.name]
    metavar = None if hint is bool else METAVARS.get(name, _metavar(hint))
    return each.name, Annotated[hint, _configured(name, text, metavar, short)], _default(each, base, section)


def _configured(name: str, text: str, metavar: str | None, short: bool) -> Any:
    """Return what tyro is to know of a flag; without a metavar it is a pair, of yes and no."""
    import tyro

    flag = f"--{name.replace('_', '-')}"
    label = f"{flag}, {_no(flag)}" if metavar is None else f"{flag} {metavar}"
    return tyro.conf.arg(
        name=name,
        prefix_name=False,
        metavar=metavar,
        help=text,
        help_behavior_hint=(lambda default: _brief(label, text, default)) if short else None,
    )


def _default(each: Field[Any], base: Job | None, section: str | None) -> Any:
    """Return a field with the default of `each`, or the value that it has in the job `base`."""
    if base is None:
        return field(default=each.default, default_factory=each.default_factory)
    value = getattr(base if section is None else getattr(base, section), each.name)
    return field(default_factory=lambda: value)


def _brief(label: str, text: str, default: str) -> str:
    """Return the first clauses of a text that fit one line behind a flag's label, and the default."""
    shown = "" if default in ("None", "", "''", "False") else f" ({default})"
    width = shutil.get_terminal_size().columns
    room = (width if width < TWO_BOXES else width // 2) - MARGIN - len(label) - 1 - len(shown)
    column = max(0, COLUMN - len(label) - 1)
    ends = [found.start() for found in re.finditer(r'(?<!")[;:.] |\.?$', text)]
    end = max((end for end in ends if end <= room - column), default=ends[0])
    return " " * min(column, room - end) + text[:end].rstrip(".") + shown


def _metavar(hint: Any) -> str:
    if get_origin(hint) is Literal:
        return "{" + ",".join(get_args(hint)) + "}"
    kinds = [kind for kind in get_args(hint) if kind not in (type(None), Ellipsis)] or [hint]
    if get_origin(hint) is tuple:
        return f"[{_metavar(kinds[0])} ...]"
    return "[NAME VALUE ...]" if len(kinds) > 1 else str(kinds[0].__name__).upper()


def _no(flag: str) -> str:
    """Return the flag that says no: --no-force, --slurm.no-exclusive."""
    return re.sub(r"^(--(?:.*\.)?)", r"\1no-", flag)


def _identifier(title: str) -> str:
    return title.replace(" ", "_")


@functools.cache
def _docs(owner: type) -> dict[str, str]:
    """Return the text under each field of a dataclass."""
    [tree] = ast.parse(inspect.getsource(owner)).body
    assert isinstance(tree, ast.ClassDef)
    return {
        ast.unparse(each.target): " ".join(str(text.value.value).split())
        for each, text in itertools.pairwise(tree.body)
        if isinstance(each, ast.AnnAssign) and isinstance(text, ast.Expr) and isinstance(text.value, ast.Constant)
    }
