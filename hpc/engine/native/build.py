"""Build a native engine of a loaded model, after checking what the model declares, and then its numbers."""

import inspect
import logging
from collections.abc import Collection
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from transformers import AutoModelForCausalLM

from hpc.engine import frequencies
from hpc.engine.cache import Cache
from hpc.engine.extents import ALIGN
from hpc.engine.failure import is_out_of_memory, one_line
from hpc.engine.form import AttentionSpec, KVShape
from hpc.engine.kernel.kernel import Kernel
from hpc.engine.kernel.onednn import OneDnn
from hpc.engine.layers.adopt import adopt, can_adopt
from hpc.engine.layers.attention import AttentionMetadata, Span, Unsupported, flash_spans, lacks_flash
from hpc.engine.layers.experts import RowBlocks
from hpc.engine.layers.fuse import fuse
from hpc.engine.layers.fused import Linears
from hpc.engine.memory import gpu_cache_bytes
from hpc.engine.native.cuda_graphs import CaptureError, DecodeGraphs, warn_of
from hpc.engine.native.engine import NativeEngine
from hpc.engine.native.largest import largest_graph, largest_step
from hpc.engine.native.limits import EngineLimits
from hpc.trim import Decode

LOGGER = logging.getLogger(__name__)


_KINDS = {"full_attention", "sliding_attention"}
_HALF = (torch.float16, torch.bfloat16)
_TOLERANCE = {torch.float32: 1e-3, torch.float16: 3e-2, torch.bfloat16: 1e-1}
"""Maximum difference from the logits of the model's own attention, as a share of the largest: more than the rounding of
all layers, and less than a wrong layer."""


def build_native(
    model: Any, eos_token_ids: Collection[int], decode: Decode, limits: EngineLimits, kernel: Kernel | None
) -> NativeEngine:
    """Replace attention and layers of a model and return its engine; raise `Unsupported`.

    After the exception the model cannot be used for anything else. `kernel` is for a model on a CPU.
    """
    check_supported(model, limits.context_tokens, model.device.type)
    if model.device.type == "cuda":  # streams are the current device's
        torch.cuda.set_device(model.device)
    if model.dtype not in Kernel.dtypes:
        kernel = None
    linears: Linears | None = kernel
    if kernel is None and model.device.type == "cpu" and model.dtype == torch.float32:
        linears = RowBlocks()
    if model.dtype == torch.bfloat16 and not limits.deterministic and model.device.type == "cpu":
        one_dnn = OneDnn()
        if one_dnn.has_amx or (one_dnn.has_bfloat16 and not (kernel and kernel.has_bfloat16)):
            linears = one_dnn
    if kernel is None or linears is not kernel:  # a draft token may be right alone and wrong beside others
        limits = replace(limits, drafts=False)
    prompts = _prompts(model.config.get_text_config().vocab_size)
    expected = _own_logits(model, prompts)
    try:
        forms = prepare(model)
        fuse(model, kernel, linears, forms, model.device.type == "cpu")
    except _FAILURES as error:
        if is_out_of_memory(error):
            raise
        raise Unsupported(f"it fails with the engine's layers: {one_line(error)}") from error
    layouts = {layer: form.layout for layer, form in forms.items()}
    before_long = frequencies.tokens_before_change(model.config.get_text_config())
    if before_long is not None and limits.context_tokens > before_long:
        limits = replace(limits, long_from=before_long)
        frequencies.choose_by_token(model)
    flash, graphs = False, False
    if model.device.type == "cuda":
        flash, graphs = _gpu_means(model, forms, prompts, expected)
    if not flash and (fault := _fault(model, prompts, expected, layouts, kernel)):
        raise Unsupported(fault)
    if limits.share_from is not None and not _reads_prefixes(model, forms, prompts, expected, flash, graphs, limits):
        limits = replace(limits, share_from=None)
    if not graphs:  # no step is replayed, and those that wait gain nothing
        limits = replace(limits, refill=0.0)
    if model.device.type == "cuda":
        if limits.deterministic:
            _forbid_what_depends_on_the_batch(model)
        if not limits.cache_bytes:
            left = gpu_cache_bytes(
                model.device,
                lambda: largest_step(model, layouts, limits, flash),
                lambda: largest_graph(model, layouts, limits) if graphs else None,
            )
            limits = replace(limits, cache_bytes=left)
    return NativeEngine(model, layouts, eos_token_ids, decode, limits, kernel, flash, graphs)


_FAILURES = (AttributeError, KeyError, RuntimeError, TypeError, ValueError)


