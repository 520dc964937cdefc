"""Describe a model by its configuration: its vocabulary, its limits, its ending tokens. Reads no weights."""

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import GenerationConfig

from hpc.engine.decoder import DecoderRules, rules_of
from hpc.exit import Refusal
from hpc.model import endings
from hpc.model.load import configuration

_STRETCHED = {"yarn", "linear", "dynamic"}
"""Kinds of rotary embedding that multiply the context they were trained with by their factor."""

_UNHEEDED: Mapping[str, Any] = {
    "num_beams": 1, "num_beam_groups": 1, "length_penalty": 1.0, "no_repeat_ngram_size": 0,
    "encoder_no_repeat_ngram_size": 0, "repetition_penalty": 1.0, "encoder_repetition_penalty": 1.0, "min_length": 0,
    "min_new_tokens": 0, "max_length": 20, "max_new_tokens": 0, "do_sample": False,
}  # fmt: skip
"""Fields of a generation config that say how to choose tokens, and the values with which they say nothing."""


@dataclass(frozen=True)
class Description:
    """What a model's configuration says of the tokens that it takes and gives."""

    vocab_size: int
    """The token ids of prompts are below it."""
    context_tokens: int | None
    """Max tokens of prompt and completion together; of an encoder-decoder those of the prompt, which is its source.

    None if the model sets no limit (ALiBi, the relative positions of T5).
    """
    eos_sources: Mapping[str, tuple[int, ...]]
    """The end-of-sequence tokens that each file names. A causal model's generation config gives nothing else."""
    decoder_rules: DecoderRules | None = None
    """The rules of an encoder-decoder's decoder; None for a causal language model."""
    output_tokens: int | None = None
    """Max tokens of an encoder-decoder's completion; None if the model sets no limit."""
    output_vocab_size: int = 0
    """The token ids of an encoder-decoder's completions are below it."""
    unheeded: tuple[str, ...] = ()
    """What an encoder-decoder's generation config asks for in vain, as "num_beams 4"."""

    @property
    def eos_token_ids(self) -> tuple[int, ...]:
        """The end-of-sequence tokens that any file names."""
        return endings.union(self.eos_sources)


def describe(path: Path, trust_remote_code: bool = False, context_tokens: int | None = None) -> Description:
    """Read a model directory's configuration; `context_tokens` goes before the context that it says.

    Raises `Refusal` for more `context_tokens` than a model has positions, and for an encoder-decoder that does not say
    how its output begins.
    """
    whole = configuration(path, trust_remote_code)
    if whole.is_encoder_decoder:
        return _describe_sides(whole, path, context_tokens)
    config: Any = whole.get_text_config()
    context = _context_tokens(config, path)
    if context_tokens is not None:
        table = context is not None and not getattr(config, "rope_parameters", None) and not hasattr(whole, "auto_map")
        _check_context(context_tokens, context if table else None, path)
        context = context_tokens
    return Description(int(config.vocab_size), context, endings.sources(path, config))


def _describe_sides(whole: Any, path: Path, context_tokens: int | None) -> Description:
    """Describe an encoder-decoder, whose limits and vocabularies may differ on its two sides."""
    encoder, decoder = (_text_config(getattr(whole, side, None)) or whole for side in ("encoder", "decoder"))
    source = _first(encoder, "max_encoder_position_embeddings", "max_position_embeddings")
    if context_tokens is not None:
        _check_context(context_tokens, None if getattr(encoder, "rope_parameters", None) else source, path)
        source = context_tokens
    try:
        asked = GenerationConfig.from_pretrained(path)
    except OSError:  # there is no generation_config.json; older models say it in their config.json
        asked = GenerationConfig.from_pretrained(path, config_file_name="config.json", _from_model_config=True)
    if asked.decoder_start_token_id is None:
        asked.decoder_start_token_id = getattr(whole, "decoder_start_token_id", None)
    rules = rules_of(asked)
    if rules is None:
        raise Refusal(
            f'model "{path}" has an encoder and a decoder, and no "decoder_start_token_id" says how its output begins; '
            "copy its generation_config.json, or write it there"
        )
    return Description(
        _first(encoder, "src_vocab_size", "vocab_size") or 0,
        source,
        endings.sources(path, decoder),
        rules,
        _first(decoder, "max_decoder_position_embeddings", "max_position_embeddings"),
        _first(decoder, "decoder_vocab_size", "tgt_vocab_size", "vocab_size") or 0,
        tuple(_unheeded(asked)),
    )


def _unheeded(asked: GenerationConfig) -> Iterator[str]:
    """Yield what a generation config says of how to choose tokens."""
    for name, default in _UNHEEDED.items():
        value = getattr(asked, name, None)
        if value is not None and value != default:
            yield f"{name} {value}"
    if any(len(word) > 1 for word in asked.bad_words_ids or ()):
        yield "bad_words_ids of several tokens"


def _text_config(config: Any) -> Any:
    return config.get_text_config() if hasattr(config, "get_text_config") else None


def _first(config: Any, *names: str) -> int | None:
    """Return the first of some values that a configuration has."""
    return next((int(value) for name in names if (value := getattr(config, name, None)) is not None), None)


def _check_context(asked: int, table: int | None, path: Path) -> None:
    """Raise `Refusal` for more tokens than a model with a table of positions has places in it."""
    if table is not None and asked > table:
        raise Refusal(
            f'"context_tokens" is {asked}; model "{path}" has a table of {table} positions and no more: it must be at '
            f"most {table}"
        )


def _context_tokens(config: Any, path: Path) -> int | None:
    """Return most positions that a model takes: those that its config says, or factor × original where that is more.

    Model cards say how to write `factor` and `original_max_position_embeddings`, and leave `max_position_embeddings`.
    transformers fills in an original that config.json does not have: only one that is written there counts.
    """
    context = getattr(config, "max_position_embeddings", None)
    if context is None:
        return None
    written = json.loads((path / "config.json").read_bytes())
    return max(int(context), *(int(found) for found in _stretched(written)), 0)


def _stretched(value: Any) -> Iterator[float]:
    """Yield factor × original of each rotary embedding that a configuration names, at any depth."""
    if not isinstance(value, dict):
        return
    kind = value.get("rope_type", value.get("type"))
    original, factor = value.get("original_max_position_embeddings"), value.get("factor")
    if kind in _STRETCHED and isinstance(original, int) and isinstance(factor, int | float):
        yield original * factor
    for part in value.values():
        yield from _stretched(part)
