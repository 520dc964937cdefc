"""Turn token ids into text. The text of a sequence begins with the text of each shorter one. Knows no model.

The text of a completion is that of prompt and completion without that of the prompt: it keeps its first space. A
character appears when its last byte does.
"""

import codecs
import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from hpc.arrays import Tokens

Before = Sequence[int] | Tokens

_EACH_ALONE = {"Replace", "ByteFallback", "Fuse", "Strip", "Metaspace", "WordPiece"}
"""Kinds of decoders that give a token the same text at every place but the first."""


def detokenizer(backend: Any) -> "ByToken | ByText":
    """Return a detokenizer for a tokenizer of the `tokenizers` library. It leaves special tokens out."""
    special = {token.content: index for index, token in backend.get_added_tokens_decoder().items() if token.special}
    steps = _steps(backend.decoder)
    if _kinds(steps) == ["ByteLevel"] or _is_each_alone(steps, backend.decoder):
        return ByToken(backend, special)
    return ByText(lambda token_ids: str(backend.decode(token_ids, skip_special_tokens=True)), special)


class ByToken:
    """Joins the bytes of tokens. The bytes of each token are looked up once."""

    def __init__(self, backend: Any, special_tokens: Mapping[str, int]) -> None:
        self.special_tokens = special_tokens
        self._backend = backend
        self._left_out = frozenset(special_tokens.values())
        kinds = _kinds(_steps(backend.decoder))
        self._byte_level = "ByteLevel" in kinds
        self._byte_fallback = "ByteFallback" in kinds
        self._bytes = _Table(lambda token: self._look_up(token, ["a"]))
        self._first = self._bytes if self._byte_level else _Table(lambda token: self._look_up(token, []))

    def __call__(self, token_ids: Sequence[int], before: Before = ()) -> str:
        """Return the text that tokens add to that of the tokens before them, up to the last complete character.

        Bytes that are no UTF-8 are U+FFFD, as Unicode's standard counts them; a character whose first bytes
        are the last of `before` is in this text.
        """
        found = [*map(self._bytes.__getitem__, token_ids)]
        last, cut = self._last_bytes(before), b""
        if last:
            cut = last[codecs.utf_8_decode(last, "replace", False)[1] :]
        elif (at := next((at for at, data in enumerate(found) if data), None)) is not None:
            found[at] = self._first[token_ids[at]]
        return codecs.utf_8_decode(cut + b"".join(found), "replace", False)[0]

    def written(self, token_id: int) -> bytes:
        """Return the bytes of a token by itself; of a special token its name."""
        if token_id in self._left_out:
            return str(self._backend.id_to_token(token_id)).encode()
        return self._bytes[token_id]

    def _last_bytes(self, before: Before) -> bytes:
        """Return the end of a text, enough of it to tell how its last character goes on; empty if there is none."""
        text = b""
        for token in reversed(before):
            text = self._bytes[int(token)] + text
            if len(text) >= 3 or (text and text[-1:].isascii()):
                break
        return text

    def _look_up(self, token_id: int, before: list[str]) -> bytes:
        """Return the bytes that a token adds behind others."""
        token: str | None = self._backend.id_to_token(token_id)
        if token is None or token_id in self._left_out:  # models have more ids than their tokenizers
            return b""
        if self._byte_level:
            known = all(char in _BYTES for char in token)  # else it was added, as it is
            return bytes(_BYTES[char] for char in token) if known else token.encode()
        if self._byte_fallback and (byte := _fallback_byte(token)) is not None and byte >= 0x80:
            return bytes([byte])
        return _decode(self._backend.decoder, [*before, token])[sum(map(len, before)) :].encode()


class ByText:
    """Decodes with and without the tokens and returns the difference: works with any tokenizer."""

    def __init__(self, decode: Callable[[list[int]], str], special_tokens: Mapping[str, int]) -> None:
        self.special_tokens = special_tokens
        self._decode = decode

    def __call__(self, token_ids: Sequence[int], before: Before = ()) -> str:
        """Return the text that tokens add to that of the tokens before them; U+FFFD at its end may be incomplete."""
        reach, behind, text = 8, list(map(int, before[-8:])), ""
        while not (text := self._decode(behind)) and reach < len(before):  # special tokens alone
            reach *= 8
            behind = list(map(int, before[-reach:]))
        text = text.rstrip("\ufffd")
        whole = self._decode([*behind, *token_ids]).rstrip("\ufffd")
        return whole[len(text) :] if whole.startswith(text) else self._decode(list(token_ids)).rstrip("\ufffd")


class _Table(dict[int, bytes]):
    """The bytes of each token, looked up on first use."""

    def __init__(self, look_up: Callable[[int], bytes]) -> None:
        super().__init__()
        self._look_up = look_up

    def __missing__(self, token_id: int) -> bytes:
        found = self[token_id] = self._look_up(token_id)
        return found


def _steps(decoder: Any) -> list[dict[str, Any]]:
    """Return the steps of a decoder as it serialises them; none for no decoder."""
    if decoder is None:
        return []
    state = json.loads(decoder.__getstate__())
    return list(state["decoders"]) if state["type"] == "Sequence" else [state]


def _kinds(steps: list[dict[str, Any]]) -> list[str]:
    return [step["type"] for step in steps]


def _is_each_alone(steps: list[dict[str, Any]], decoder: Any) -> bool:
    kinds = _kinds(steps)
    fused = kinds.index("Fuse") + 1 if "Fuse" in kinds else len(kinds)
    at_the_front = all(step["type"] == "Strip" and step["stop"] == 0 for step in steps[fused:])
    return _EACH_ALONE.issuperset(kinds) and at_the_front and _decode(decoder, ["a"]) == "a"


def _decode(decoder: Any, tokens: list[str]) -> str:
    return " ".join(tokens) if decoder is None else str(decoder.decode(tokens))


def _fallback_byte(token: str) -> int | None:
    """Return the byte that a token like <0x0A> stands for."""
    if len(token) == 6 and token.startswith("<0x") and token.endswith(">"):
        try:
            return int(token[3:5], 16)
        except ValueError:
            return None
    return None


def _byte_level() -> dict[str, int]:
    """Return GPT-2's table from characters of byte-level tokens to bytes: unprintable bytes are U+0100 and after."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(0x100 + index): byte for index, byte in enumerate(others)}


_BYTES = _byte_level()
