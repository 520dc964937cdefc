"""Handle rotary embeddings whose frequencies depend on the longest sequence of a batch: dynamic NTK and LongRoPE."""

from typing import Any

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
