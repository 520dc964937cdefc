"""Ask each engine whether it serves a family of models: tiny ones, random, made from the installed transformers.

`python -m tests.bench.architectures` writes the table of docs/engines.md anew. An engine serves a family if in float32
it gives what `generate` makes of one prompt at a time. vLLM has an environment of its own: `--vllm` asks it there, each
family in a process of its own, and keeps the answers in architectures_vllm.json.
"""

import json
import logging
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import transformers

from hpc.engine.failure import one_line
from hpc.engine.hf import HFEngine
from hpc.engine.layers.attention import Unsupported
from hpc.engine.native.limits import EngineLimits
from hpc.sampling_params import SamplingParams
from tests.bench import encoder_decoders
from tests.engine.models import ROOMY, VOCABULARY, build_engine, kernel_of, plain_of, tiny
from tests.engine.oracle import generated, letters, one_bucket, prompts

PAGE = Path(__file__).parents[2] / "docs" / "engines.md"
ANSWERS = Path(__file__).with_suffix("").with_name("architectures_vllm.json")
"""What vLLM has said, by family; a family that is there is not asked again."""
HEADING = "## Which engine serves which family"
_NONE: dict[str, Any] = {"bos_token_id": None, "eos_token_id": None, "pad_token_id": None}
_BASE: dict[str, Any] = {
    "vocab_size": VOCABULARY, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 512, **_NONE,
}  # fmt: skip
_OLD: dict[str, Any] = {**_BASE, "num_key_value_heads": None}
_EXPERTS: dict[str, Any] = {**_BASE, "moe_intermediate_size": 32, "num_experts": 4, "num_experts_per_tok": 2}
_LATENT: dict[str, Any] = {
    **_BASE, "num_key_value_heads": 4, "moe_intermediate_size": 32, "n_routed_experts": 4, "num_experts_per_tok": 2,
    "n_group": 1, "topk_group": 1, "first_k_dense_replace": 1, "q_lora_rank": 24, "kv_lora_rank": 16,
    "qk_rope_head_dim": 8, "qk_nope_head_dim": 16, "v_head_dim": 12,
}  # fmt: skip
_LINEAR: dict[str, Any] = {
    "layer_types": ["linear_attention", "full_attention"],
    "linear_num_key_heads": 2, "linear_num_value_heads": 2, "linear_key_head_dim": 16, "linear_value_head_dim": 16,
}  # fmt: skip
_LONG: dict[str, Any] = {"rope_type": "longrope", "rope_theta": 1e4, "original_max_position_embeddings": 30}
_LONG |= {"short_factor": [1.0] * 8, "long_factor": [4.0] * 8}
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "Llama 1-3, Yi, SmolLM2": ("llama", _BASE),
    "Llama with dynamic NTK": (
        "llama",
        {**_BASE, "rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 4.0}},
    ),
    "Llama 4": ("llama4_text", {**_BASE, "intermediate_size_mlp": 96, "num_local_experts": 4, "head_dim": 16}),
    "Mistral": ("mistral", {**_BASE, "sliding_window": 13}),
    "Mixtral": ("mixtral", {**_BASE, "num_local_experts": 4}),
    "Qwen2, Qwen2.5": ("qwen2", _BASE),
    "Qwen1.5-MoE, Qwen2-MoE": ("qwen2_moe", {**_EXPERTS, "shared_expert_intermediate_size": 32}),
    "Qwen3": ("qwen3", {**_BASE, "head_dim": 24}),
    "Qwen3-MoE": ("qwen3_moe", {**_EXPERTS, "head_dim": 24}),
    "Qwen3-Next": ("qwen3_next", {**_EXPERTS, **_LINEAR, "head_dim": 16, "shared_expert_intermediate_size": 32}),
    "Gemma": ("gemma", {**_BASE, "head_dim": 16}),
    "Gemma 2": ("gemma2", {**_BASE, "head_dim": 16, "sliding_window": 13}),
    "Gemma 3": ("gemma3_text", {**_BASE, "head_dim": 16, "sliding_window": 13}),
    "Phi-1, Phi-2": ("phi", _BASE),
    "Phi-3, Phi-4": ("phi3", _BASE),
    "Phi-3 128k (longrope)": ("phi3", {**_BASE, "rope_parameters": _LONG, "original_max_position_embeddings": 30}),
    "gpt-oss": ("gpt_oss", {**_BASE, "head_dim": 16, "sliding_window": 13, "num_local_experts": 4}),
    "DeepSeek-V2": ("deepseek_v2", {**_LATENT, "topk_method": "greedy", "moe_layer_freq": 1}),
    "DeepSeek-V3, R1": ("deepseek_v3", {**_LATENT, "topk_method": "noaux_tc", "scoring_func": "sigmoid"}),
    "GLM-4": ("glm4", {**_BASE, "head_dim": 16}),
    "Command R": ("cohere", _BASE),
    "Granite": ("granite", _BASE),
    "OLMo 2": ("olmo2", _BASE),
    "OLMoE": ("olmoe", _EXPERTS),
    "SmolLM3": ("smollm3", _BASE),
    "StarCoder": ("gpt_bigcode", _OLD),
    "StarCoder2": ("starcoder2", _BASE),
    "StableLM": ("stablelm", _BASE),
    "GPT-2": ("gpt2", _OLD),
    "GPT-Neo": ("gpt_neo", {**_OLD, "attention_types": [[["global", "local"], 1]], "window_size": 13}),
    "GPT-J": ("gptj", {**_OLD, "rotary_dim": 8}),
    "GPT-NeoX, Pythia": ("gpt_neox", _OLD),
    "CodeGen": ("codegen", {**_OLD, "rotary_dim": 8}),
    "OPT": ("opt", {**_OLD, "pad_token_id": 1, "word_embed_proj_dim": 64, "ffn_dim": 96}),
    "BLOOM, BLOOMZ": ("bloom", _OLD),
    "MPT": ("mpt", {"vocab_size": VOCABULARY, "d_model": 64, "n_heads": 4, "n_layers": 2, "max_seq_len": 512}),
    "Falcon": ("falcon", {**_OLD, "multi_query": True}),
    "Falcon 40B, 180B": ("falcon", {**_OLD, "new_decoder_architecture": True, "num_kv_heads": 2}),
    "Falcon-RW (ALiBi)": ("falcon", {**_OLD, "alibi": True, "multi_query": False, "parallel_attn": False}),
    "XGLM": ("xglm", {**_OLD, "d_model": 64, "ffn_dim": 96}),
    "LFM2": ("lfm2", {**_BASE, "conv_dim": 64, "block_dim": 64, "layer_types": ["conv", "full_attention"]}),
    "Jamba": ("jamba", {**_BASE, "attn_layer_offset": 1, "attn_layer_period": 2, "use_mamba_kernels": False}),
    "Falcon-H1": ("falcon_h1", {**_BASE, "head_dim": 16, "mamba_d_ssm": 64, "mamba_n_heads": 4}),
    "Mamba": ("mamba", {**_NONE, "vocab_size": VOCABULARY, "hidden_size": 64, "num_hidden_layers": 2, "state_size": 8}),
}
"""What people call it, what transformers calls it, and what makes it small."""
FAMILIES |= encoder_decoders.FAMILIES

