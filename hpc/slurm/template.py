"""Read site profiles: the shell around srun, and the site's defaults for sbatch."""

import inspect
import os
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hpc.exit import Refusal

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

PACKAGE = Path(__file__).parents[2] / "slurm_templates"

OWN = ("mpi", "python", "srun_args")
"""Keys of directives.toml that are no parameters of submitit."""

_TYPES = {
    "mpi": (str, "text"),
    "python": (str, "text"),
    "srun_args": (list, "a list of texts"),
    "additional_parameters": (dict, "a table"),
    **dict.fromkeys(("time", "nodes", "ntasks_per_node", "gpus_per_node"), (int, "an integer")),
}
"""Types of the keys that this package reads; the others are passed to submitit unchecked."""


@dataclass(frozen=True)
class SiteProfile:
    """A site profile."""

    setup: tuple[str, ...]
    """Shell lines before srun."""
    teardown: tuple[str, ...]
    """Shell lines after srun."""
    directives: Mapping[str, Any]
    """Default parameters of submitit, without the keys of `OWN`."""
    mpi: str
    """Type for srun --mpi."""
    python: str | None
    """Shell command that starts Python on a node; None for the submitting interpreter."""
    srun_args: tuple[str, ...]


def find_profile(name: str) -> Path:
    """Return the folder of a template, given as a folder or a name; a user's template hides the package's.

    Raises `Refusal` if there is none.
    """
    config = Path(os.environ.get("XDG_CONFIG_HOME") or Path.home() / ".config")
    places = [Path("slurm_templates") / name, config / "scattergen" / "slurm_templates" / name, PACKAGE / name]
    if "/" in name or name in ("", ".", ".."):
        places = [Path(name).expanduser()]
    for place in places:
        if place.is_dir():
            return place
    own = sorted(folder.name for folder in PACKAGE.iterdir() if folder.is_dir())
    raise Refusal(
        f'"slurm.template" is {name!r}, and there is no such folder: {", ".join(map(str, places))}. scattergen brings '
        f"{', '.join(own)}"
    )


def read_profile(folder: Path) -> SiteProfile:
    """Read a template; a missing file counts as empty. Raises `Refusal` for an unknown key or a wrong value."""
    path = folder / "directives.toml"
    try:
        values = tomllib.loads(_text(path))
    except tomllib.TOMLDecodeError as error:
        raise Refusal(f"{path}: {error}") from error
    for name, value in values.items():
        kind, words = _TYPES.get(name, (object, ""))
        texts = not isinstance(value, list) or all(isinstance(text, str) for text in value)
        if not (isinstance(value, kind) and texts):
            raise Refusal(f'{path}: "{name}" is {value!r}; it must be {words}')
    own = {name: values.pop(name) for name in OWN if name in values}
    strangers = sorted(set(values) - profile_parameters())
    if strangers:
        known = ", ".join(sorted(profile_parameters() | set(OWN)))
        raise Refusal(
            f"{path}: {', '.join(strangers)} is none of {known}; other options of sbatch stand under "
            "[additional_parameters]"
        )
    return SiteProfile(
        setup=_lines(folder / "setup.sh"),
        teardown=_lines(folder / "teardown.sh"),
        directives=values,
        mpi=own.get("mpi", "pmi2"),
        python=own.get("python"),
        srun_args=tuple(own.get("srun_args", ())),
    )


def profile_parameters() -> set[str]:
    """Return the names of submitit's parameters that a template may set."""
    from submitit.slurm import slurm

    ours = {
        "command", "folder", "job_name", "setup", "teardown", "signal_delay_s", "stderr_to_stdout", "wckey",
        "map_count", "array_parallelism", "srun_args", "use_srun",
    }  # fmt: skip
    return set(inspect.signature(slurm._make_sbatch_string).parameters) - ours


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except FileNotFoundError:
        return ""
    except (OSError, UnicodeDecodeError) as error:
        raise Refusal(f"{path} cannot be read: {error}") from error


def _lines(path: Path) -> tuple[str, ...]:
    """Return the lines of a shell file without the shebang and the directives of shellcheck."""
    lines = _text(path).splitlines()
    return tuple(line for line in lines if not line.startswith(("#!", "# shellcheck")))
