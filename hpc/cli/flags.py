"""Flags: the fields of a job, in the groups of the help."""

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
    "model": ("model", "device", "dtype", "context_tokens", "trust_remote_code"),
    "prompts": (
        "column", "prompt_template", "instruction", "source_lang", "target_lang",
        "system", "last_assistant", "chat_template", "chat_template_kwargs",
        "row_chat_templates", "chat_date", "unknown_parameters",
    ),
    "corpus and output": (
        "corpus", "format", "text_per", "name", "runs", "limit", "share", "truncate_prompts", "output",
        "output_format", "output_rows_per_file", "error_file", "return_token_ids", "max_error_rate",
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
"""Of the required flags, which the short help does not explain further."""
JOB_HELP = "The job.json of a run directory: its values in the place of flags; flags beside it go before them."
MARGIN, COLUMN, TWO_BOXES = 10, 38, 130
"""Columns of a line that tyro leaves to its box; the column at which the short help of a flag begins; the columns from
which on tyro puts two boxes beside each other."""

MAX_DEFAULT = 50
"""Maximum characters of a default in the short help: a job file may have a prompt of many lines."""


@dataclass(frozen=True)
class Uses:
    """Annotates the job of a verb with the fields that the verb uses; only these are its flags."""

    names: Sequence[str]
    instead: Mapping[str, Any] = field(default_factory=dict)
    """Values of required fields that are not flags of the verb."""


def flags_of(verb: type, base: Job | None, short: bool) -> type:
    """Return a dataclass of the flags of a verb, for tyro; `command_of` turns an instance of it into the verb.

    The values of `base` are the defaults. With `short`, the help of each flag is cut to one line.
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
    """Return the verb of parsed flags; raise `ValueError` for a value that breaks a rule of the job."""
    values = {**_uses(verb).instead, **({} if base is None else vars(base))}
    for title, names in _groups(verb):
        given = vars(getattr(flags, _identifier(title)))
        values |= {name: SECTIONS[name](**given) if name in SECTIONS else given[name] for name in names}
    return verb(job=Job(**values), **{each.name: getattr(flags, each.name) for each in _own(verb)})


def _uses(verb: type) -> Uses:
    metadata = getattr(get_type_hints(verb, include_extras=True)["job"], "__metadata__", ())
    return metadata[0] if metadata else Uses([each.name for each in fields(Job)])


def _groups(verb: type) -> Iterator[tuple[str, list[str]]]:
    """Yield the title and the used fields of each group that the verb uses."""
    used = _uses(verb).names
    for title, names in GROUPS.items():
        if chosen := [name for name in names if name in used]:
            yield title, chosen


def _own(verb: type) -> list[Field[Any]]:
    """Return the fields of a verb besides its job."""
    return [each for each in fields(verb) if each.name != "job"]


def _leaves(name: str) -> Iterator[tuple[type, Field[Any]]]:
    """Yield (class, field) for a field of a job: itself, or every field of the section that it names."""
    owner = SECTIONS.get(name, Job)
    yield from ((owner, each) for each in fields(owner) if owner is not Job or each.name == name)


def _flag(owner: type, each: Field[Any], base: Job | None, short: bool) -> tuple[str, Any, Any]:
    """Return (name, type, default) of the flag of a field; the annotated type holds its full name."""
    section = next((name for name, kind in SECTIONS.items() if kind is owner), None)
    name = each.name if section is None else f"{section}.{each.name}"
    hint, text = get_type_hints(owner)[each.name], _docs(owner)[each.name]
    metavar = None if hint is bool else METAVARS.get(name, _metavar(hint))
    return each.name, Annotated[hint, _configured(name, text, metavar, short)], _default(each, base, section)


def _configured(name: str, text: str, metavar: str | None, short: bool) -> Any:
    """Return the tyro configuration of a flag; without a metavar it is a pair --x, --no-x."""
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
    """Return a dataclass field whose default is that of `each`, or its value in the job `base`."""
    if base is None:
        return field(default=each.default, default_factory=each.default_factory)
    value = getattr(base if section is None else getattr(base, section), each.name)
    return field(default_factory=lambda: value)


def _brief(label: str, text: str, default: str) -> str:
    """Return as many first clauses of a help text as fit one line behind the label of the flag, and the default."""
    shown = "" if default in ("None", "", "''", "False") else f" ({_cut(default)})"
    width = shutil.get_terminal_size().columns
    room = (width if width < TWO_BOXES else width // 2) - MARGIN - len(label) - 1 - len(shown)
    column = max(0, COLUMN - len(label) - 1)
    ends = [found.start() for found in re.finditer(r'(?<!")[;:.] |\.?$', text)]
    end = max((end for end in ends if end <= room - column), default=ends[0])
    return " " * min(column, room - end) + text[:end].rstrip(".") + shown


def _cut(default: str) -> str:
    """Return a default in one line, and the beginning of a long one."""
    line = " ".join(default.split())
    return line if len(line) <= MAX_DEFAULT else line[: MAX_DEFAULT - 1] + "…"


def _metavar(hint: Any) -> str:
    if get_origin(hint) is Literal:
        return "{" + ",".join(get_args(hint)) + "}"
    kinds = [kind for kind in get_args(hint) if kind not in (type(None), Ellipsis)] or [hint]
    if get_origin(hint) is tuple:
        return f"[{_metavar(kinds[0])} ...]"
    return "[NAME VALUE ...]" if len(kinds) > 1 else str(kinds[0].__name__).upper()


def _no(flag: str) -> str:
    """Return the negated flag: --no-force, --slurm.no-exclusive."""
    return re.sub(r"^(--(?:.*\.)?)", r"\1no-", flag)


def _identifier(title: str) -> str:
    return title.replace(" ", "_")


@functools.cache
def _docs(owner: type) -> dict[str, str]:
    """Return the docstring under each field of a dataclass, by the name of the field."""
    [tree] = ast.parse(inspect.getsource(owner)).body
    assert isinstance(tree, ast.ClassDef)
    return {
        ast.unparse(each.target): " ".join(str(text.value.value).split())
        for each, text in itertools.pairwise(tree.body)
        if isinstance(each, ast.AnnAssign) and isinstance(text, ast.Expr) and isinstance(text.value, ast.Constant)
    }
