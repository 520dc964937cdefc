"""The languages of a multilingual encoder-decoder: how the source is marked, and which token begins the output."""

import difflib
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

_CODE = re.compile(r"[a-z]{2,3}([_-][A-Za-z]{2,4})?|>>.+<<")


class Languages:
    """What a tokenizer knows of languages.

    NLLB, M2M100 and mBART mark the source with a token and begin the target with one; a Marian model of several targets
    reads the target in front of the source (>>fra<<).
    """

    def __init__(
        self, tokenizer: Any, codes: Mapping[str, int], encode: Callable[[list[str]], list[list[int]]]
    ) -> None:
        """Hold the tokenizer; `encode` is what tokenizes texts with it."""
        self._tokenizer = tokenizer
        self._codes = codes
        self._encode = encode
        self._default: str = getattr(tokenizer, "src_lang", None) or ""
        self.in_source = any(code.startswith(">>") for code in codes)
        """The source text names the target language."""

    def encode(self, texts: Sequence[str], source: str) -> list[list[int]]:
        """Tokenize texts of a source language, with special tokens; of none, of the one that the tokenizer begins with.

        Raises whatever the tokenizer raises.
        """
        if not self.in_source:
            self._tokenizer.src_lang = source or self._default
        return self._encode(list(texts))

    def mark(self, text: str, target: str) -> str:
        """Return a source text as a model reads it that is to translate it into a language."""
        return f">>{target.strip('<>')}<< {text}" if self.in_source and target else text

    def target_token(self, target: str) -> int | None:
        """Return the token that the output in a language begins with; None if the source has named the language."""
        return None if self.in_source else self._codes[target]

    def is_language(self, token_id: int) -> bool:
        """Return whether a token stands for a language."""
        return token_id in self._codes.values()

    def problem(self, name: str, code: object) -> str | None:
        """Return what is wrong with a language that a row or job gives as `name`; None if there is such a one."""
        if self.in_source and name == "source_lang":
            return None  # one language, which nobody need name
        known = f">>{str(code).strip('<>')}<<" if self.in_source else str(code)
        if known in self._codes:
            return None
        codes = sorted(each.strip("<>") for each in self._codes)
        near = difflib.get_close_matches(str(code), codes, 3, 0.3) or codes[:3]
        return f'"{name}" is {code!r}; it must be one of the model\'s {len(codes)} languages, such as {", ".join(near)}'


def languages_of(tokenizer: Any, encode: Callable[[list[str]], list[list[int]]]) -> Languages | None:
    """Return what a tokenizer of transformers knows of languages; None if it knows none."""
    if codes := getattr(tokenizer, "supported_language_codes", None):  # Marian
        return Languages(tokenizer, dict.fromkeys(codes, -1), encode)
    if not hasattr(type(tokenizer), "src_lang"):
        return None
    codes = getattr(tokenizer, "lang_code_to_id", None) or {
        token: tokenizer.convert_tokens_to_ids(token)
        for token in tokenizer.all_special_tokens
        if _CODE.fullmatch(token)
    }
    return Languages(tokenizer, codes, encode) if codes else None
