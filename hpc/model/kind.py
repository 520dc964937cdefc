"""Tell what kind of model a configuration describes, and refuse the kinds that complete no text."""

import re
from pathlib import Path
from typing import Any

from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_MASKED_LM_MAPPING_NAMES,
)

from hpc.exit import Refusal

_OTHER_HEAD = re.compile(r"For(?!CausalLM|ConditionalGeneration)[A-Z]")
_REFUSED = {
    "seamless_m4t": "generates in a way of its own",
    "seamless_m4t_v2": "generates in a way of its own",
    "bigbird_pegasus": "attends to all of a source or to random blocks of it, depending on the sources before it",
}
"""Why encoder-decoders of these types are refused."""


def auto_class(config: Any) -> Any:
    """Return the class of transformers that makes models of a configuration."""
    return AutoModelForSeq2SeqLM if config.is_encoder_decoder else AutoModelForCausalLM


def check_kind(config: Any, path: Path) -> None:
    """Raise `Refusal` for a configuration that is neither a causal language model's nor an encoder-decoder's."""
    named = list(getattr(config, "architectures", None) or ())
    name = str(named[0]) if named else f'a model of type "{config.model_type}"'
    if problem := _encoder_decoder_fault(config, name) if config.is_encoder_decoder else _causal_fault(config, name):
        raise Refusal(
            f'model "{path}": {name} {problem}; name a causal language model (…ForCausalLM) or an encoder-decoder for '
            "text (…ForConditionalGeneration)"
        )


def _encoder_decoder_fault(config: Any, name: str) -> str:
    """Return why text cannot be generated with an encoder-decoder; nothing if it can."""
    if "AutoModelForSeq2SeqLM" in (getattr(config, "auto_map", None) or {}):
        return ""
    if type(config) not in AutoModelForSeq2SeqLM._model_mapping:
        return "has an encoder and a decoder, and does not make text of text"
    if config.model_type in _REFUSED:
        return _REFUSED[config.model_type]
    return "has another head than one that chooses tokens" if _OTHER_HEAD.search(name) else ""


def _causal_fault(config: Any, name: str) -> str:
    """Return why a model that is no encoder-decoder cannot go on with a text; nothing if it can."""
    own = "AutoModelForCausalLM" in (getattr(config, "auto_map", None) or {})
    text = config.get_text_config()
    if not own and type(config) not in AutoModelForCausalLM._model_mapping:
        return "is no causal language model that transformers knows, and cannot go on with a text"
    if not own and _OTHER_HEAD.search(name) and name not in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values():
        return "has another head than one that chooses tokens, and cannot go on with a text"
    if config.model_type in MODEL_FOR_MASKED_LM_MAPPING_NAMES and getattr(config, "is_decoder", None) is False:
        return 'sees the tokens behind each ("is_decoder" is false), and cannot go on with a text'
    if getattr(text, "use_bidirectional_attention", None) in (True, "all"):
        return 'sees the tokens behind each ("use_bidirectional_attention" is true), and cannot go on with a text'
    return ""
