"""Make a native engine of a loaded model, or say why not: by what the model declares, and by trying it."""

import inspect
import logging
from collections.abc import Collection
from dataclasses import replace
from typing import Any

import torch

from hpc.engine import frequencies
from hpc.engine.adopt import adopt, can_adopt
from hpc.engine.attention import Span, Step, Unsupported
from hpc.engine.batch import one_line
from hpc.engine.cache import Cache, Layout
from hpc.engine.fuse import fuse
from hpc.engine.hf import is_out_of_memory
from hpc.engine.kernel import Form, Kernel, OneDnn
from hpc.engine.native import NativeEngine
from hpc.engine.run import Limits
from hpc.trim import Decode

LOGGER = logging.getLogger(__name__)

_KINDS = {"full_attention", "sliding_attention"}
_TOLERANCE = {torch.float32: 1e-3, torch.float16: 3e-2, torch.bfloat16: 1e-1}
"""How far logits may be from those of the model's own attention, as a share of the largest."""


def build(
    model: Any, eos_token_ids: Collection[int], decode: Decode, limits: Limits, kernel: Kernel | None
) -> NativeEngine:
    """Return an engine for a model, whose attention and layers change hands; raise `Unsupported`.

    After the exception the model is of no use to anything else. `kernel` is for a model on a CPU.
    """
    check(model)
    most = frequencies.tokens_before_change(model.config.get_text_config())
    if most is not None and limits.context_tokens > most:
        raise Unsupported(
            f"the frequencies of its positions change when a sequence grows beyond {most} tokens, and its sequences "
            f"may have {limits.context_tokens}"
        )
    if model.dtype not in Kernel.dtypes:
        kernel = None
    linears: Kernel | OneDnn | None = kernel
    if model.dtype == torch.bfloat16 and not limits.deterministic and model.device.type == "cpu":
        one_dnn = OneDnn()
        if one_dnn.has_amx or (one_dnn.has_bfloat16 and not (kernel and kernel.has_bfloat16)):
            linears = one_dnn
    if kernel is None or linears is not kernel:  # a guess may be right alone and wrong beside others
        limits = replace(limits, drafts=False)
    prompts = _prompts(model.config.get_text_config().vocab_size)
    expected = _own_logits(model, prompts)
    try:
        forms = prepare(model)
        fuse(model, kernel, linears, forms)
        layouts = {layer: form.layout for layer, form in forms.items()}
        got = _engine_logits(model, prompts, layouts, kernel)
    except (AttributeError, KeyError, RuntimeError, TypeError, ValueError) as error:
        if is_out_of_memory(error):
            raise
        raise Unsupported(f"it fails with the engine's layers: {one_line(error)}") from error
    worst = float((got - expected).abs().max() / expected.abs().max())
    if not worst <= _TOLERANCE.get(model.dtype, 1e-3):
        raise Unsupported(f"its logits differ by {worst:.1e} of the largest from those of the model's own attention")
    return NativeEngine(model, layouts, eos_token_ids, decode, limits, kernel)


def check(model: Any) -> None:
    """Raise `Unsupported` for a model that declares what the engine cannot do."""
    config = model.config.get_text_config()
    if kinds := set(getattr(config, "layer_types", None) or ()) - _KINDS:
        raise Unsupported(f"it has layers of {', '.join(sorted(kinds))}")
    if getattr(model, "_is_stateful", False):
        raise Unsupported("it has recurrent layers")
    if not getattr(model, "_supports_attention_backend", False) and not can_adopt(model):
        raise Unsupported("its attention cannot be replaced")
    if "logits_to_keep" not in inspect.signature(model.forward).parameters:
        raise Unsupported("it computes logits for every token of a prompt")


@torch.inference_mode()
def prepare(model: Any) -> dict[int, Form]:
    """Put the engine's attention into a model; return how each layer attends."""
    adopt(model)
    frequencies.fix(model)
    probe = Step(None, [Span(0, 8, 0, 0, 0, 0)])
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
    model: Any, prompts: list[list[int]], layouts: dict[int, Layout], kernel: Kernel | None
) -> torch.Tensor:
    """Return the same by the engine's: the prompts packed and in two steps, the second a decoding one."""
    extents = [64 * index for index in range(len(prompts))]
    cache = Cache(layouts, 64 * len(prompts), model.dtype, model.device, kernel.panel if kernel else 0)
    spans: list[Span] = []
    ids: list[int] = []
    at: list[int] = []
    for prompt, start in zip(prompts, extents, strict=True):
        spans.append(Span(len(ids), len(prompt) - 1, 0, start, 0, 0))
        ids += prompt[:-1]
        at += range(len(prompt) - 1)
    _forward(model, ids, at, Step(cache, spans, kernel), [0])
    spans = [Span(row, 1, len(p) - 1, start, 0, 0) for row, (p, start) in enumerate(zip(prompts, extents, strict=True))]
    step = Step(cache, spans, kernel)
    ids, at = [prompt[-1] for prompt in prompts], [len(prompt) - 1 for prompt in prompts]
    return _forward(model, ids, at, step, list(range(len(prompts)))).float()


def _forward(model: Any, ids: list[int], positions: list[int], step: Step, keep: list[int]) -> torch.Tensor:
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
    """Return two prompts that use tokens from all over the vocabulary."""
    return [[(7 + index * 7919 * step) % vocab_size for index in range(length)] for length, step in ((21, 1), (9, 5))]