PROMPTS = [[3 + token for token in prompt] for prompt in prompts((3, 20, 40))]
"""Above what a model may take for padding."""
NEW = 8


def verdict(expected: list[list[int]], make: Callable[[], Any]) -> str:
    """Return "yes" if the engine that is made generates what is expected, else why not."""
    try:
        found = generated(make(), one_bucket(PROMPTS, SamplingParams(max_new_tokens=NEW)))
    except Unsupported as reason:
        return f"no: {reason}"
    except (AttributeError, IndexError, KeyError, RuntimeError, TypeError, ValueError) as error:
        return f"no: {one_line(error)}"
    return compared([found[row] for row in range(len(PROMPTS))], expected)


def compared(found: Sequence[Sequence[int]], expected: Sequence[Sequence[int]]) -> str:
    """Return "yes" if all tokens are as expected, else how many of each prompt are before the first other one."""
    if list(map(list, found)) == list(map(list, expected)):
        return "yes"
    same = [
        next((place for place, (a, b) in enumerate(zip(ours, theirs, strict=True)) if a != b), NEW)
        for ours, theirs in zip(found, expected, strict=True)
    ]
    return f"no: other tokens, after {', '.join(map(str, same))} of {NEW}"


def row(name: str) -> list[str]:
    """Return a family's line of the table, without the column of vLLM."""
    if name in encoder_decoders.FAMILIES:
        return encoder_decoders.row(name)
    kind, values = FAMILIES[name]

    def new() -> Any:
        return tiny(transformers.AutoConfig.for_model(kind, **values), scale=4.0)

    config = transformers.AutoConfig.for_model(kind, **values)
    tokens = getattr(config, "max_position_embeddings", None) or ROOMY.context_tokens
    limits = EngineLimits(ROOMY.max_seqs, ROOMY.step_tokens, ROOMY.cache_bytes, tokens, deterministic=True)
    expected = plain_of(new(), PROMPTS, NEW)
    native = verdict(expected, lambda: build_engine(new(), "kernel" if kernel_of("kernel") else "torch", limits))
    return [name, f"`{kind}`", native, verdict(expected, lambda: HFEngine(new(), (), letters, 10_000))]


