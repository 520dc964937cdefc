"""Tokenize texts and chats with the model's own tokenizer and chat template, and turn token ids into text."""

from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any

from hpc.corpus.chat import PLAIN, ChatOptions, ChatWriter, Turn
from hpc.corpus.chat_date import fix_date
from hpc.exit import Refusal
from hpc.model.detokenizer import ByText, detokenizer
from hpc.model.languages import languages_of
from hpc.trim import Decode

_MAX_TEMPLATES = 256
"""Rows that bring their templates bring many, or all the same."""


class Tokenizer:
    """The tokenizer of a model directory. Knows nothing of rows."""

    def __init__(
        self, path: Path, trust_remote_code: bool = False, chat_date: str = "", chat_template: str | None = None
    ) -> None:
        """Load it, with a chat template in the place of its own, if there is one.

        A chat template that asks for the date gets `chat_date`, in ISO format; if empty, the clock's. Raises `Refusal`
        for a given template that is none.
        """
        # Here, not above: --help, status and verify must not wait for transformers.
        from transformers import AutoTokenizer

        self._tokenizer: Any = AutoTokenizer.from_pretrained(path, trust_remote_code=trust_remote_code)
        if chat_template is not None:
            self._tokenizer.chat_template = chat_template
        self._chat_date = chat_date
        self._sources: dict[tuple[str | None, bool], str] = {}
        self._chats = ChatWriter(self._apply)
        if chat_template is not None:
            self._check_template()
        self.languages = languages_of(self._tokenizer, lambda texts: self.encode(texts, special_tokens=True))
        """The languages of a multilingual model; None if the tokenizer knows none."""
        self.decode = _decode_of(self._tokenizer)
        """The detokenizer: it leaves special tokens out and tidies no space away."""

    @property
    def has_template(self) -> bool:
        """Whether the model has a chat template."""
        return self._tokenizer.chat_template is not None

    def render(self, messages: Sequence[Turn], options: ChatOptions = PLAIN) -> str:
        """Write a chat as the template does, up to where the assistant's answer begins, or its last turn goes on.

        Raises `LostText` where the template leaves text out, and whatever the template raises.
        """
        return self._chats.write(messages, options)

    def _check_template(self) -> None:
        from jinja2 import TemplateSyntaxError

        try:
            self._apply([{"role": "user", "content": ""}], PLAIN)
        except TemplateSyntaxError as error:
            raise Refusal(f"the chat template is none: {error.message} in line {error.lineno}") from error
        except Exception:  # it may refuse this chat, as it may any
            return

    def template_source(self, options: ChatOptions = PLAIN) -> str:
        """Return the source of the template that writes a chat, in which the date is fixed."""
        known = (options.template, bool(options.tools))
        if known not in self._sources:
            if len(self._sources) >= _MAX_TEMPLATES:
                self._sources.clear()
            source = str(self._tokenizer.get_chat_template(options.template, tools=options.tools))
            self._sources[known] = fix_date(source, self._chat_date) if self._chat_date else source
        return self._sources[known]

    def _apply(self, turns: Sequence[Turn], options: ChatOptions) -> str:
        return str(
            self._tokenizer.apply_chat_template(
                turns,
                chat_template=self.template_source(options),
                tools=options.tools,
                documents=options.documents,
                tokenize=False,
                add_generation_prompt=options.begins,
                **options.variables,
            )
        )

    def token(self, token_id: int) -> str:
        """Return the name of a token in the vocabulary."""
        return str(self._tokenizer.convert_ids_to_tokens(token_id))

    def chat_ending(self, eos_token_ids: Collection[int]) -> int | None:
        """Return the tokenizer's token for the end of a turn, if it is none of the model's ending tokens."""
        token: int | None = self._tokenizer.eos_token_id
        return token if self.has_template and token not in eos_token_ids else None

    def encode(self, texts: Sequence[str], special_tokens: bool) -> list[list[int]]:
        """Tokenize texts, with or without the special tokens that the tokenizer adds by itself."""
        if not texts:
            return []
        encoded = self._tokenizer(list(texts), add_special_tokens=special_tokens, return_attention_mask=False)
        return [list(ids) for ids in encoded["input_ids"]]


def _decode_of(tokenizer: Any) -> Decode:
    """Return the detokenizer for a tokenizer of transformers."""
    from transformers import PreTrainedTokenizerFast

    if tokenizer.is_fast and type(tokenizer)._decode is PreTrainedTokenizerFast._decode:
        return detokenizer(tokenizer.backend_tokenizer)

    def decode(token_ids: list[int]) -> str:
        return str(tokenizer.decode(token_ids, skip_special_tokens=True, clean_up_tokenization_spaces=False))

    return ByText(decode, dict(zip(tokenizer.all_special_tokens, tokenizer.all_special_ids, strict=True)))
