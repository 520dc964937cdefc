"""Read the end-of-sequence tokens of a model from its configuration files."""

import contextlib
import json
from collections.abc import Callable, Collection, Iterable, Mapping
from pathlib import Path
from typing import Any

from transformers import GenerationConfig

GENERATION, CONFIG = "generation_config.json", "config.json"


def sources(path: Path, config: Any) -> dict[str, tuple[int, ...]]:
    """Return the end-of-sequence tokens that each file of a model directory names.

    `config` is that of the model's text part. The default of its class counts only if no file names a token: that of
    a llama is token 2, whatever its tokenizer writes for it.
    """
    found: dict[str, tuple[int, ...]] = {}
    with contextlib.suppress(OSError):  # there is no generation_config.json
        found[GENERATION] = _tokens(GenerationConfig.from_pretrained(path).eos_token_id)
    written = json.loads((path / CONFIG).read_bytes())
    text = written.get("text_config")
    parts = [written, text] if isinstance(text, dict) else [written]
    found[CONFIG] = tuple(dict.fromkeys(token for part in parts for token in _tokens(part.get("eos_token_id"))))
    if not any(found.values()) and all("eos_token_id" not in part for part in parts):
        found[CONFIG] = _tokens(config.eos_token_id)
    return found


def union(found: Mapping[str, Iterable[int]]) -> tuple[int, ...]:
    """Return the tokens of all files, each once, in order."""
    return tuple(dict.fromkeys(token for tokens in found.values() for token in tokens))


def say(found: Mapping[str, Collection[int]], name: Callable[[int], str], of_chats: int | None) -> str:
    """Return a line for the log: ending tokens and the files that name them. `of_chats` also ends a turn of a chat."""
    said = [
        f"{name(token)} ({token}: {', '.join(file for file, tokens in found.items() if token in tokens)})"
        for token in union(found)
    ]
    text = f"completions end at {' or '.join(said)}" if said else "no file of the model names a token that ends"
    return text if of_chats is None else f"{text}; of chats also at {name(of_chats)} ({of_chats}: the tokenizer)"


def _tokens(value: Any) -> tuple[int, ...]:
    """Return the token ids of a configuration: one, a list or none; there are models that say -1 for none."""
    values = value if isinstance(value, list | tuple) else [value]
    return tuple(int(token) for token in values if isinstance(token, int) and token >= 0)
