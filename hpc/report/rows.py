"""Read rows of a run, finished or running, from its run directory: input and output of each."""

import json
import random
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from hpc.arrays import Ints
from hpc.corpus.columns import Columns
from hpc.corpus.errors import CorpusError, RowError
from hpc.corpus.files import Blocks
from hpc.corpus.formats import rows as rows_of
from hpc.exit import Refusal
from hpc.output import journal
from hpc.output.verify import RecordedRun
from hpc.output.write import what_is_gone
from hpc.request import Completion, RowId

FIELDS = ("id", "finish_reason", "error", "text", "prompt_tokens", "completion_tokens")
"""Fields of a condition, besides `meta.KEY`, a key of the row in the corpus."""


@dataclass(frozen=True)
class Answered:
    """A row of a run: input and output."""

    row: int
    id: RowId | None
    place: str
    """Its place in the corpus; empty if the corpus cannot be read."""
    given: dict[str, Any] | None
    """The row of the corpus; None if it, or the corpus, cannot be read."""
    read_as: Mapping[str, Any] | None
    """The same in our own keys, as the prompt is made of it."""
    prompt_tokens: int
    completion: Completion | None
    """None for a refused row, and for one that is not finished."""
    error: Mapping[str, str] | None

    @property
    def finish_reason(self) -> str:
        """Finish reason of its first sample; "error", or "pending" before it has a completion."""
        if self.error is not None:
            return "error"
        return "pending" if self.completion is None else str(self.completion.finish_reason)

    def value(self, name: str) -> Any:
        """Return the value of a field of `FIELDS`; "error" is the kind of the error."""
        if name == "error":
            return self.error["kind"] if self.error else None
        if name in ("text", "completion_tokens"):
            what = "num_tokens" if name == "completion_tokens" else "text"
            return getattr(self.completion, what) if self.completion else None
        return getattr(self, name)


@dataclass(frozen=True)
class Condition:
    """A field and the value that it must have."""

    field: str
    value: str

    @classmethod
    def of(cls, text: str) -> "Condition":
        """Parse FIELD=VALUE; raise `Refusal` if that is not its form or there is no such field."""
        field, equals, value = text.partition("=")
        if not equals or not (field in FIELDS or field.startswith("meta.")):
            raise Refusal(
                f"--where {text}: it must be FIELD=VALUE, FIELD one of {', '.join(FIELDS)} or meta.KEY, a key of the "
                "corpus' rows"
            )
        return cls(field, value)

    @property
    def key(self) -> str | None:
        """The key of the corpus row; None for a field of the output."""
        return self.field.removeprefix("meta.") if self.field.startswith("meta.") else None

    def holds(self, value: Any) -> bool:
        """Return whether a value equals that of the condition: both as JSON, strings without quotes."""
        return self.value == (value if isinstance(value, str) else json.dumps(value, ensure_ascii=False))


