"""Tiny random models of many architectures, native engines of them, and what transformers' `generate` makes of them."""

import copy
import functools
from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
import transformers as hf

from hpc.engine.cache import token_bytes
from hpc.engine.form import KVShape
from hpc.engine.kernel import compiler
from hpc.engine.kernel.kernel import Kernel
from hpc.engine.native.build import build_native
from hpc.engine.native.engine import NativeEngine
from hpc.engine.native.limits import EngineLimits
from hpc.model.find import user_cache
from hpc.model.kind import auto_class
from hpc.model.load import quiet
from tests.engine.oracle import letters

VOCABULARY = 512
_BASE: dict[str, Any] = {
    "vocab_size": VOCABULARY, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 1024,
    "bos_token_id": None, "eos_token_id": None, "pad_token_id": None,
}  # fmt: skip
_SMALL: dict[str, Any] = {"vocab_size": VOCABULARY, "hidden_size": 40, "bos_token_id": None, "eos_token_id": None}
_WINDOWED = {**_BASE, "head_dim": 24, "sliding_window": 13}
CONFIGS: dict[str, Any] = {
    "llama": hf.LlamaConfig(**_BASE),
    "qwen2": hf.Qwen2Config(**_BASE),
    "qwen3": hf.Qwen3Config(**_BASE, head_dim=24),
    "phi3": hf.Phi3Config(**_BASE),
    "gemma2": hf.Gemma2Config(**_WINDOWED, query_pre_attn_scalar=20, tie_word_embeddings=True),
    "gemma3": hf.Gemma3TextConfig(
        **_WINDOWED, query_pre_attn_scalar=20, tie_word_embeddings=True,
        layer_types=["sliding_attention", "full_attention"],
    ),
    "mixtral": hf.MixtralConfig(**_BASE, num_local_experts=4),
    "olmoe": hf.OlmoeConfig(**_BASE, num_experts=4, num_experts_per_tok=2),
    "gpt_oss": hf.GptOssConfig(**_WINDOWED, num_local_experts=4, num_experts_per_tok=2),
    "gpt2": hf.GPT2Config(
        vocab_size=VOCABULARY, n_embd=64, n_layer=2, n_head=4, n_positions=1024, bos_token_id=None, eos_token_id=None
    ),
    "gpt_neox": hf.GPTNeoXConfig(**{**_BASE, "num_key_value_heads": None}),
    "opt": hf.OPTConfig(
        vocab_size=VOCABULARY, hidden_size=64, ffn_dim=96, num_hidden_layers=2, num_attention_heads=4,
        max_position_embeddings=1024, word_embed_proj_dim=64, bos_token_id=None, eos_token_id=None, pad_token_id=1,
    ),
    "bloom": hf.BloomConfig(**_SMALL, n_layer=2, n_head=4, pad_token_id=None),
    "mpt": hf.MptConfig(vocab_size=VOCABULARY, d_model=42, n_heads=3, n_layers=2, max_seq_len=1024),
    "falcon": hf.FalconConfig(
        **_SMALL, num_hidden_layers=2, num_attention_heads=4, num_kv_heads=2, new_decoder_architecture=True
    ),
    "falcon_alibi": hf.FalconConfig(
        **_SMALL, num_hidden_layers=2, num_attention_heads=4, alibi=True, multi_query=False, parallel_attn=False,
        bias=True,
    ),
    "gptj": hf.GPTJConfig(**_SMALL, n_layer=2, n_head=4, n_positions=1024, rotary_dim=6),
    "codegen": hf.CodeGenConfig(**_SMALL, n_layer=2, n_head=4, n_positions=1024, rotary_dim=6),
    "gpt_neo": hf.GPTNeoConfig(
        **_SMALL, num_layers=2, num_heads=4, attention_types=[[["global", "local"], 1]], window_size=13,
        max_position_embeddings=1024,
    ),
    "stablelm": hf.StableLmConfig(**_BASE),
}  # fmt: skip
_SIDES: dict[str, Any] = {
    "vocab_size": VOCABULARY, "d_model": 64, "encoder_layers": 2, "decoder_layers": 2, "encoder_attention_heads": 4,
    "decoder_attention_heads": 4, "encoder_ffn_dim": 96, "decoder_ffn_dim": 96, "tie_word_embeddings": False,
    "bos_token_id": None, "eos_token_id": None, "pad_token_id": 1, "decoder_start_token_id": 2,
}  # fmt: skip
ENCODER_DECODERS: dict[str, Any] = {
    "t5": hf.T5Config(
        vocab_size=VOCABULARY, d_model=64, d_kv=16, d_ff=96, num_layers=2, num_heads=4, decoder_start_token_id=0,
        pad_token_id=0, eos_token_id=None,
    ),
    "bart": hf.BartConfig(**_SIDES, max_position_embeddings=256),
    "marian": hf.MarianConfig(**_SIDES, max_position_embeddings=256, init_std=0.1),
    "m2m_100": hf.M2M100Config(**_SIDES, max_position_embeddings=256),
    "led": hf.LEDConfig(
        **_SIDES, max_encoder_position_embeddings=256, max_decoder_position_embeddings=64, attention_window=8
    ),
}  # fmt: skip
WINDOWED = {"mistral": hf.MistralConfig(**_WINDOWED), "phi3_windowed": hf.Phi3Config(**_BASE, sliding_window=13)}
FIRST = ("llama", "gemma2", "mixtral", "bloom")
"""The kinds of `make test`: a plain one, windows and capped scores, experts, positions that add to scores."""
WAYS = ("kernel", "torch")
ROOMY = EngineLimits(max_seqs=8, step_tokens=512, cache_bytes=32 << 20, deterministic=True)


