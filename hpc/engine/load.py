"""Load a model directory onto a device; make one out of a GGUF file. The only place that chooses a device."""

import contextlib
import gc
import io
import os
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from tokenizers import pre_tokenizers
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, GenerationConfig


@dataclass(frozen=True)
class Description:
    """What a model's configuration says of the tokens it takes."""

    vocab_size: int
    context_tokens: int | None
    """Most tokens of prompt and completion together; None where the model sets no limit (ALiBi)."""
    eos_token_ids: tuple[int, ...]
    """From the generation config, else the config; nothing else is taken from there."""


def quiet() -> None:
    """Keep transformers' progress bars and hints out of the log: hundreds of ranks would print them."""
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()


def describe(path: Path) -> Description:
    """Read a model directory's configuration."""
    config: Any = AutoConfig.from_pretrained(path).get_text_config()
    eos = None
    with contextlib.suppress(OSError):  # there is no generation_config.json
        eos = GenerationConfig.from_pretrained(path).eos_token_id
    if eos is None:
        eos = config.eos_token_id
    eos_token_ids = () if eos is None else tuple(eos) if isinstance(eos, list | tuple) else (int(eos),)
    return Description(int(config.vocab_size), getattr(config, "max_position_embeddings", None), eos_token_ids)


def resolve_device(device: str, index: int) -> torch.device:
    """Return the device of a rank: the only GPU that it sees, or the one of its index among several.

    Raises `ValueError` if CUDA is asked for and there is none, and where several are seen and there is none for it.
    """
    if device == "cpu" or (device == "auto" and not torch.cuda.is_available()):
        return torch.device("cpu")
    if not torch.cuda.is_available():
        raise ValueError('"device" is "cuda", but this process sees no CUDA GPU; check the allocation, or use auto')
    count = torch.cuda.device_count()
    if index >= count > 1:
        raise ValueError(
            f"this is rank {index + 1} of its node, and torch sees {count} GPUs there; start one rank for each GPU of "
            "a node (--slurm.tasks-per-node, mpirun -n), or add --device cpu"
        )
    return torch.device("cuda", 0 if count == 1 else index)


def uuid(device: torch.device) -> str:
    """Return what tells a GPU from all others; nothing for a CPU, or where torch does not say."""
    if device.type != "cuda":
        return ""
    return str(getattr(torch.cuda.get_device_properties(device), "uuid", ""))


def device_name(device: torch.device) -> str:
    """Return what a GPU is called."""
    return str(torch.cuda.get_device_name(device))


def resolve_dtype(dtype: str, device: str) -> str:
    """Return the type that "auto" stands for: bfloat16 on GPUs that have it, float32 on CPUs."""
    if dtype != "auto":
        return dtype
    if resolve_device(device, 0).type == "cpu":
        return "float32"
    # Not where it is emulated, as on a V100 or T4: several times slower.
    return "bfloat16" if torch.cuda.is_bf16_supported(including_emulation=False) else "float16"


def free() -> None:
    """Give back what is no longer used: of a model that was dropped, before another is loaded beside it."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def load(path: Path, device: torch.device, dtype: str, threads: int) -> Any:
    """Load a causal language model for inference, using so many CPU threads."""
    torch.set_num_threads(threads)
    if device.type == "cuda":  # else this process would have a context on GPU 0 too
        torch.cuda.set_device(device)
    # With a device map the weights go from the file to the device, and not through a copy in memory.
    model = AutoModelForCausalLM.from_pretrained(path, dtype=getattr(torch, dtype), device_map={"": device})
    model.eval()
    # A field that is None in a request's configuration would be filled in from here.
    model.generation_config = GenerationConfig()
    return model


def weights(model: Any) -> tuple[int, float, float]:
    """Return the bytes of a model's weights, and what a token costs in its layers and in its head, in operations.

    Two for each weight of a matrix; of the experts of a layer, which are one tensor, as many as a token meets.
    """
    config = model.config.get_text_config()
    experts = next((getattr(config, n) for n in ("num_local_experts", "num_experts") if getattr(config, n, None)), 1)
    met = (getattr(config, "num_experts_per_tok", None) or experts) / experts
    head = model.get_output_embeddings()
    tables = [layer.weight for layer in (model.get_input_embeddings(), head) if layer is not None]
    layers = [p for p in model.parameters() if p.dim() >= 2 and all(p is not table for table in tables)]
    in_layers = sum(p.numel() * (met if p.dim() == 3 else 1) for p in layers)
    size = sum(p.numel() * p.element_size() for p in model.parameters())
    return size, 2.0 * in_layers, 2.0 * head.weight.numel() if head is not None else 0.0


def convert_gguf(gguf: Path, folder: Path) -> None:
    """Make a model directory out of a GGUF file: float32 safetensors, tokenizer, chat template.

    transformers takes a while to read GGUF and refuses to save what it read, so the weights go into
    a fresh model of the same configuration. The folder appears complete or not at all.
    """
    with contextlib.redirect_stderr(io.StringIO()):  # a progress bar that cannot be switched off
        source = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.float32)
    config = source.config
    del config.quantization_config  # the weights are no longer quantized
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    model.load_state_dict(source.state_dict())
    model.generation_config = source.generation_config
    aside = folder.with_name(f"{folder.name}.{os.getpid()}.part")
    try:
        model.save_pretrained(aside)
        _gguf_tokenizer(gguf).save_pretrained(aside)
        try:
            aside.rename(folder)
        except OSError:
            if not (folder / "config.json").exists():  # else another process was faster
                raise
    finally:
        shutil.rmtree(aside, ignore_errors=True)
        del source, model
        gc.collect()


def _gguf_tokenizer(path: Path) -> Any:
    """Return the tokenizer of a GGUF file, with the pre-tokenizer that the file names.

    transformers splits as GPT-2 does, whatever the file says; "smollm" splits digits off first.
    """
    from gguf import GGUFReader  # here: it is for this alone

    tokenizer = AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
    field = GGUFReader(path).get_field("tokenizer.ggml.pre")
    if field is not None and field.contents() == "smollm":
        tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
            [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
        )
    return tokenizer
