"""What a job may say of how rows become prompts: columns, a template of text, variables of the chat template. Pure."""

import json
import string
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

RESERVED = frozenset({
    "messages", "tools", "documents", "chat_template", "add_generation_prompt", "continue_final_message", "tokenize",
    "conversation", "return_dict", "return_tensors", "return_assistant_tokens_mask", "sanitize_control_tokens",
    "padding", "truncation", "max_length", "tokenizer_kwargs",
})  # fmt: skip
"""Names that `chat_template_kwargs` may not have, since they are arguments of their own."""

COLUMNS = (
    "prompt", "messages", "prompt_token_ids", "id", "sampling", "tools", "documents", "chat_template_kwargs",
    "chat_template",
)  # fmt: skip
"""What a column may be read as."""


def check_columns(given: Sequence[str]) -> None:
    """Raise `ValueError` for what says of no column, or twice of one, by which name a row has it."""
    ours = [text.partition("=")[0] for text in given]
    for text, name in zip(given, ours, strict=True):
        if "=" not in text or name not in COLUMNS:
            raise ValueError(
                f'"column" is {text!r}; it must be prompt=question, with one of {", ".join(COLUMNS)} first'
            )
        if ours.count(name) > 1:
            raise ValueError(f'"column" says twice which column is {name}; it must say so once')


def canonical_variables(text: str) -> str:
    """Return the JSON of an object as it is written down, nothing for nothing; raise `ValueError` for anything else."""
    rule = 'it must be a JSON object, such as {"enable_thinking": false}'
    try:
        variables = json.loads(text) if text else {}
    except ValueError as error:
        raise ValueError(f'"chat_template_kwargs" is {text!r}; {rule} ({error})') from None
    if not isinstance(variables, dict):
        raise ValueError(f'"chat_template_kwargs" is {text!r}; {rule}')
    if taken := sorted(RESERVED & variables.keys()):
        raise ValueError(f'"chat_template_kwargs" has "{taken[0]}", which is no variable of a template')
    return json.dumps(variables, sort_keys=True, ensure_ascii=False) if variables else ""


@dataclass(frozen=True)
class PromptTemplate:
    """Text and names of columns in turn. It is no program: nothing but names stands in its braces."""

    parts: tuple[tuple[str, str | None], ...]
    """Of each, the text before the column, and the name of the column; None behind the last."""

    @classmethod
    def of(cls, text: str) -> "PromptTemplate":
        """Parse a template; raise `ValueError` for one that names no column, or something that is more than a name."""
        rule = "it must have names of columns in braces, such as 'Translate to German: {text}'"
        try:
            parts = list(string.Formatter().parse(text))
        except ValueError as error:
            raise ValueError(
                f'"prompt_template" is {text!r}; {rule} ({error}; a brace itself is written twice)'
            ) from None
        for _, name, form, conversion in parts:
            if name is not None and (not name or form or conversion):
                raise ValueError(f'"prompt_template" is {text!r}; {rule}, and nothing but a name in them')
        if all(name is None for _, name, _, _ in parts):
            raise ValueError(f'"prompt_template" is {text!r}; {rule}: without one all prompts are the same')
        return cls(tuple((literal, name) for literal, name, _, _ in parts))

    @property
    def names(self) -> tuple[str, ...]:
        """The columns that it names, each once, in their order."""
        return tuple(dict.fromkeys(name for _, name in self.parts if name is not None))

    def fill(self, row: Mapping[str, Any]) -> str:
        """Return the text with the values of a row, those that are no strings as JSON; raise `KeyError` for none."""
        return "".join(literal + ("" if name is None else _written(row, name)) for literal, name in self.parts)


def _written(row: Mapping[str, Any], name: str) -> str:
    value = row.get(name)
    if value is None:
        raise KeyError(name)
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)