def wide(values: Mapping[str, Any]) -> dict[str, Any]:
    """Return the values of a family with heads of 32 numbers, the fewest that vLLM's attention takes on a CPU."""
    wider: dict[str, Any] = {
        name: 128
        for name in ("hidden_size", "d_model", "word_embed_proj_dim", "conv_dim", "block_dim")
        if name in values
    }
    wider |= {name: 32 for name in ("head_dim", "linear_key_head_dim", "linear_value_head_dim") if name in values}
    if "kv_lora_rank" in values:  # of multi-head latent attention it has one size
        wider |= {"kv_lora_rank": 512, "qk_rope_head_dim": 64, "qk_nope_head_dim": 128, "v_head_dim": 128}
    if values.get("rope_parameters", {}).get("rope_type") == "longrope":
        wider["rope_parameters"] = {**_LONG, "short_factor": [1.0] * 16, "long_factor": [4.0] * 16}
    kept = {name: value for name, value in values.items() if (name, value) != ("num_key_value_heads", None)}
    return {**kept, **wider}


def vllm_verdict(name: str) -> str:
    """Return "yes" if vLLM generates what is expected of a family, else why not; for a process that has no vLLM yet."""
    from hpc.engine.vllm.engine import VllmEngine
    from hpc.engine.vllm.installed import version
    from hpc.engine.vllm.load import engine_arguments, start_vllm
    from hpc.engine_args import Vllm

    kind, values = FAMILIES[name]
    model = tiny(transformers.AutoConfig.for_model(kind, **wide(values)), scale=4.0)
    [architecture] = model.config.architectures or [type(model).__name__]
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        expected = plain_of(model, PROMPTS, NEW)

        def ask(asked: Vllm) -> str:
            arguments = engine_arguments(Path(folder), "float32", 4, 64 << 20, 256, False, asked)
            try:
                engine = VllmEngine(start_vllm(arguments, None, 1), (), letters)
                found = generated(engine, one_bucket(PROMPTS, SamplingParams(max_new_tokens=NEW)))
            except Exception as error:  # whatever its parts raise
                return f"no: {one_line(error)}"
            return compared([found[row] for row in range(len(PROMPTS))], expected)

        said = ask(Vllm())
        if "Chunked prefill is required" in said:  # which a CPU's vLLM is not to do
            said = ask(Vllm(enable_prefix_caching=False)).replace("yes", "yes, on a CPU with no prefix cache")
    from vllm import ModelRegistry

    if architecture in ModelRegistry.get_supported_archs():
        if not (failed := re.match(r"no: EngineFault: .*?(?:under way|does not start): (.*?)\.?(; see this|$)", said)):
            return said
        return f"no on a CPU, listed for GPUs: {failed[1]}"
    lacks = f"vLLM {version()} has no {architecture}"
    return f"yes, if named: {lacks}, and takes transformers' layers" if said == "yes" else f"no: {lacks}"


