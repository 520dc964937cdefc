"""Map the columns that people have to the keys of a row: prompt, chat, id, parameters. Pure.

A row is read by known keys, as a line of OpenAI's batch format, or by the job's flags. Columns with other names are
never guessed: the message names the flag.
"""

import functools
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from hpc.corpus.decode import short
from hpc.corpus.errors import RowError
from hpc.corpus.openai import BatchRules, batch_id, is_batch_line, read_batch_line
from hpc.corpus.row import PROMPT_KEYS, Given, row_id
from hpc.corpus.turns import CHAT_KEYS, ChatRules, from_conversations, is_chat, without_answer
from hpc.job import Job
from hpc.prompts import PromptTemplate
from hpc.request import RowId

_ROW_KEYS = frozenset((*PROMPT_KEYS, "id", "sampling"))
_CHAT_ROW_KEYS = _ROW_KEYS | set(CHAT_KEYS)
_IDS = ("id", "custom_id")
_CONVERSATIONS = "conversations"
_LINE_KEYS = frozenset({"custom_id", "method", "url", "body"})
_AS_JSON = frozenset({"messages", "prompt_token_ids", "sampling", "tools", "documents", "chat_template_kwargs"})
"""Columns that a table may have as JSON in a string."""
_LIKELY = ("question", "instruction", "query", "problem", "text", "input", "content")
"""Columns that the message suggests first where a row has no prompt."""


class NoPrompt(RowError):
    """A row has text, but no column that is read as the prompt."""

    def __init__(self, message: str) -> None:
        super().__init__("prompt", message)


