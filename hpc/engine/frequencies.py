"""Handle rotary embeddings whose frequencies depend on the longest sequence of a batch: dynamic NTK and LongRoPE."""

from collections.abc import Callable
from typing import Any

import torch
from transformers import GenerationMixin
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

KINDS = ("dynamic", "longrope")
"""The values of rope_type in transformers that do so."""


def tokens_before_change(config: Any) -> int | None:
    """Return the number of tokens up to which the frequencies stay as they are; None if they never change."""
    values = config.to_dict()
    limits = {
        "dynamic": getattr(config, "max_position_embeddings", 0),
        "longrope": min(_found(values, "original_max_position_embeddings"), default=0),
    }
    return min((limits[kind] for kind in limits.keys() & _found(values, "rope_type")), default=None)


def changes_by_sequence(model: Any) -> bool:
    """Return whether `generate` computes a whole sequence anew with other frequencies when it grows too long.

    So do the models with LongRoPE that drop the cache then: what they generate for one prompt alone is then that of
    one set of frequencies for short sequences and another for long ones, and may be computed beside others.
    """
    config = model.config.get_text_config()
    parameters = getattr(config, "rope_parameters", None) or {}
    forgets = type(model).prepare_inputs_for_generation is not GenerationMixin.prepare_inputs_for_generation
    limit = getattr(config, "original_max_position_embeddings", None)
    return (
        parameters.get("rope_type") == "longrope"
        and forgets
        and limit == parameters.get("original_max_position_embeddings")
    )


def choose_by_token(model: Any) -> None:
    """Let each token of a step have the frequencies of its sequence: those for long ones if `engine.is_long` says so.

    For models of which `changes_by_sequence` is true.
    """
    embeddings = [module for module in model.modules() if hasattr(module, "original_inv_freq")]
    steps: list[torch.Tensor | None] = [None]

    def enter(_: Any, args: Any, given: dict[str, Any]) -> Any:
        steps[0] = given["engine"].is_long
        return args, given

    model.register_forward_pre_hook(enter, with_kwargs=True)
    for module in embeddings:
        config = module.config
        limit = config.rope_parameters["original_max_position_embeddings"]
        long, _ = ROPE_INIT_FUNCTIONS["longrope"](config, module.inv_freq.device, seq_len=limit + 1)
        module.forward = _by_token(module, long, steps)


def _by_token(module: Any, long: torch.Tensor, steps: list[torch.Tensor | None]) -> Callable[..., Any]:
    own, short = module.forward, module.original_inv_freq.to(long)

    def forward(x: torch.Tensor, position_ids: torch.Tensor) -> Any:
        is_long = steps[0]
        if is_long is None:
            return own(x, position_ids)
        angles = position_ids[..., None].float() * torch.where(is_long[:, None], long, short)
        both = torch.cat((angles, angles), dim=-1)
        scaling = module.attention_scaling
        return (both.cos() * scaling).to(x.dtype), (both.sin() * scaling).to(x.dtype)

    return forward


def fix(model: Any) -> None:
    """Keep the frequencies of a model as they are. Only for sequences shorter than `tokens_before_change`."""
    for module in model.modules():
        kinds = getattr(module, "rope_type", None)
        if isinstance(kinds, dict):
            module.rope_type = {layer: _fixed(kind) for layer, kind in kinds.items()}
        elif isinstance(kinds, str):
            module.rope_type = _fixed(kinds)


def _fixed(kind: str) -> str:
    return "default" if kind in KINDS else kind


def _found(value: Any, name: str) -> set[Any]:
    """Return all values under a name in a configuration, which may be given per kind of layer."""
    if not isinstance(value, dict):
        return set()
    found = {value[name]} if isinstance(value.get(name), str | int) else set()
    return found.union(*(_found(other, name) for other in value.values()))