def _gpu_means(
    model: Any, forms: dict[int, AttentionSpec], prompts: list[list[int]], expected: torch.Tensor
) -> tuple[bool, bool]:
    """Return whether FlashAttention and CUDA graphs work on this GPU, by trying both before the first request."""
    layouts = {layer: form.layout for layer, form in forms.items()}
    if lack := flash_lacks(forms, model.dtype, model.device):
        level = logging.INFO if model.dtype not in _HALF else logging.WARNING
        LOGGER.log(level, "torch attends, without FlashAttention and CUDA graphs: %s", lack)
        return False, False
    fault = _fault(model, prompts, expected, layouts, None, flash=True, graphs=True)
    if not fault:
        return True, True
    if not (worse := _fault(model, prompts, expected, layouts, None, flash=True)):
        warn_of(fault)
        return True, False
    LOGGER.warning("torch attends, without FlashAttention and CUDA graphs, which is slower: %s", worse)
    return False, False


def _reads_prefixes(
    model: Any,
    forms: dict[int, AttentionSpec],
    prompts: list[list[int]],
    expected: torch.Tensor,
    flash: bool,
    graphs: bool,
    limits: EngineLimits,
) -> bool:
    """Return whether FlashAttention can read a shared prefix in place, by trying it.

    Not with sliding windows, which begin in another place of the prefix for each query, nor where nothing may
    depend on the batch.
    """
    if not flash or limits.deterministic or any(form.window for form in forms.values()):
        return False
    layouts = {layer: form.layout for layer, form in forms.items()}
    if fault := _fault(model, prompts, expected, layouts, None, flash, graphs, shared=7):
        LOGGER.warning("each sequence has a copy of what it shares with others, which is slower: %s", fault)
    return not fault


def _forbid_what_depends_on_the_batch(model: Any) -> None:
    """Forbid products to sum in parts, whose number may depend on the place of a row; warn of what is left."""
    for name in ("allow_bf16_reduced_precision_reduction", "allow_fp16_reduced_precision_reduction"):
        try:
            setattr(torch.backends.cuda.matmul, name, (False, False))
        except (RuntimeError, TypeError):  # an older torch knows no second switch
            setattr(torch.backends.cuda.matmul, name, False)
    if any(parameter.dim() == 3 for parameter in model.parameters()):
        LOGGER.warning(
            "--deterministic does not hold for this model: which rows an expert has depends on all that are in a "
            "step, and by rounding what is generated may do so too"
        )


def flash_lacks(forms: dict[int, AttentionSpec], dtype: torch.dtype, device: torch.device) -> str:
    """Return why torch's FlashAttention cannot compute a model on a GPU; an empty string if it can."""
    if dtype not in _HALF:
        return f"FlashAttention computes in bfloat16 and float16, and not in {str(dtype).removeprefix('torch.')}"
    if torch.version.hip is not None:
        return "ROCm's FlashAttention does not take keys that lie anywhere"
    if not torch.backends.cuda.is_flash_attention_available():
        return "this torch was built without FlashAttention"
    if (major := torch.cuda.get_device_capability(device)[0]) < 8:
        return f"FlashAttention needs a GPU of compute capability 8 or more, and this one has {major}"
    lacks = sorted({lack for form in forms.values() if (lack := lacks_flash(form))})
    return f"FlashAttention has no {', '.join(lacks)}" if lacks else ""


def _fault(
    model: Any,
    prompts: list[list[int]],
    expected: torch.Tensor,
    layouts: dict[int, KVShape],
    kernel: Kernel | None,
    flash: bool = False,
    graphs: bool = False,
    shared: int = 0,
) -> str:
    """Return how the engine's logits are wrong; an empty string if they are the model's own."""
    try:
        got = _engine_logits(model, prompts, layouts, kernel, flash, graphs, shared)
    except (*_FAILURES, Unsupported, CaptureError) as error:
        if is_out_of_memory(error) or (isinstance(error, Unsupported) and not flash):
            raise
        return f"it fails with the engine's layers: {one_line(error)}"
    worst = float((got - expected).abs().max() / expected.abs().max())
    if worst <= _TOLERANCE.get(model.dtype, 1e-3):
        return ""
    return f"its logits differ by {worst:.1e} of the largest from those of the model's own attention"


def unsupported(config: Any, context_tokens: int, trust_remote_code: bool = False, device: str = "cpu") -> str | None:
    """Return why the engine does not support a model with this configuration; None if nothing speaks against it.

    The trial when the model is loaded may still find that it is not supported.
    """
    try:
        with torch.device("meta"):
            empty = AutoModelForCausalLM.from_config(config, trust_remote_code=trust_remote_code)
    except Exception:  # a model's code may do anything; loading it will say more
        return None
    try:
        check_supported(empty, context_tokens, device)
    except Unsupported as reason:
        return str(reason)
    return None