@dataclass(frozen=True)
class Columns:
    """Which columns of a row are read, and as what."""

    names: Mapping[str, str] = field(default_factory=dict)
    """The corpus' name of a column by our name, where they differ; an empty name means no column."""
    template: PromptTemplate | None = None
    """Makes the prompt of a row's columns."""
    chat: ChatRules = field(default_factory=ChatRules)
    batch: BatchRules = field(default_factory=BatchRules)

    @classmethod
    def of(cls, job: Job) -> "Columns":
        """Return the columns of a job."""
        folder = job.model.rstrip("/").rpartition("/")[2]
        batch = BatchRules(
            job.unknown_parameters,
            frozenset({job.model, folder, folder.removesuffix(".gguf")}),
            job.sampling.temperature,
            job.sampling.max_new_tokens,
            job.return_token_ids,
        )
        return replace(cls.said(job.prompt_values()), batch=batch)

    @classmethod
    def said(cls, values: Mapping[str, Any]) -> "Columns":
        """Return the columns that `hpc.job.Job.prompt_values` describes; lines of a batch are read by default rules."""
        names = dict(text.split("=", 1) for text in values.get("column", ()))
        template = values.get("prompt_template")
        chat = ChatRules(
            values.get("last_assistant", "refuse"),
            json.loads(values.get("chat_template_kwargs") or "{}"),
            values.get("row_chat_templates", False),
            values.get("system", ""),
        )
        return cls(names, PromptTemplate.of(template) if template else None, chat)

    @functools.cached_property
    def wanted(self) -> frozenset[str]:
        """The columns that requests may depend on: only these are read of a table."""
        theirs = {self.names.get(name, name) for name in (*_ROW_KEYS, *CHAT_KEYS)}
        return frozenset(theirs | {_CONVERSATIONS} | _LINE_KEYS | set(self.template.names if self.template else ()))

    def read(self, value: Mapping[str, Any]) -> Given:
        """Return a row in our own keys; raise `RowError` where it has no prompt, or more than one."""
        if self._as_rows_are and _is_plain(value):
            return Given(value)
        if self._is_batch_line(value):
            line = read_batch_line(value, self.batch)
            if not self.chat.system or "messages" in line.row:
                return Given(line.row, line.names, line.exact_length, line.notes)
            note = "lines of completions have no turns: --system does not apply to them"
            return Given(line.row, line.names, line.exact_length, (*line.notes, note))
        own = {ours: value.get(theirs) for ours, theirs in self._read_from(value).items()}
        for name in _AS_JSON & own.keys():
            own[name] = _from_json(own[name])
        notes = []
        if self.template is not None:
            try:
                own["prompt"] = self.template.fill(value)
            except KeyError as error:
                raise NoPrompt(
                    f'the row has no "{error.args[0]}" for --prompt-template but {short(list(value))}: name these in '
                    "its braces"
                ) from None
        elif "messages" in self.names and isinstance(own.get("messages"), str):
            own["messages"] = [{"role": "user", "content": own["messages"]}]
        elif is_chat(own.get("prompt")) and own.get("messages") is None:
            own["messages"] = own.pop("prompt")
        elif isinstance(own.get("prompt"), str) and is_chat(own.get("messages")):
            del own["prompt"]
            own["messages"] = without_answer(list(own["messages"] or ()))
            notes.append(
                'rows have "prompt" beside "messages": their chats are taken, without the turns of the assistant at '
                "their end"
            )
        own["messages"] = from_conversations(own.get("messages"))
        if self.chat.system and isinstance(prompt := own.get("prompt"), str) and prompt:
            own["messages"] = [{"role": "user", "content": own.pop("prompt")}]
        elif self.chat.system and own.get("prompt_token_ids") is not None:
            notes.append("rows of token ids have no turns: --system does not apply to them")
        self._check_one_prompt(own, value)
        return Given(own, notes=tuple(notes))

    def shown(self, value: Mapping[str, Any]) -> str:
        """Return the prompt of a row for display: its text, or the text of its last turn."""
        try:
            own = self.read(value).value
        except RowError:
            return short(value)
        turns = own.get("messages")
        if isinstance(turns, list) and turns and isinstance(turns[-1], dict):
            content = turns[-1].get("content")
            return content if isinstance(content, str) else short(content)
        return str(own.get("prompt") or own.get("prompt_token_ids"))

    def identify(self, value: Mapping[str, Any] | RowError, row: int) -> RowId | None:
        """Return the id of a row as far as it can be read."""
        if isinstance(value, RowError):
            return None
        try:
            return self.id_of(value, row)
        except RowError:
            return None

    def identify_and_keep(self, value: Mapping[str, Any] | RowError, row: int) -> tuple[RowId | None, dict[str, Any]]:
        """Return the id of a row as far as it can be read, and what it carries: of the usual kind in one go."""
        if isinstance(value, RowError):
            return None, {}
        if self._as_rows_are and type(value.get("prompt")) is str and value.get("messages") is None:
            given = value.get("id")
            if type(given) is str or type(given) is int:
                return given, {name: kept for name, kept in value.items() if name not in _ROW_KEYS}
        return self.identify(value, row), self.meta_of(value)

    def id_of(self, value: Mapping[str, Any], row: int) -> RowId:
        """Return the id of a row: the one it names, else its index; raise `RowError` for one that can be none."""
        if self._is_batch_line(value):
            return batch_id(value)
        theirs = self.names.get("id", "id")
        if "id" in self.names and theirs and value.get(theirs) is None:
            raise RowError("id", f'the row has no "{theirs}" (--column id={theirs}) but {short(list(value))}')
        return row_id(value, row, theirs)

    def meta_of(self, value: Mapping[str, Any]) -> dict[str, Any]:
        """Return the columns of a row that are not read, which are carried to the output."""
        if self._as_rows_are and (value.get("messages") is not None or type(value.get("prompt")) is str):
            # As it is found below, at a fifth of the time.
            keys = _ROW_KEYS if value.get("messages") is None else _CHAT_ROW_KEYS
            return {name: kept for name, kept in value.items() if name not in keys}
        if self._is_batch_line(value):
            used = _LINE_KEYS
        else:
            used = frozenset((self.names.get("id", "id"), *self._read_from(value).values()))
        return {name: kept for name, kept in value.items() if name not in used}

    @functools.cached_property
    def _as_rows_are(self) -> bool:
        return not (self.names or self.template or self.chat.system)

    def _is_batch_line(self, value: Mapping[str, Any]) -> bool:
        return is_batch_line(value) and not self._says_prompt()

    def _says_prompt(self) -> bool:
        return self.template is not None or any(self.names.get(name) for name in PROMPT_KEYS)

    def _read_from(self, value: Mapping[str, Any]) -> dict[str, str]:
        """Return the columns that a row is read from, by our names."""
        names = {"sampling": self.names.get("sampling", "sampling")}
        if self.template is None:
            said = {ours: theirs for ours in PROMPT_KEYS if (theirs := self.names.get(ours))}
            names |= said or {ours: ours for ours in PROMPT_KEYS if ours not in self.names}
            if not said and _CONVERSATIONS in value and all(value.get(ours) is None for ours in PROMPT_KEYS):
                names["messages"] = _CONVERSATIONS
        if self.chat.system or "messages" in self.names or self._has_turns(names, value):
            names |= {ours: self.names.get(ours, ours) for ours in CHAT_KEYS}
        return {ours: theirs for ours, theirs in names.items() if theirs}

    def _has_turns(self, names: Mapping[str, str], value: Mapping[str, Any]) -> bool:
        found = [value.get(names.get(ours, "")) for ours in ("messages", "prompt")]
        return found[0] is not None or is_chat(found[1])

    def _check_one_prompt(self, own: Mapping[str, Any], value: Mapping[str, Any]) -> None:
        given = [name for name in PROMPT_KEYS if own.get(name) is not None]
        if len(given) == 1:
            return
        rule = 'it must have one of "prompt", "messages", "prompt_token_ids"'
        if given:
            found = " and ".join(f'"{name}"' for name in given)
            raise RowError("prompt", f"the row has {found}; {rule}")
        said = [f"{ours}={theirs}" for ours in PROMPT_KEYS if (theirs := self.names.get(ours))]
        if said:
            raise NoPrompt(
                f"the row has no prompt (--column {' '.join(said)}) but {short(list(value))}: name one of these there"
            )
        message = f"the row has no prompt but {short(list(value))}; {rule}"
        if not (flag := _way_out(value)):
            raise RowError("prompt", message)
        raise NoPrompt(f"{message}; other columns are not guessed: {flag}")


