"""Tiny random models of many architectures, native engines of them, and what transformers' `generate` makes of them."""

import copy
import functools
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
import transformers as hf

from hpc.engine import compiler
from hpc.engine.cache import Layout, token_bytes
from hpc.engine.kernel import Kernel
from hpc.engine.load import quiet
from hpc.engine.native import NativeEngine
from hpc.engine.run import Limits
from hpc.engine.support import build
from hpc.model import user_cache
from tests.engine.oracle import letters

VOCABULARY = 512
_BASE: dict[str, Any] = {
    "vocab_size": VOCABULARY, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 1024,
    "bos_token_id": None, "eos_token_id": None, "pad_token_id": None,
}  # fmt: skip
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
}  # fmt: skip
WINDOWED = {"mistral": hf.MistralConfig(**_WINDOWED), "phi3_windowed": hf.Phi3Config(**_BASE, sliding_window=13)}
WAYS = ("kernel", "torch")
ROOMY = Limits(max_seqs=8, step_tokens=512, cache_bytes=32 << 20, deterministic=True)


def tiny(config: Any, dtype: torch.dtype = torch.float32, scale: float = 8.0) -> Any:
    """Make a model with random weights that are the same every time.

    As initialised, every token is about as probable, and after a while the last one is repeated: larger
    weights give outputs that vary.
    """
    quiet()
    torch.manual_seed(0)
    model: Any = hf.AutoModelForCausalLM.from_config(copy.deepcopy(config)).eval()  # it keeps what it is given
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


def build_engine(model: Any, way: str, limits: Limits = ROOMY, eos: Sequence[int] = ()) -> NativeEngine:
    """Make a native engine of a model, which is changed."""
    return build(model, eos, letters, limits, kernel_of(way))


@functools.cache
def _prepared(kind: str, way: str, dtype: torch.dtype) -> tuple[Any, dict[int, Layout]]:
    model = made(kind, dtype)
    return model, build_engine(model, way).layouts


def model_of(kind: str, way: str, dtype: torch.dtype = torch.float32) -> Any:
    """Return the model of the engines below, for hooks that are removed again."""
    return _prepared(kind, way, dtype)[0]


def engine_of(
    kind: str, way: str, limits: Limits = ROOMY, eos: Sequence[int] = (), dtype: torch.dtype = torch.float32,
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