def check_supported(model: Any, context_tokens: int, device: str = "cpu") -> None:
    """Raise `Unsupported` for a model that a type of device cannot compute in sequences of `context_tokens`."""
    config = model.config.get_text_config()
    if kinds := set(getattr(config, "layer_types", None) or ()) - _KINDS:
        raise Unsupported(f"it has layers of {', '.join(sorted(kinds))}")
    if getattr(model, "_is_stateful", False):
        raise Unsupported("it has recurrent layers")
    if not getattr(model, "_supports_attention_backend", False) and not can_adopt(model):
        raise Unsupported("its attention cannot be replaced")
    max_tokens = frequencies.tokens_before_change(config)
    # A GPU is a token ahead of the host, which would have to know all of them.
    can_change = device == "cpu" and frequencies.changes_by_sequence(model)
    if max_tokens is not None and context_tokens > max_tokens and not can_change:
        raise Unsupported(
            f"the frequencies of its positions change when a sequence grows beyond {max_tokens} tokens, and its "
            f"sequences may have {context_tokens}"
        )
    if "logits_to_keep" not in inspect.signature(model.forward).parameters:
        raise Unsupported("it computes logits for every token of a prompt")


@torch.inference_mode()
def prepare(model: Any) -> dict[int, AttentionSpec]:
    """Put the engine's attention into a model; return the attention of each layer."""
    adopt(model)
    frequencies.fix(model)
    probe = AttentionMetadata(None, [Span(0, 8, 0, 0, 0, 0)])
    _forward(model, [0] * 8, list(range(8)), probe, [0])
    if not probe.forms:
        raise Unsupported("none of its layers has called the engine's attention")
    return probe.forms


@torch.inference_mode()
def _own_logits(model: Any, prompts: list[list[int]]) -> torch.Tensor:
    """Return the logits after each prompt, [prompts, vocabulary], by the model's own attention."""
    model.set_attn_implementation("eager")
    inputs = [torch.tensor([prompt], device=model.device) for prompt in prompts]
    return torch.stack([model(input_ids=ids, use_cache=False).logits[0, -1] for ids in inputs]).float()


@torch.inference_mode()
def _engine_logits(
    model: Any,
    prompts: list[list[int]],
    layouts: dict[int, KVShape],
    kernel: Kernel | None,
    flash: bool = False,
    graphs: bool = False,
    shared: int = 0,
) -> torch.Tensor:
    """Return the same by the engine's attention, in a packed prompt step and a decoding step.

    The first `shared` tokens of each prompt are a prefix in another extent.
    """
    extents = [(128 * index, 128 * index + 64) for index in range(len(prompts))]
    cache = Cache(layouts, 128 * len(prompts), model.dtype, model.device, kernel.panel if kernel else 0, ALIGN)
    new: Any = lambda spans: flash_spans(np.array(spans, dtype=np.int64), model.device) if flash else None  # noqa: E731
    spans: list[Span] = []
    ids: list[int] = []
    at: list[int] = []
    for prompt, (start, prefix) in zip(prompts, extents, strict=True):
        if shared:
            spans.append(Span(len(ids), shared, 0, prefix, 0, 0))
        spans.append(Span(len(ids) + shared, len(prompt) - 1 - shared, shared, start, prefix, shared))
        ids += prompt[:-1]
        at += range(len(prompt) - 1)
    _forward(model, ids, at, AttentionMetadata(cache, spans, kernel, flash=new(spans)), [0])
    spans = [
        Span(row, 1, len(prompt) - 1, start, prefix, shared)
        for row, (prompt, (start, prefix)) in enumerate(zip(prompts, extents, strict=True))
    ]
    step = AttentionMetadata(cache, spans, kernel, flash=new(spans))
    ids, at = [prompt[-1] for prompt in prompts], [len(prompt) - 1 for prompt in prompts]
    if graphs:
        small = DecodeGraphs(model, cache, len(prompts), 64, fixed=False)
        return small.run(torch.tensor(ids, device=model.device), np.array(spans, dtype=np.int64)).float()
    return _forward(model, ids, at, step, list(range(len(prompts)))).float()


def _forward(
    model: Any, ids: list[int], positions: list[int], step: AttentionMetadata, keep: list[int]
) -> torch.Tensor:
    new: Any = lambda values: torch.tensor(values, device=model.device)  # noqa: E731
    step.kept = new(keep)
    out = model(
        input_ids=new(ids)[None],
        position_ids=new(positions)[None],
        use_cache=False,
        logits_to_keep=step.kept,
        engine=step,
    )
    logits: torch.Tensor = out.logits[0]
    return logits


def _prompts(vocab_size: int) -> list[list[int]]:
    """Return two prompts with tokens from all over the vocabulary: 7919 is prime, and far apart."""
    return [[(7 + index * 7919 * step) % vocab_size for index in range(length)] for length, step in ((21, 1), (9, 5))]
