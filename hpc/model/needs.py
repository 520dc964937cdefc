"""What a model needs of the devices that are to hold it, as its files say. Knows neither torch nor transformers."""

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hpc.exit import Refusal
from hpc.model.checkpoint import tensors, weight_files

BYTES = {"F64": 8, "F32": 4, "BF16": 2, "F16": 2, "I64": 8, "I32": 4, "I16": 2}
"""Of a number of a tensor, by what safetensors calls it; of all others 1."""
FLOATS = ("F64", "F32", "BF16", "F16")
"""What is loaded as the type that the job asks for."""
LOADED = {"float32": 4, "bfloat16": 2, "float16": 2}
HEADS = ("num_attention_heads", "n_head", "n_heads", "num_heads")
"""What configurations call the number of attention heads."""


@dataclass(frozen=True)
class Needs:
    """What a model needs."""

    weight_bytes: int
    """Of the weights once they are loaded."""
    heads: int | None
    """Attention heads, which devices share evenly; None where the configuration does not say it."""
    kv_heads: int | None = None
    """Those of keys and values; None where the configuration does not say it."""
    quantized: bool = False
    """The weights in the files are quantized."""
    has_encoder: bool = False
    """It is an encoder-decoder."""


def needs(folder: Path, dtype: str) -> Needs | None:
    """Return what the model in a folder needs in a dtype; in "auto" of 16 bits; None where its files do not tell."""
    try:
        config: dict[str, Any] = json.loads((folder / "config.json").read_bytes())
        size = None if "quantization_config" in config else LOADED.get(dtype, 2)
        weight_bytes = sum(_loaded(path, size) for path in weight_files(folder))
    except (OSError, ValueError, Refusal):
        return None
    text = config.get("text_config") or config
    heads = next((int(text[name]) for name in HEADS if isinstance(text.get(name), int)), None)
    kv_heads = text.get("num_key_value_heads")
    return Needs(
        weight_bytes,
        heads,
        kv_heads if isinstance(kv_heads, int) else None,
        "quantization_config" in config,
        config.get("is_encoder_decoder") is True,
    )


def _loaded(path: Path, size: int | None) -> int:
    """Return the bytes that the weights of a file take where a float takes `size`; as they are stored where None."""
    if path.suffix != ".safetensors":  # its header is none that says it
        return path.stat().st_size
    return sum(
        math.prod(tensor.shape) * (size if size and tensor.dtype in FLOATS else BYTES.get(tensor.dtype, 1))
        for tensor in tensors(path).values()
    )
