"""The families of encoder-decoders in the table of docs/engines.md: tiny ones, random; see `architectures`."""

from typing import Any

import transformers

from hpc.engine.decoder import DecoderRules
from hpc.engine.failure import one_line
from hpc.engine.hf import HFEngine
from hpc.engine.registry import ENGINES, no_encoder
from hpc.sampling_params import SamplingParams
from tests.engine.models import VOCABULARY, tiny
from tests.engine.oracle import generated, letters, one_bucket, plain_output, prompts

_T5: dict[str, Any] = {
    "vocab_size": VOCABULARY, "d_model": 64, "d_kv": 16, "d_ff": 96, "num_layers": 2, "num_heads": 4,
    "decoder_start_token_id": 0, "pad_token_id": 0, "eos_token_id": None,
}  # fmt: skip
_BART: dict[str, Any] = {
    "vocab_size": VOCABULARY, "d_model": 64, "encoder_layers": 2, "decoder_layers": 2, "encoder_attention_heads": 4,
    "decoder_attention_heads": 4, "encoder_ffn_dim": 96, "decoder_ffn_dim": 96, "tie_word_embeddings": False,
    "bos_token_id": None, "eos_token_id": None, "pad_token_id": 1, "decoder_start_token_id": 2,
}  # fmt: skip
_EXPERTS: dict[str, Any] = {"num_experts": 4, "num_sparse_encoder_layers": 1, "num_sparse_decoder_layers": 1}
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "T5": ("t5", _T5),
    "T5 1.1, Flan-T5": ("t5", {**_T5, "feed_forward_proj": "gated-gelu", "tie_word_embeddings": False}),
    "mT5": ("mt5", _T5),
    "UMT5": ("umt5", _T5),
    "LongT5": (
        "longt5",
        {**_T5, "local_radius": 7, "global_block_size": 4, "encoder_attention_type": "transient-global"},
    ),
    "Switch Transformers": ("switch_transformers", {**_T5, **_EXPERTS, "num_decoder_layers": 2}),
    "BART": ("bart", _BART),
    "mBART": ("mbart", _BART),
    "PLBart": ("plbart", _BART),
    "Pegasus": ("pegasus", _BART),
    "PEGASUS-X": ("pegasus_x", {**_BART, "block_size": 16, "num_global_tokens": 4}),
    "LED": ("led", {**_BART, "max_encoder_position_embeddings": 512, "attention_window": 8}),
    "Marian (OPUS-MT)": ("marian", {**_BART, "init_std": 0.1}),
    "M2M100, NLLB": ("m2m_100", _BART),
    "NLLB-MoE": ("nllb-moe", {**_BART, "num_experts": 4, "encoder_sparse_step": 2, "decoder_sparse_step": 2}),
    "FSMT (WMT19)": (
        "fsmt",
        {**_BART, "src_vocab_size": VOCABULARY, "tgt_vocab_size": VOCABULARY, "langs": ["a", "b"]},
    ),
    "Blenderbot": ("blenderbot", _BART),
}
"""What people call it, what transformers calls it, and what makes it small."""

SOURCES = [[3 + token for token in prompt] for prompt in prompts((3, 20, 40))]
"""Above what a model may take for padding."""
NEW = 8


def row(name: str) -> list[str]:
    """Return a family's line of the table, without the column of vLLM."""
    kind, values = FAMILIES[name]
    config = transformers.AutoConfig.for_model(kind, **values)
    start = values["decoder_start_token_id"]
    try:
        model = tiny(config)
        expected = [plain_output(model, start, source, NEW) for source in SOURCES]
        engine = HFEngine(model, (), letters, 10_000, rules=DecoderRules(start))
        found = generated(engine, one_bucket(SOURCES, SamplingParams(max_new_tokens=NEW)))
        hf = "yes" if [found[index] for index in range(len(SOURCES))] == expected else "no: its tokens are others"
    except (AttributeError, IndexError, KeyError, RuntimeError, TypeError, ValueError) as error:
        hf = f"no: {one_line(error)}"
    return [name, f"`{kind}`", verdict("native", config), hf]


def verdict(engine: str, config: Any) -> str:
    """Return whether an engine takes models with an encoder at all."""
    return "no: it has an encoder" if no_encoder(ENGINES[engine], config) else "yes"
