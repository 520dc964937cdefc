"""Load a model directory onto a device; make one out of a GGUF file. The only place that chooses a device."""

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
    """Make a `Refusal` of what transformers raises for a model directory that it cannot read."""
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
    """Raise `Refusal` for what does not generate text, or is not all of a model, as far as config and headers show."""
    config = configuration(path, trust_remote_code)
    kind.check_kind(config, path)
    with refusing(path):
        account.check_names(config, path, trust_remote_code)


def load(path: Path, device: torch.device, dtype: str, threads: int, trust_remote_code: bool = False) -> Any:
    """Load a causal language model or an encoder-decoder for inference, using so many CPU threads.

    Raises `ValueError` if the checkpoint is not all of the model, or has more than it.
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


def weights_of(path: Path, dtype: str) -> tuple[int, float, float] | None:
    """Return `weights` of a model that is not loaded; None for a quantized one, and where transformers has no such."""
    try:
        config: Any = AutoConfig.from_pretrained(path)
        if hasattr(config, "quantization_config"):
            return None
        with torch.device("meta"):
            return weights(kind.auto_class(config).from_config(config, dtype=getattr(torch, dtype)))
    except Exception:  # a figure is missing then, and nothing else
        return None