class RunRows:
    """The rows of a run, by their index in the corpus."""

    def __init__(self, path: Path) -> None:
        """Open a run directory; raise `Refusal` if it is none, or its corpus was not read to the end."""
        self.run = RecordedRun.open(path)
        self._records = self.run.index.find(self.run.tokens.keys)
        self._refused = dict(self.run.tokens.errors())
        self._columns = Columns.said(self.run.tokens.inputs.get("prompts", {}))
        self.gone = what_is_gone(self.run.tokens)
        """Names the corpus file that is missing or changed; empty if all are as they were."""

    @property
    def answered(self) -> Ints:
        """The rows with a completion or an error, in order."""
        tokens = self.run.tokens
        return np.flatnonzero((self._records >= 0) | ~tokens.good)

    def named(self, ids: Sequence[str]) -> Ints:
        """Return the rows whose id, as text, is one of `ids`; raise `Refusal` for an id that no row has."""
        tokens, wanted = self.run.tokens, set(ids)
        found = [(row, str(identity)) for row in range(tokens.num_rows) if (identity := tokens.id(row)) is not None]
        rows = [row for row, name in found if name in wanted]
        if missing := sorted(wanted - {name for _, name in found}):
            raise Refusal(f"no row of {self.run.directory.path} has the id {', '.join(missing)}")
        return np.array(rows, dtype=np.int64)

    def select(self, rows: Ints, conditions: Sequence[Condition]) -> Iterator[int]:
        """Yield the rows, of those given, that fulfil all conditions, in order."""
        about_input = [condition for condition in conditions if condition.key is not None]
        about_output = [condition for condition in conditions if condition.key is None]
        if about_input:
            if self.gone:
                raise Refusal(f"--where {about_input[0].field}: {self.gone}; conditions on the output can be checked")
            given = ((row, self._columns.meta_of(value or {})) for row, _, value in self._corpus(rows))
            rows = np.array(
                [row for row, meta in given if all(c.key in meta and c.holds(meta[c.key]) for c in about_input)],
                dtype=np.int64,
            )
        if not about_output:
            yield from rows.tolist()
            return
        for answered in self.outputs(rows):
            if all(condition.holds(answered.value(condition.field)) for condition in about_output):
                yield answered.row

    def read(self, rows: Sequence[int]) -> list[Answered]:
        """Return rows with input and output, in the order of the corpus."""
        ordered = np.array(sorted(rows), dtype=np.int64)
        given = {} if self.gone else {row: (place, value) for row, place, value in self._corpus(ordered)}
        found = []
        for answered in self.outputs(ordered):
            place, value = given.get(answered.row, ("", None))
            found.append(replace(answered, place=place, given=value, read_as=self._own(value)))
        return found

    def _own(self, value: dict[str, Any] | None) -> Mapping[str, Any] | None:
        """Return a row in our own keys; a row without a prompt as it stands."""
        try:
            return value and self._columns.read(value).value
        except RowError:
            return value

    def sample(self, rows: Sequence[int], count: int) -> list[int]:
        """Draw `count` of the rows at random; return them in order."""
        return sorted(random.sample(rows, min(count, len(rows))))

    def _completions(self, rows: Ints) -> Iterator[tuple[int, Completion]]:
        """Yield row and completion of each row that has one."""
        rows = rows[(self._records[rows] >= 0) & self.run.tokens.good[rows]]
        for row, record in zip(rows.tolist(), self.run.index.read(self._records[rows].tolist()), strict=True):
            try:
                yield row, journal.decode(record)
            except ValueError as error:
                raise Refusal(f"row {row} of {self.run.directory.path}: {error}; run the job again") from error

    def outputs(self, rows: Ints) -> Iterator[Answered]:
        """Yield rows with output alone."""
        tokens = self.run.tokens
        completions = self._completions(rows)
        following = next(completions, None)
        for row in rows.tolist():
            completion = None
            if following is not None and following[0] == row:
                completion, following = following[1], next(completions, None)
            error = self._refused.get(row) or (completion.error if completion else None)
            prompt_tokens = 0 if row in self._refused else len(tokens.tokens(row))
            yield Answered(row, tokens.id(row), "", None, None, prompt_tokens, completion, error)

    def _corpus(self, rows: Ints) -> Iterator[tuple[int, str, dict[str, Any] | None]]:
        """Yield index, place and value of rows of the corpus; None for a row that cannot be read. Stop at the last."""
        wanted = iter(rows.tolist())
        following = next(wanted, None)
        try:
            for block in Blocks(self.run.tokens.files, limit=self.run.tokens.inputs["limit"]):
                if following is None:
                    return
                if following >= block.first_row + block.num_rows:
                    continue
                for row, place, value in rows_of(block):
                    if row == following:
                        yield row, str(place), None if isinstance(value, RowError) else value
                        following = next(wanted, None)
        except CorpusError as error:
            raise Refusal(str(error)) from error


def prompt_of(row: Mapping[str, Any]) -> Iterable[tuple[str, str]]:
    """Yield role and text of each turn of a row in our own keys; a prompt without turns is one with the role ""."""
    messages = row.get("messages")
    if isinstance(messages, list):
        for turn in messages:
            known = isinstance(turn, dict)
            yield (str(turn.get("role")), text_of(turn.get("content"))) if known else ("", str(turn))
        return
    yield "", text_of(row.get("prompt") if row.get("prompt") is not None else row.get("prompt_token_ids"))


def text_of(content: Any) -> str:
    """Return the text of a turn's content: a string, or a list of text parts, joined as the chat template has them."""
    if isinstance(content, list) and all(isinstance(part, dict) and "text" in part for part in content):
        return "\n".join(str(part["text"]) for part in content)
    return "" if content is None else str(content)
