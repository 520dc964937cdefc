"""Which languages a row is about: those of a multilingual model, and those that an instruction names."""

import functools
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

from hpc.corpus.errors import RowError
from hpc.corpus.row import Row
from hpc.sampling_params import SamplingParams

_PLACES = re.compile(r"\{(prompt|source_lang|target_lang)\}")
"""Where an instruction names what goes into it."""


class Languages(Protocol):
    """What is needed of the languages of a multilingual model; see `hpc.model.languages.Languages`."""

    def encode(self, texts: Sequence[str], source: str) -> list[list[int]]:
        """Tokenize texts of a source language."""

    @property
    def in_source(self) -> bool:
        """Whether the source text names the target language."""

    def mark(self, text: str, target: str) -> str:
        """Return a source text as the model reads it."""

    def target_token(self, target: str) -> int | None:
        """Return the token that an output in a language begins with."""

    def problem(self, name: str, code: object) -> str | None:
        """Return what is wrong with a language."""


@dataclass(frozen=True)
class Marked:
    """A row whose languages are a part of its text and of its sampling parameters, and so of its key."""

    text: str | None
    sampling: SamplingParams
    source_lang: str = ""


@dataclass(frozen=True)
class Translation:
    """The languages of a job; a row's own go before them."""

    languages: Languages | None = None
    """None for a model that knows none."""
    source_lang: str = ""
    target_lang: str = ""
    instruction: str = ""
    """The text that a row's prompt is put into; empty: the prompt stands alone."""
    must_name_target: bool = False
    """Whether a model that knows languages does not itself say how its output begins."""

    def problem(self) -> str | None:
        """Return what is wrong with the job's languages; None if the model has them, or the job names none."""
        for name, code in self._named({}):
            if f"{{{name}}}" in self.instruction:
                continue
            if code and self.languages is None:
                return f'"{name}" is {code!r}, and the tokenizer of the model knows no languages; leave it out'
            if code and self.languages is not None and (problem := self.languages.problem(name, code)):
                return problem
        return None

    def instruct(self, row: Row, value: Mapping[str, Any], as_chat: bool) -> Row:
        """Put a row's prompt into the job's instruction; `as_chat` makes a chat of it, for a model with a template."""
        if not self.instruction or row.prompt is None:
            return row
        words = {"prompt": row.prompt, **{name: str(code) for name, code in self._named(value)}}
        for name, word in words.items():
            if not word and name != "prompt" and f"{{{name}}}" in self.instruction:
                raise RowError(
                    "language", f'neither the row\'s "{name}" nor --{name.replace("_", "-")} names a language'
                )
        text = _PLACES.sub(lambda place: words[place[1]], self.instruction)
        if not as_chat:
            return replace(row, prompt=text)
        return replace(row, prompt=None, messages=[{"role": "user", "content": text}])

    def mark(self, text: str | None, sampling: SamplingParams, value: Mapping[str, Any]) -> Marked:
        """Mark a row with its languages.

        To a model without languages these keys mean nothing: they are carried as any other.
        """
        if self.languages is None:
            return Marked(text, sampling)
        named = self._named(value)
        for name, code in named:
            if code and (problem := self.languages.problem(name, code)):
                raise RowError("language", problem)
        (_, source), (_, target) = named
        if target:
            text = None if text is None else self.languages.mark(text, target)
            token = self.languages.target_token(target)
            if token is not None and sampling.forced_bos_token_id is None:
                sampling = _beginning_with(sampling, token)
        elif sampling.forced_bos_token_id is None and self._lacks_target(self.languages, text):
            raise RowError(
                "language",
                'the model writes many languages, and neither the row\'s "target_lang" nor --target-lang names one',
            )
        return Marked(text, sampling, str(source))  # a Marian model takes any source

    def _named(self, value: Mapping[str, Any]) -> list[tuple[str, Any]]:
        return [(name, value.get(name) or getattr(self, name)) for name in ("source_lang", "target_lang")]

    def _lacks_target(self, languages: Languages, text: str | None) -> bool:
        """Return whether nothing says which language a multilingual model is to write."""
        if not self.must_name_target:
            return False
        return not languages.in_source or (text is not None and not text.startswith(">>"))


@functools.lru_cache(maxsize=1 << 14)
def _beginning_with(sampling: SamplingParams, token: int) -> SamplingParams:
    return replace(sampling, forced_bos_token_id=token)