def ask_vllm() -> None:
    """Ask vLLM for the families that have no answer yet."""
    found: dict[str, str] = json.loads(ANSWERS.read_text("utf-8")) if ANSWERS.exists() else {}
    for name in FAMILIES:
        if name not in found:
            found[name] = _asked(name)
            print(f"{name} | {found[name]}", flush=True)
            ANSWERS.write_text(json.dumps({name: found[name] for name in FAMILIES if name in found}, indent=1) + "\n")


def _asked(name: str) -> str:
    """Return vLLM's verdict on a family, of a process of its own where it must be tried."""
    if name in encoder_decoders.FAMILIES:
        kind, values = FAMILIES[name]
        return encoder_decoders.verdict("vllm", transformers.AutoConfig.for_model(kind, **values))
    command = [sys.executable, "-m", "tests.bench.architectures", "--vllm", name]
    asked = subprocess.run(command, capture_output=True, text=True, timeout=900, stdin=subprocess.DEVNULL)
    lines = [line for line in asked.stdout.splitlines() if line.startswith(("yes", "no"))]
    return lines[-1] if lines else f"no: it ended with {asked.returncode}"


def page(rows: Sequence[Sequence[str]], answers: Mapping[str, str], old: str) -> str:
    """Return the page with another table; what stands above it stays."""
    lines = [f"| {' | '.join([*cells, answers[cells[0]]])} |" for cells in rows]
    table = "\n".join(["| family | `model_type` | native | hf | vllm |", "|---|---|---|---|---|", *lines])
    version = transformers.__version__
    above, _, _ = old.partition(HEADING)
    return f"""{above}{HEADING}

`python -m tests.bench.architectures` made this table with transformers {version}: of each family a tiny model with
random weights. "Yes" means that in float32 on a CPU three prompts give the tokens that `generate` gives for one prompt
at a time. A model that `native` does not serve, which it finds out when it loads it, goes to `hf` by itself, with the
reason that stands here. A sequence of Phi-3 with LongRoPE that grows beyond its first context is computed anew with the
frequencies for long ones, as `generate` does it for one prompt alone; on a GPU such a model goes to another engine.
vLLM is asked in its CPU build, with heads of 32 numbers and the transformers that it
wants (`python -m tests.bench.architectures --vllm` in the environment of `make test-vllm`): "other tokens" are counted
for each prompt up to the first other one; what it has for GPUs alone is said to be so.

{table}
"""


def main() -> None:
    """Write the page, or print the lines of the families that are named."""
    logging.disable()
    if sys.argv[1:2] == ["--vllm"]:
        if sys.argv[2:]:
            print(vllm_verdict(sys.argv[2]), flush=True)
            os._exit(0)  # vLLM's own end takes its time
        ask_vllm()
        return
    if names := sys.argv[1:]:
        for name in names:
            print(" | ".join(row(name)), flush=True)
        return
    rows = []
    for name in FAMILIES:
        rows.append(row(name))
        print(" | ".join(rows[-1]), flush=True)
    PAGE.write_text(page(rows, json.loads(ANSWERS.read_text("utf-8")), PAGE.read_text("utf-8")), "utf-8")


if __name__ == "__main__":
    main()