def tiered(cases: Iterable[Any]) -> list[Any]:
    """Leave to `make test-slow` all cases but those of the FIRST kinds.

    A case is the name of a kind, or a tuple that begins with one.
    """
    tuples = [case if isinstance(case, tuple) else (case,) for case in cases]
    return [
        pytest.param(
            *case,
            id="-".join(str(value).removeprefix("torch.") for value in case),
            marks=() if case[0] in FIRST else pytest.mark.slow,
        )
        for case in tuples
    ]


def tiny(config: Any, dtype: torch.dtype = torch.float32, scale: float = 8.0) -> Any:
    """Make a model with random weights that are the same every time.

    As initialised, every token is about as probable, and after a while the last one is repeated: larger
    weights give outputs that vary.
    """
    quiet()
    torch.manual_seed(0)
    model: Any = auto_class(config).from_config(copy.deepcopy(config)).eval()  # it keeps what it is given
    embeddings = model.get_input_embeddings().weight
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter is embeddings:
                continue
            if parameter.dim() > 1:
                parameter.mul_(scale)
            else:  # so that a norm's weight or a bias that is left out is noticed
                parameter.add_(0.05 * torch.randn(parameter.shape))
    model.generation_config = hf.GenerationConfig()
    return model.to(dtype)


def with_rope(rope: str) -> hf.LlamaConfig:
    """A llama whose frequencies are others in sequences of more than 64 tokens."""
    parameters: dict[str, Any] = {"rope_type": rope, "rope_theta": 10000.0, "factor": 4.0}
    if rope == "longrope":
        parameters |= {"short_factor": [1.5] * 8, "long_factor": [4.0] * 8, "original_max_position_embeddings": 64}
    values = {**CONFIGS["llama"].to_dict(), "max_position_embeddings": 64 if rope == "dynamic" else 256}
    values.pop("rope_parameters", None)
    return hf.LlamaConfig(**values, rope_parameters=parameters)


def made(kind: str, dtype: torch.dtype = torch.float32) -> Any:
    """Make a model of a kind; a "repetitive" one has smaller weights, and its greedy output goes in circles."""
    name = kind.removeprefix("repetitive ")
    return tiny({**CONFIGS, **WINDOWED}[name], dtype, 8.0 if name == kind else 3.0)


@functools.cache
def compiled() -> Kernel | None:
    """Return this machine's kernel, built where the program builds it."""
    return compiler.load(user_cache() / "kernels")


def kernel_of(way: str) -> Kernel | None:
    """Return the kernel of a way to compute; skip the test if the machine cannot build it."""
    if way == "torch":
        return None
    if compiled() is None:
        pytest.skip("no kernel can be built on this machine: it has no C++ compiler")
    return compiled()


def build_engine(model: Any, way: str, limits: EngineLimits = ROOMY, eos: Sequence[int] = ()) -> NativeEngine:
    """Make a native engine of a model, which is changed."""
    return build_native(model, eos, letters, limits, kernel_of(way))


@functools.cache
def _prepared(kind: str, way: str, dtype: torch.dtype) -> tuple[Any, dict[int, KVShape]]:
    model = made(kind, dtype)
    return model, build_engine(model, way).layouts


def model_of(kind: str, way: str, dtype: torch.dtype = torch.float32) -> Any:
    """Return the model of the engines below, for hooks that are removed again."""
    return _prepared(kind, way, dtype)[0]


def engine_of(
    kind: str, way: str, limits: EngineLimits = ROOMY, eos: Sequence[int] = (), dtype: torch.dtype = torch.float32,
    decode: Any = letters, cache_tokens: int = 0,
) -> NativeEngine:  # fmt: skip
    """Return an engine of one of these models, which is made once and must not be changed."""
    model, layouts = _prepared(kind, way, dtype)
    kernel = kernel_of(way)
    if cache_tokens:
        size = token_bytes(layouts, dtype, kernel.panel if kernel else 0)
        limits = replace(limits, cache_bytes=cache_tokens * size)
    return NativeEngine(model, layouts, eos, decode, limits, kernel)


@functools.cache
def _plain(kind: str) -> Any:
    model = made(kind)
    model.set_attn_implementation("eager")
    return model


def plain_of(model: Any, prompts: Sequence[Sequence[int]], new: int) -> list[list[int]]:
    """Return what plain `generate` makes of each prompt alone, with the model's own attention; it gets that."""
    model.set_attn_implementation("eager")
    outputs = []
    for prompt in prompts:
        ids = torch.tensor([prompt])
        out = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=new, do_sample=False)
        outputs.append(out[0, len(prompt) :].tolist())
    return outputs


@functools.cache
def _greedy(kind: str, prompt: tuple[int, ...], new: int) -> list[int]:
    input_ids = torch.tensor([prompt])
    output = _plain(kind).generate(
        input_ids, attention_mask=torch.ones_like(input_ids), max_new_tokens=new, do_sample=False
    )
    return [int(token) for token in output[0, len(prompt) :]]


def greedy_of(kind: str, prompt: Sequence[int], new: int) -> list[int]:
    """Return what plain `generate` makes of a prompt, with the model's own attention."""
    return _greedy(kind, tuple(prompt), new)
