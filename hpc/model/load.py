"""Read the configuration of a model directory, examine it, and load the model onto a device."""

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import AutoConfig, GenerationConfig

from hpc.exit import Refusal
from hpc.model import account, kind


def quiet() -> None:
    """Keep transformers' progress bars and hints out of the log: hundreds of ranks would print them."""
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()


def configuration(path: Path, trust_remote_code: bool = False) -> Any:
    """Read a model directory's config.json; raise `Refusal` where transformers cannot."""
    with refusing(path):
        return AutoConfig.from_pretrained(path, trust_remote_code=trust_remote_code)


@contextlib.contextmanager
def refusing(path: Path) -> Iterator[None]:
    """Turn whatever transformers raises for a model directory that it cannot read into a `Refusal`."""
    try:
        yield
    except Refusal:
        raise
    except Exception as error:  # it raises whatever its parts do
        if "trust_remote_code" in str(error):
            raise Refusal(
                f'model "{path}" comes with code of its own, which is not run unless you say so: read the .py files '
                "that config.json and tokenizer_config.json name, and add --trust-remote-code"
            ) from error
        if isinstance(error, ImportError) and "SentencePiece" in str(error):
            way_out = "pip install 'scattergen[translation]'"
            raise Refusal(f'model "{path}": its tokenizer needs the library SentencePiece: {way_out}') from error
        said = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise Refusal(
            f'model "{path}" cannot be read by transformers {transformers.__version__}: {said}. Copy or download it '
            "again, or see whether it needs another version"
        ) from error


def examine(path: Path, trust_remote_code: bool = False) -> None:
    """Raise `Refusal` if config and headers show that the model does not generate text or lacks a part."""
    config = configuration(path, trust_remote_code)
    kind.check_kind(config, path)
    with refusing(path):
        account.check_names(config, path, trust_remote_code)


def load(path: Path, device: torch.device, dtype: str, threads: int, trust_remote_code: bool = False) -> Any:
    """Load a causal language model or an encoder-decoder for inference, with `threads` CPU threads.

    Raises `ValueError` if the checkpoint lacks tensors of the model or has others.
    """
    torch.set_num_threads(threads)
    if device.type == "cuda":  # else this process would have a context on GPU 0 too
        torch.cuda.set_device(device)
    # With a device map the weights go from the file to the device, and not through a copy in memory. Shapes that do
    # not match are told by `describe_gaps`, with the rest.
    model, info = kind.auto_class(configuration(path, trust_remote_code)).from_pretrained(
        path, dtype=getattr(torch, dtype), device_map={"": device}, trust_remote_code=trust_remote_code,
        output_loading_info=True, ignore_mismatched_sizes=True,
    )  # fmt: skip
    if gaps := account.describe_gaps(model, info, path):
        raise ValueError(gaps)
    model.eval()
    # A field that is None in a request's configuration would be filled in from here.
    model.generation_config = GenerationConfig()
    return model


def weights(model: Any) -> tuple[int, float, float]:
    """Return the bytes of a model's weights, and the operations per token of its layers and of its head.

    A weight of a matrix counts two operations. Of the experts of a layer, which are one tensor, those that a token
    meets are counted.
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


def weights_of(path: Path, dtype: str) -> tuple[int, float, float] | None:
    """Return `weights` of a model without loading it; None if it is quantized or transformers does not know it."""
    try:
        config: Any = AutoConfig.from_pretrained(path)
        if hasattr(config, "quantization_config"):
            return None
        with torch.device("meta"):
            return weights(kind.auto_class(config).from_config(config, dtype=getattr(torch, dtype)))
    except Exception:  # a figure is missing then, and nothing else
        return None
