"""Check and tokenize the rows of a block: decoded values in; token ids, keys and errors out.

Pure but for the tokenizer.
"""

import dataclasses
import functools
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

import numpy as np

from hpc.corpus import store
from hpc.corpus.chat import ChatOptions, LostText, Turn, unread
from hpc.corpus.columns import Columns
from hpc.corpus.errors import RowError
from hpc.corpus.formats import Block, Place, rows
from hpc.corpus.notes import note_lines
from hpc.corpus.row import Row, check_row
from hpc.request import KEY_BYTES, RowId, completion_key
from hpc.sampling_params import SamplingParams

_PLACES = re.compile(r"\{(prompt|source_lang|target_lang)\}")
"""Where an instruction names what goes into it."""


class Encoder(Protocol):
    """What is needed of a tokenizer; see `hpc.model.tokenizer.Tokenizer`."""

    @property
    def has_template(self) -> bool:
        """Whether chats can be rendered."""

    def render(self, messages: Sequence[Turn], options: ChatOptions) -> str:
        """Write a chat as text; raise `LostText` where text of it would not be there."""

    def template_source(self, options: ChatOptions) -> str:
        """Return the source of the template that writes a chat with these options."""

    def token(self, token_id: int) -> str:
        """Return what a token is called."""

    def encode(self, texts: Sequence[str], special_tokens: bool) -> list[list[int]]:
        """Tokenize texts."""


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
class OutputLimits:
    """What an encoder-decoder allows of a completion."""

    vocab_size: int
    tokens: int | None
    """Max tokens of a completion; None is no limit."""
    begins: bool = False
    """The model itself says how the output begins: no target language needs to be named."""


@dataclass(frozen=True)
class PromptLimits:
    """What the model and the job allow."""

    vocab_size: int
    context_tokens: int | None
    """Max tokens of prompt and completion together, of an encoder-decoder those of the prompt; None is no limit."""
    truncate_prompts: str = "none"
    chat_ending: int | None = None
    """A token that ends the completion of a chat, besides the model's end-of-sequence tokens."""
    output: OutputLimits | None = None
    """The limits of an encoder-decoder's completions; None for a causal language model."""


