"""Check a row: the rules for a row in our own keys that need no model.

Knows nothing of formats, columns, models, ranks or run directories. A row that breaks a rule raises `RowError`; the
rules stand in docs/formats.md under "Input".
"""

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from hpc.corpus.chat import PLAIN, ChatOptions
from hpc.corpus.decode import short
from hpc.corpus.errors import RowError
from hpc.corpus.turns import ChatRules, check_chat, check_text
from hpc.request import RowId
from hpc.sampling_params import SamplingParams

PROMPT_KEYS = ("prompt", "messages", "prompt_token_ids")
_MAX_WHOLE = 2**53
"""Up to here a float says a whole number exactly."""


@dataclass(frozen=True)
class Given:
    """A row in our own keys, with exactly one prompt; see `hpc.corpus.columns.Columns.read`."""

    value: Mapping[str, Any]
    names: Mapping[str, str] = field(default_factory=dict)
    """Sampling parameters that the row calls by another name: ours and theirs."""
    exact_length: bool = False
    """Whether a completion that the context makes shorter than `max_new_tokens` is not what the row asks for."""
    notes: tuple[str, ...] = ()
    """What the user should hear of once."""


@dataclass(frozen=True)
class Row:
    """A checked row. Exactly one of `prompt`, `messages` and `token_ids` is not None."""

    id: RowId
    prompt: str | None
    messages: list[dict[str, Any]] | None
    """Turns of role, content (a string, or a list of text parts) and what else the chat template may know."""
    token_ids: list[int] | None
    sampling: SamplingParams
    options: ChatOptions = PLAIN
    """How `messages` are written."""
    exact_length: bool = False
    """As that of `Given`."""


def row_id(value: Mapping[str, Any], row: int, column: str = "id") -> RowId:
    """Return the id of a row: the one in a column, else its index."""
    given = value.get(column)
    if type(given) is str or type(given) is int:
        return given
    if given is None:
        return row
    if isinstance(given, float) and given.is_integer() and abs(given) <= _MAX_WHOLE:  # pandas' integers beside gaps
        return int(given)
    if isinstance(given, bool) or not isinstance(given, int | str):
        raise RowError("id", f'"{column}" is {short(given)}; it must be a string or an integer')
    return given


def check_row(given: Given, identity: RowId, defaults: SamplingParams, rules: ChatRules) -> Row:
    """Check a row against every rule that needs no model."""
    value = given.value
    prompt = messages = token_ids = None
    options = PLAIN
    if value.get("prompt") is not None:
        prompt = check_text(value["prompt"], '"prompt"')
        if not prompt:
            raise RowError("empty", '"prompt" is empty; it must have at least one character')
    elif value.get("messages") is not None:
        messages, options = check_chat(value, rules)
    else:
        token_ids = _token_ids(value.get("prompt_token_ids"))
    sampling = _sampling(value.get("sampling"), defaults, given.names)
    return Row(identity, prompt, messages, token_ids, sampling, options, given.exact_length)


def _token_ids(value: object) -> list[int]:
    if not isinstance(value, list) or not all(isinstance(t, int) and not isinstance(t, bool) for t in value):
        raise RowError("token_ids", f'"prompt_token_ids" is {short(value)}; it must be a list of integers')
    if not value:
        raise RowError("empty", '"prompt_token_ids" is empty; it must have at least one token')
    return value


def _sampling(value: object, defaults: SamplingParams, names: Mapping[str, str]) -> SamplingParams:
    """Return the job's parameters with a row's own in their place; `names` are what the row calls them."""
    if value is None:
        return defaults
    if not isinstance(value, dict):
        known = ", ".join(each.name for each in dataclasses.fields(defaults))
        raise RowError("sampling", f'"sampling" is {short(value)}; it must be an object with some of {known}')
    try:
        return defaults.overridden(value)
    except ValueError as error:
        message = str(error)
        for ours, theirs in names.items():
            message = message.replace(f'"{ours}"', f'"{theirs}"')
        raise RowError("sampling", message) from None
