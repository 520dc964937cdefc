"""Small tokenizers of all the kinds that language models have, made with the `tokenizers` library alone."""

from functools import cache

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

SPECIAL = ("<s>", "</s>", "<|im_end|>")
WORDS = ("is", "Paris", "a", "b", "é", "日", "😀", ".", "x y")
KINDS = ("byte level", "llama", "gemma", "metaspace", "wordpiece", "words", "bpe")
WITH_BYTES = ("byte level", "llama", "gemma")


@cache
def tokenizer(kind: str) -> Tokenizer:
    """Make a tokenizer of a kind: every word alone and behind a space, the special tokens, and the bytes."""
    if kind == "byte level":
        tokens = _byte_level_tokens()
    else:
        begins, goes_on, ends = {
            "llama": ("▁", "", ""), "gemma": ("▁", "", ""), "metaspace": ("▁", "", ""),
            "wordpiece": ("", "##", ""), "words": ("", "", ""), "bpe": ("", "", "</w>"),
        }[kind]  # fmt: skip
        alone = [begins + word + end for word in WORDS for end in {"", ends}]
        tokens = [*alone, *(goes_on + word for word in WORDS), begins or "-"]
        tokens += [f"<0x{byte:02X}>" for byte in range(256)] if kind in WITH_BYTES else []
    vocabulary = {token: index for index, token in enumerate(dict.fromkeys(["<unk>", *tokens]))}
    made = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    pieces = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    made.decoder = {
        "byte level": decoders.ByteLevel(),
        "llama": decoders.Sequence([*pieces, decoders.Strip(" ", 1, 0)]),
        "gemma": decoders.Sequence(pieces),
        "metaspace": decoders.Metaspace(),
        "wordpiece": decoders.WordPiece(),
        "words": None,
        "bpe": decoders.BPEDecoder(),
    }[kind]
    made.add_special_tokens([AddedToken(name, special=True, normalized=False) for name in SPECIAL])
    made.add_tokens([AddedToken("<think> ", normalized=False)])
    return made


def _byte_level_tokens() -> list[str]:
    split = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    words = [split.pre_tokenize_str(space + word)[0][0] for word in WORDS for space in ("", " ")]
    return [*sorted(pre_tokenizers.ByteLevel.alphabet()), *words]


@cache
def byte_token(kind: str, byte: int) -> int:
    """Return the token of a byte."""
    made = tokenizer(kind)
    if kind != "byte level":
        return int(made.token_to_id(f"<0x{byte:02X}>"))
    return next(token for token in range(1, 257) if _raw(made.id_to_token(token)) == byte)


def _raw(char: str) -> int:
    """Return the byte of a character of a byte-level token."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    return ord(char) if ord(char) < 256 else [byte for byte in range(256) if byte not in printable][ord(char) - 256]
