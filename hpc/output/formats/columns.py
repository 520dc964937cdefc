"""Columns of the corpus in an output that is a table: its own where it is a table too, else one of JSON."""

from typing import Any

from hpc.corpus.formats import FORMATS
from hpc.output.facts import Facts

META = "meta"
"""The column that holds what rows carry, as JSON, where the corpus is no table."""
_OWN = ("text", "finish_reason", "usage", "prompt_tokens", "completion_tokens", "error", "token_ids", "logprobs", "samples")
"""Columns of the output; one of the corpus that is called so is called `input_…` beside it."""


def input_columns(facts: Facts) -> list[str] | None:
    """Return the names of the columns of the corpus, in order, over all files; None if a file is no table."""
    found: dict[str, None] = {}
    for file in facts.inputs:
        columns = getattr(FORMATS[file.format], "columns", None)
        names = columns(file) if columns is not None else None
        if names is None:
            return None
        found.update(dict.fromkeys(names))
    return list(found)


def renamed(names: list[str]) -> dict[str, str]:
    """Return what the columns of a corpus are called in the output; its `id` is the output's."""
    taken = {*names, *_OWN}
    called = {}
    for name in names:
        if name == "id":
            continue
        new = name
        while new in _OWN or (new != name and new in taken):
            new = f"input_{new}"
        taken.add(new)
        called[name] = new
    return called


def stored_ids(facts: Facts) -> type:
    """Return the type of ids in a column: int where all are, else str."""
    tokens = facts.tokens
    return int if all(isinstance(tokens.id(row), int | None) for row in range(tokens.num_rows)) else str


def as_id(value: Any, kind: type) -> Any:
    """Return an id as a column of a type holds it."""
    return value if value is None or isinstance(value, kind) else str(value)
