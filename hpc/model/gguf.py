"""Convert a GGUF file to a model directory."""

import contextlib
import gc
import io
import os
import shutil
from pathlib import Path
from typing import Any

import torch
from tokenizers import pre_tokenizers
from transformers import AutoModelForCausalLM, AutoTokenizer

from hpc.exit import Refusal
from hpc.model import account


def convert_gguf(gguf: Path, folder: Path) -> None:
    """Make a model directory out of a GGUF file: float32 safetensors, tokenizer, chat template.

    transformers takes a while to read GGUF and refuses to save what it read, so the weights go into
    a fresh model of the same configuration. The folder appears complete or not at all. Raises `Refusal` if the
    file lacks weights of its architecture.
    """
    with contextlib.redirect_stderr(io.StringIO()):  # a progress bar that cannot be switched off
        source, info = AutoModelForCausalLM.from_pretrained(
            gguf.parent, gguf_file=gguf.name, dtype=torch.float32,
            output_loading_info=True, ignore_mismatched_sizes=True,
        )  # fmt: skip
    if gaps := account.describe_gaps(source, info, gguf):
        raise Refusal(gaps)
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