@dataclass(frozen=True)
class Checker:
    """All that it takes to turn rows into requests, the same on every rank."""

    defaults: SamplingParams
    limits: PromptLimits
    encoder: Encoder
    columns: Columns = dataclasses.field(default_factory=Columns)
    languages: Languages | None = None
    """None for a model that knows none."""
    source_lang: str = ""
    target_lang: str = ""
    """The job's languages; a row's go before them."""
    instruction: str = ""
    """The text that a row's prompt is put into; empty: the prompt stands alone."""

    def languages_fault(self) -> str | None:
        """Return what is wrong with the job's languages; None if the model has them, or the job names none."""
        given = {"source_lang": self.source_lang, "target_lang": self.target_lang}
        for name, code in given.items():
            if f"{{{name}}}" in self.instruction:
                continue
            if code and self.languages is None:
                return f'"{name}" is {code!r}, and the tokenizer of the model knows no languages; leave it out'
            if code and self.languages is not None and (problem := self.languages.problem(name, code)):
                return problem
        return None

    def check_block(self, block: Block) -> store.Arrays:
        """Return the rows of a block as arrays, a refused row as one without tokens.

        lengths, lines, new_tokens, samples, request_bytes [rows] int64; refused [rows] uint8; id_hashes
        [rows] uint64; keys [rows, KEY_BYTES]; tokens [sum(lengths)] int32; requests, errors and
        notes (what the user should hear of once, and where it was first) are JSON lines as bytes.
        """
        found = [self._check_row(row, place, value) for row, place, value in rows(block, self.columns.wanted)]
        self._encode(found)
        for entry in found:
            self._check_vocabulary(entry)
            self._fit(entry)
        prompts = [np.asarray(entry.token_ids, dtype=np.int32) for entry in found]
        requests = [store.request_line(entry.identity, self._overrides(entry)) for entry in found]
        keys = [
            bytes(KEY_BYTES)
            if entry.error is not None or entry.identity is None
            else completion_key(prompt, entry.sampling, entry.identity)
            for entry, prompt in zip(found, prompts, strict=True)
        ]
        errors = [
            store.error_line(entry.row, entry.error.kind, f"{entry.place}: {entry.error}")
            for entry in found
            if entry.error is not None
        ]
        notes = [(str(entry.place), entry.notes) for entry in found if entry.error is None and entry.notes]
        return {
            "lengths": np.array([len(prompt) for prompt in prompts], dtype=np.int64),
            "lines": np.array([entry.place.number for entry in found], dtype=np.int64),
            "new_tokens": np.array([entry.sampling.max_new_tokens for entry in found], dtype=np.int64),
            "samples": np.array([entry.sampling.n for entry in found], dtype=np.int64),
            "refused": np.array([entry.error is not None for entry in found], dtype=np.uint8),
            "id_hashes": np.array([store.id_hash(entry.identity) for entry in found], dtype=np.uint64),
            "keys": np.frombuffer(b"".join(keys), dtype=np.uint8).reshape(-1, KEY_BYTES),
            "tokens": np.concatenate([np.empty(0, np.int32), *prompts]),
            "requests": np.frombuffer(b"".join(requests), dtype=np.uint8),
            "request_bytes": np.array([len(line) for line in requests], dtype=np.int64),
            "errors": np.frombuffer(b"".join(errors), dtype=np.uint8),
            "notes": np.frombuffer(note_lines(notes), dtype=np.uint8),
        }

    def _check_row(self, row: int, place: Place, value: dict[str, Any] | RowError) -> "_Entry":
        """Return what is known before tokenization of the row whose value stands at a place, its error included."""
        entry = _Entry(row, place, None, self.defaults)
        try:
            if isinstance(value, RowError):
                raise value
            entry.identity = identity = self.columns.id_of(value, row)
            given = self.columns.read(value)
            entry.notes.extend(given.notes)
            entry.checked = self._instruct(check_row(given, identity, self.defaults, self.columns.chat), value)
            entry.sampling = self._sampling(entry.checked)
            entry.text, entry.special = self._text(entry.checked, entry.notes), entry.checked.prompt is not None
            self._translate(entry, value)
            entry.token_ids = self._known(entry.checked.token_ids or [])
        except RowError as error:
            entry.error = error
        return entry

    def _instruct(self, row: Row, value: dict[str, Any]) -> Row:
        """Put a row's prompt into the job's instruction: a chat where the model has a template, else a prompt."""
        if not self.instruction or row.prompt is None:
            return row
        words = {"prompt": row.prompt}
        for name in ("source_lang", "target_lang"):
            words[name] = str(value.get(name) or getattr(self, name))
            if not words[name] and f"{{{name}}}" in self.instruction:
                raise RowError(
                    "language", f'neither the row\'s "{name}" nor --{name.replace("_", "-")} names a language'
                )
        text = _PLACES.sub(lambda place: words[place[1]], self.instruction)
        if not self.encoder.has_template:
            return replace(row, prompt=text)
        return replace(row, prompt=None, messages=[{"role": "user", "content": text}])

    def _sampling(self, row: Row) -> SamplingParams:
        """Return a row's parameters; those of a chat have the token that ends a turn, which is so a part of its key."""
        ending = self.limits.chat_ending
        if row.messages is None or ending is None or row.sampling.ignore_eos:
            return row.sampling
        return _also_ending(row.sampling, ending)

    def _translate(self, entry: "_Entry", value: dict[str, Any]) -> None:
        """Take a row's languages, which become a part of its tokens and of its sampling parameters, and so of its key.

        To a model without languages these keys mean nothing: they are carried as any other.
        """
        if self.languages is not None:
            source, target = (value.get(name) or getattr(self, name) for name in ("source_lang", "target_lang"))
            for name, code in (("source_lang", source), ("target_lang", target)):
                if code and (problem := self.languages.problem(name, code)):
                    raise RowError("language", problem)
            entry.source_lang = str(source)  # a Marian model takes any
            if target:
                entry.text = None if entry.text is None else self.languages.mark(entry.text, target)
                token = self.languages.target_token(target)
                if token is not None and entry.sampling.forced_bos_token_id is None:
                    entry.sampling = _beginning_with(entry.sampling, token)
            elif entry.sampling.forced_bos_token_id is None and self._lacks_target(entry.text):
                raise RowError(
                    "language",
                    'the model writes many languages, and neither the row\'s "target_lang" nor --target-lang names one',
                )
        first, output = entry.sampling.forced_bos_token_id, self.limits.output
        if first is not None and output is None:
            raise RowError(
                "sampling",
                f'"forced_bos_token_id" is {first}; it is for models with an encoder and a decoder: leave it out',
            )
        if first is not None and output is not None and first >= output.vocab_size:
            raise RowError(
                "sampling",
                f'"forced_bos_token_id" is {first}; the model\'s output has tokens 0 to {output.vocab_size - 1}',
            )

    def _lacks_target(self, text: str | None) -> bool:
        """Return whether nothing says which language a multilingual model is to write."""
        if self.limits.output is None or self.limits.output.begins or self.languages is None:
            return False
        return not self.languages.in_source or (text is not None and not text.startswith(">>"))

    def _text(self, row: Row, notes: list[str]) -> str | None:
        """Return the text of a row's prompt, if it has one; add to `notes` what the chat template does not read."""
        if row.messages is None:
            return row.prompt
        if not (self.encoder.has_template or row.options.template):
            raise RowError("template", 'the model has no chat template for "messages"; give the text as "prompt"')
        try:
            text = self.encoder.render(row.messages, row.options)
        except LostText as error:
            raise RowError("template", str(error)) from None
        except Exception as error:  # a template is the model's own program, and may raise anything
            raise RowError("template", f"the model's chat template refuses these messages: {error}") from None
        for name in unread(self.encoder.template_source(row.options), row.messages, row.options):
            if name in ("tools", "documents"):
                raise RowError(
                    "template",
                    f'the model\'s chat template knows no "{name}": they would not be in the prompt. Leave them out, '
                    f"give a template that does with --chat-template, or carry them along with --column {name}=",
                )
            notes.append(f'"{name}" is in chats, and the chat template knows none: it changes nothing')
        return text

    def _known(self, token_ids: list[int]) -> list[int]:
        for index, token in enumerate(token_ids):
            if not 0 <= token < self.limits.vocab_size:
                raise RowError(
                    "token_ids",
                    f'"prompt_token_ids"[{index}] is {token}; the token ids of the model are '
                    f"0 to {self.limits.vocab_size - 1}",
                )
        return token_ids

    def _encode(self, entries: list["_Entry"]) -> None:
        alike: dict[tuple[bool, str], list[_Entry]] = {}
        for entry in entries:
            if entry.error is None and entry.text is not None:
                alike.setdefault((entry.special, entry.source_lang), []).append(entry)
        for (special, source), batch in alike.items():
            try:
                encoded = self._tokens([entry.text or "" for entry in batch], special, source)
                for entry, token_ids in zip(batch, encoded, strict=True):
                    entry.token_ids = token_ids
            except Exception:  # one text that the tokenizer cannot take must not cost the others
                for entry in batch:
                    try:
                        [entry.token_ids] = self._tokens([entry.text or ""], special, source)
                    except Exception as error:
                        entry.error = RowError("tokenize", f"the tokenizer refuses this text: {error}")

    def _tokens(self, texts: list[str], special: bool, source: str) -> list[list[int]]:
        if special and self.languages is not None:
            return self.languages.encode(texts, source)
        return self.encoder.encode(texts, special)

    def _check_vocabulary(self, entry: "_Entry") -> None:
        """Refuse a text for which the tokenizer has tokens that the model has not."""
        if entry.error is None and entry.token_ids and max(entry.token_ids) >= self.limits.vocab_size:
            token = next(token for token in entry.token_ids if token >= self.limits.vocab_size)
            entry.error = RowError(
                "token_ids",
                f"the tokenizer makes token {token} ({self.encoder.token(token)!r}) of this text, and the token ids of "
                f"the model are 0 to {self.limits.vocab_size - 1}: tokenizer or chat template are not this model's; "
                "give the folder of the model the files that it was trained with",
            )
            entry.token_ids = []

    def _fit(self, entry: "_Entry") -> None:
        if entry.error is not None:
            return
        if not entry.token_ids:
            entry.error = RowError("empty", "the prompt has no tokens; it must have at least one")
            return
        if self.limits.output is not None:
            self._fit_sides(entry, self.limits.output)
            return
        context, new = self.limits.context_tokens, entry.sampling.max_new_tokens
        if context is None:
            return
        exact = entry.checked is not None and entry.checked.exact_length
        if exact and (new >= context or (len(entry.token_ids) + new > context and not self._truncates)):
            entry.error = RowError(
                "too_long",
                f"the prompt has {len(entry.token_ids)} tokens and asks for {new} more, and the model's context is "
                f"{context}; ask for fewer, or leave max_tokens out to get what is left",
            )
            entry.token_ids = []
            return
        if len(entry.token_ids) + (new if exact else 0) >= context + exact:
            if not self._truncates:
                entry.error = RowError(
                    "too_long",
                    f"the prompt has {len(entry.token_ids)} tokens; at most {context - 1} leave room for one more in "
                    f"the model's context of {context}; shorten it, or cut it with --truncate-prompts left or right",
                )
                entry.token_ids = []
                return
            room = context - (new if exact else min(new, context // 2))
            left = self.limits.truncate_prompts == "left"
            entry.token_ids = entry.token_ids[-room:] if left else entry.token_ids[:room]
        entry.sampling = _at_most(entry.sampling, context - len(entry.token_ids))

    def _fit_sides(self, entry: "_Entry", output: OutputLimits) -> None:
        """Fit the source to the encoder of an encoder-decoder, and the completion to the decoder."""
        room, count = self.limits.context_tokens, len(entry.token_ids)
        if output.tokens is not None:
            entry.sampling = _at_most(entry.sampling, output.tokens)
        if room is None or count <= room:
            return
        if self.limits.truncate_prompts == "none":
            entry.error = RowError(
                "too_long",
                f"the prompt has {count} tokens; the encoder of the model takes at most {room}; shorten it, or cut it "
                "with --truncate-prompts left or right",
            )
            entry.token_ids = []
            return
        # What the tokenizer puts around a text stays: its language, and the token that ends it.
        head, end = self._frame(entry.source_lang) if entry.special else (0, 0)
        text, own = entry.token_ids[head : count - end], max(1, room - head - end)
        text = text[-own:] if self.limits.truncate_prompts == "left" else text[:own]
        entry.token_ids = [*entry.token_ids[:head], *text, *entry.token_ids[count - end :]][:room]

    def _frame(self, source: str) -> tuple[int, int]:
        """Return how many special tokens the tokenizer puts before and behind a text."""
        [framed], [bare] = self._tokens(["a"], True, source), self.encoder.encode(["a"], False)
        at = next((at for at in range(len(framed)) if framed[at : at + len(bare)] == bare), 0)
        return at, max(0, len(framed) - at - len(bare))

    @property
    def _truncates(self) -> bool:
        return self.limits.truncate_prompts != "none"

    def _overrides(self, entry: "_Entry") -> dict[str, Any]:
        if entry.sampling == self.defaults:
            return {}
        own, defaults = vars(entry.sampling), vars(self.defaults)
        return {name: value for name, value in own.items() if value != defaults[name]}


@dataclass
class _Entry:
    """A row on its way from its value to a request."""

    row: int
    place: Place
    identity: RowId | None
    """None where it cannot be read; such a row is always refused."""
    sampling: SamplingParams
    error: RowError | None = None
    checked: Row | None = None
    text: str | None = None
    special: bool = False
    source_lang: str = ""
    token_ids: list[int] = dataclasses.field(default_factory=list)
    notes: list[str] = dataclasses.field(default_factory=list)


def _at_most(sampling: SamplingParams, new_tokens: int) -> SamplingParams:
    """Return parameters that ask for no more tokens than there is room for."""
    new = min(sampling.max_new_tokens, new_tokens)
    least = min(sampling.min_new_tokens, new)
    if (new, least) == (sampling.max_new_tokens, sampling.min_new_tokens):
        return sampling
    return replace(sampling, max_new_tokens=new, min_new_tokens=least)


@functools.lru_cache(maxsize=1 << 14)
def _beginning_with(sampling: SamplingParams, token: int) -> SamplingParams:
    return replace(sampling, forced_bos_token_id=token)


@functools.lru_cache(maxsize=1 << 14)
def _also_ending(sampling: SamplingParams, token: int) -> SamplingParams:
    if token in sampling.stop_token_ids:
        return sampling
    return replace(sampling, stop_token_ids=(*sampling.stop_token_ids, token))