def _is_plain(value: Mapping[str, Any]) -> bool:
    """Return whether a row needs no mapping: it has one prompt, a text or turns, under our own name."""
    prompt, messages = value.get("prompt"), value.get("messages")
    if value.get("prompt_token_ids") is not None or (prompt is None) == (messages is None):
        return False
    if type(value.get("sampling")) is str:  # JSON in a cell
        return False
    if prompt is not None:
        return type(prompt) is str
    turns = type(messages) is list and bool(messages) and type(messages[0]) is dict and "from" not in messages[0]
    return turns and value.keys().isdisjoint(CHAT_KEYS)


def refusal(rows: Iterable[Mapping[str, Any] | RowError], columns: Columns) -> str | None:
    """Return the error of the first row if no row has a column that is read as the prompt; None otherwise."""
    reason = None
    for value in rows:
        if isinstance(value, RowError):
            continue
        try:
            columns.read(value)
        except NoPrompt as error:
            reason = reason or str(error)
        except RowError:
            return None
        else:
            return None
    return reason


def _way_out(value: Mapping[str, Any]) -> str:
    """Return a suggestion of flags for a row without a prompt; empty if no column has text."""
    texts = [name for name, given in value.items() if isinstance(given, str) and given and name not in _IDS]
    if not texts:
        return ""
    first = min(texts, key=lambda name: _LIKELY.index(name) if name in _LIKELY else len(_LIKELY))
    if first == "instruction" and "input" in value:
        return "--prompt-template '{instruction} {input}' makes a prompt of these"
    return f"--column prompt={first} takes that one, --prompt-template makes a prompt of several"


def _from_json(value: object) -> Any:
    """Return the value of a cell, decoded if it is JSON in a string."""
    if value == "":  # an empty cell of a CSV file
        return None
    if isinstance(value, str) and value.lstrip()[:1] in ("[", "{"):
        try:
            return json.loads(value)
        except (ValueError, RecursionError):
            return value
    return value
