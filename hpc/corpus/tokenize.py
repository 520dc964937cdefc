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
from hpc.corpus.limits import PromptLimits
from hpc.corpus.notes import note_lines
from hpc.corpus.row import Row, check_row
from hpc.corpus.translation import Translation
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
class Checker:
    """All that it takes to turn rows into requests, the same on every rank."""

    defaults: SamplingParams
    limits: PromptLimits
    encoder: Encoder
    columns: Columns = dataclasses.field(default_factory=Columns)
    translation: Translation = dataclasses.field(default_factory=Translation)

    def check_block(self, block: Block) -> store.Arrays:
        """Return the rows of a block as arrays, a refused row as one without tokens.

        lengths, lines, new_tokens, samples, request_bytes [rows] int64; refused [rows] uint8; id_hashes
        [rows] uint64; keys [rows, KEY_BYTES]; tokens [sum(lengths)] int32; requests, errors and
        notes (what the user should hear of once, and where it was first) are JSON lines as bytes.
        """
        found = [self._check_row(row, place, value) for row, place, value in rows(block, self.columns.wanted)]
        self._encode(found)
        for entry in found:
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

    def _check_row(self, number: int, place: Place, value: dict[str, Any] | RowError) -> "_Entry":
        """Return what is known before tokenization of the row whose value stands at a place, its error included."""
        entry = _Entry(number, place, None, self.defaults)
        try:
            if isinstance(value, RowError):
                raise value
            entry.identity = identity = self.columns.id_of(value, number)
            given = self.columns.read(value)
            entry.notes.extend(given.notes)
            row = check_row(given, identity, self.defaults, self.columns.chat)
            entry.checked = row = self.translation.instruct(row, value, self.encoder.has_template)
            marked = self.translation.mark(self._text(row, entry.notes), self._sampling(row), value)
            entry.text, entry.special = marked.text, row.prompt is not None
            entry.sampling, entry.source_lang = marked.sampling, marked.source_lang
            self.limits.check_forced(entry.sampling.forced_bos_token_id)
            self.limits.check_given(row.token_ids or [])
            entry.token_ids = row.token_ids or []
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
            notes.append(f'chats bring "{name}", of which the chat template knows nothing: it changes nothing')
        return text

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
        if special and self.translation.languages is not None:
            return self.translation.languages.encode(texts, source)
        return self.encoder.encode(texts, special)

    def _fit(self, entry: "_Entry") -> None:
        """Fit a tokenized row to the model; what does not fit is refused."""
        if entry.error is not None or entry.checked is None:
            return
        try:
            self.limits.check_tokenized(entry.token_ids, self.encoder.token)
            exact, frame = entry.checked.exact_length, functools.partial(self._frame, entry)
            entry.token_ids, entry.sampling = self.limits.fit(entry.token_ids, entry.sampling, exact, frame)
        except RowError as error:
            entry.error, entry.token_ids = error, []

    def _frame(self, entry: "_Entry") -> tuple[int, int]:
        """Return how many special tokens the tokenizer put before and behind a row's text."""
        if not entry.special:
            return 0, 0
        [framed], [bare] = self._tokens(["a"], True, entry.source_lang), self.encoder.encode(["a"], False)
        at = next((at for at in range(len(framed)) if framed[at : at + len(bare)] == bare), 0)
        return at, max(0, len(framed) - at - len(bare))

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


@functools.lru_cache(maxsize=1 << 14)
def _also_ending(sampling: SamplingParams, token: int) -> SamplingParams:
    if token in sampling.stop_token_ids:
        return sampling
    return replace(sampling, stop_token_ids=(*sampling.stop_token_ids, token))
