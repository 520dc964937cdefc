"""Compare the tensors of a checkpoint with those of its model. A missing one would be filled with random numbers.

transformers reports missing and unexpected tensors. It renames, merges and ties weights on the way, so it is asked
before anything is read, with the names and shapes of the headers in the place of the tensors.
"""

import logging
import re
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import torch

from hpc.exit import Refusal
from hpc.model.checkpoint import tensors, weight_files
from hpc.model.kind import auto_class

LOGGER = logging.getLogger(__name__)


_DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "I64": torch.int64,
    "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8, "BOOL": torch.bool,
}  # fmt: skip

_CONSTANTS = re.compile(r"(^|\.)(attn|attention)\.(masked_)?bias$|(^|\.)(inv_freq|causal_mask)$")
"""Masks and frequencies, which older checkpoints of many architectures have and models compute for themselves."""

_FEW = 3
"""Names that a message gives as examples."""


def check_names(config: Any, path: Path, trust_remote_code: bool) -> None:
    """Raise `Refusal` if the headers of the weights show that they are not those of the model.

    Where they do not show it (quantized weights, files that have no header), loading does.
    """
    if getattr(config, "quantization_config", None) is not None:
        return
    try:
        held = _held(weight_files(path))
        with torch.device("meta"):
            empty: Any = auto_class(config).from_config(config, trust_remote_code=trust_remote_code)
        model, info = type(empty).from_pretrained(
            None, config=empty.config, state_dict=held, device_map={"": "meta"}, dtype=torch.float32,
            output_loading_info=True, ignore_mismatched_sizes=True,
        )  # fmt: skip
    except Refusal:
        raise
    except Exception as error:  # a model's code may do anything; what is wrong with the weights, loading says
        LOGGER.debug("the names of the weights in %s were not checked: %r", path, error)
        return
    if gaps := describe_gaps(model, info, path):
        raise Refusal(gaps)


def describe_gaps(model: Any, info: Mapping[str, Collection[Any]], path: Path) -> str:
    """Return a message naming the missing, unexpected and misshapen tensors of a checkpoint; empty if there are none.

    `info` is the loading info of `from_pretrained`, which leaves out tied weights and those that transformers ignores.
    """
    buffers = {name for name, _ in model.named_buffers()}
    missing = sorted(info["missing_keys"])
    unexpected = sorted(n for n in info["unexpected_keys"] if n not in buffers and not _CONSTANTS.search(n))
    mismatched = sorted((str(name), tuple(got), tuple(wanted)) for name, got, wanted in info["mismatched_keys"])
    if not (missing or unexpected or mismatched):
        return ""
    count, found = len(model.state_dict()), []
    if missing:
        found.append(f"{len(missing)} of its {count} tensors are not in the checkpoint ({_first(missing)})")
    if unexpected:
        found.append(f"{len(unexpected)} tensors of the checkpoint are none of its ({_first(unexpected)})")
    if mismatched:
        shapes = [f"{name}: {list(got)} in place of {list(wanted)}" for name, got, wanted in mismatched]
        found.append(f"{len(mismatched)} have another shape ({_first(shapes)})")
    way_out = "copy or download the model again, and see that config.json belongs to these weights"
    if prefix := _common_prefix(unexpected, missing):
        way_out = f'the names of the checkpoint begin with "{prefix}": save the model without what it was wrapped in'
    elif missing and all(name.startswith(("lm_head.", "embed_out.", "output.")) for name in missing):
        way_out = (
            "name a model with a head that chooses tokens (…ForCausalLM, …ForConditionalGeneration), and not its base "
            "or a classifier"
        )
    return (
        f'model "{path}": the weights are not those of {type(model).__name__}: {"; ".join(found)}. Way out: {way_out}'
    )


def _held(files: Collection[Path]) -> dict[str, torch.Tensor]:
    """Return tensors without values for all that the files hold."""
    held: dict[str, torch.Tensor] = {}
    for path in files:
        if path.suffix == ".safetensors":
            for name, (dtype, shape) in tensors(path).items():
                held[name] = torch.empty(shape, dtype=_DTYPES.get(dtype, torch.float32), device="meta")
        else:
            held.update(torch.load(path, map_location="meta", mmap=True, weights_only=True))
    return held


def _common_prefix(unexpected: Collection[str], missing: Collection[str]) -> str:
    """Return the prefix that all unexpected names share, if the rest of each name is a missing one; else empty."""
    wanted = set(missing)
    found = {
        name[:at]
        for name in unexpected
        for at in (index + 1 for index, char in enumerate(name) if char == ".")
        if name[at:] in wanted
    }
    return found.pop() if len(found) == 1 and len(missing) > 1 else ""


def _first(names: list[str]) -> str:
    return ", ".join(names[:_FEW]) + (", …" if len(names) > _FEW else "")
