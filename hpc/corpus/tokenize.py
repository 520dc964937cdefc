"""Check and tokenize the rows of a block: decoded values in; token ids, keys and errors out.

Pure but for the tokenizer.
"""

import dataclasses
import functools
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


@dataclass(frozen=True)
class PromptLimits:
    """What the model and the job allow."""

    vocab_size: int
    context_tokens: int | None
    """Most tokens of prompt and completion together; None is no limit."""
    truncate_prompts: str = "none"
    chat_ending: int | None = None
    """A token that ends the completion of a chat, besides the model's end-of-sequence tokens."""


@dataclass(frozen=True)
class Checker:
    """All that it takes to turn rows into requests, the same on every rank."""

    defaults: SamplingParams
    limits: PromptLimits
    encoder: Encoder
    columns: Columns = dataclasses.field(default_factory=Columns)

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
            entry.checked = check_row(given, identity, self.defaults, self.columns.chat)
            entry.sampling = self._sampling(entry.checked)
            entry.text, entry.special = self._text(entry.checked, entry.notes), entry.checked.prompt is not None
            entry.token_ids = self._known(entry.checked.token_ids or [])
        except RowError as error:
            entry.error = error
        return entry

    def _sampling(self, row: Row) -> SamplingParams:
        """Return a row's parameters; those of a chat have the token that ends a turn, which is so a part of its key."""
        ending = self.limits.chat_ending
        if row.messages is None or ending is None or row.sampling.ignore_eos:
            return row.sampling
        return _also_ending(row.sampling, ending)

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
        for special in (True, False):
            batch = [e for e in entries if e.error is None and e.text is not None and e.special == special]
            try:
                encoded = self.encoder.encode([entry.text or "" for entry in batch], special)
                for entry, token_ids in zip(batch, encoded, strict=True):
                    entry.token_ids = token_ids
            except Exception:  # one text that the tokenizer cannot take must not cost the others
                for entry in batch:
                    try:
                        [entry.token_ids] = self.encoder.encode([entry.text or ""], special)
                    except Exception as error:
                        entry.error = RowError("tokenize", f"the tokenizer refuses this text: {error}")

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
        new = min(new, context - len(entry.token_ids))
        least = min(entry.sampling.min_new_tokens, new)
        if (new, least) != (entry.sampling.max_new_tokens, entry.sampling.min_new_tokens):
            entry.sampling = replace(entry.sampling, max_new_tokens=new, min_new_tokens=least)

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
    token_ids: list[int] = dataclasses.field(default_factory=list)
    notes: list[str] = dataclasses.field(default_factory=list)


@functools.lru_cache(maxsize=1 << 14)
def _also_ending(sampling: SamplingParams, token: int) -> SamplingParams:
    if token in sampling.stop_token_ids:
        return sampling
    return replace(sampling, stop_token_ids=(*sampling.stop_token_ids, token))
