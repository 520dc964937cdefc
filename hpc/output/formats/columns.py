"""Columns of the corpus in an output that is a table: its own where it is a table too, else one of JSON."""

from dataclasses import dataclass
from typing import Any

from hpc.corpus.formats import FORMATS
from hpc.output.facts import Facts
from hpc.request import RowId

META = "meta"
"""The column that holds what rows carry, as JSON, where the corpus is no table."""
_OWN = (
    "id", "text", "finish_reason", "usage", "prompt_tokens", "completion_tokens", "error", "token_ids", "logprobs",
    "samples",
)  # fmt: skip
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


@dataclass(frozen=True)
class IdType:
    """What a column holds ids as: integers where all of them are, else texts."""

    smallest: int | None
    """The range of the integers; None for texts."""
    largest: int | None

    @classmethod
    def of(cls, facts: Facts) -> "IdType":
        """Look at the ids of all rows."""
        smallest = largest = 0
        for row in range(facts.tokens.num_rows):
            identity = facts.tokens.id(row)
            if isinstance(identity, str):
                return cls(None, None)
            if identity is not None:
                smallest, largest = min(smallest, identity), max(largest, identity)
        fits = smallest >= -(2**63) and largest < 2**63
        return cls(smallest, largest) if fits else cls(None, None)

    def stored(self, identity: RowId | None) -> RowId | None:
        """Return an id as the column holds it."""
        if identity is None or self.smallest is not None:
            return identity
        return str(identity).encode("utf-8", "replace").decode()

    def arrow(self, columns: Any) -> Any:
        """Return the pyarrow.DataType: that of the corpus' own column of ids, if they fit it."""
        import pyarrow as pa

        if columns is not None and "id" in columns.names:
            kind = columns.field("id").type
            if self.smallest is None:
                if pa.types.is_string(kind) or pa.types.is_large_string(kind):
                    return kind
            elif pa.types.is_integer(kind):
                try:
                    pa.array([self.smallest, self.largest], kind)
                except (pa.ArrowException, OverflowError):
                    pass
                else:
                    return kind
        return pa.string() if self.smallest is None else pa.int64()
