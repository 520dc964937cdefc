"""Rotary embeddings whose frequencies are others once a sequence is long: those of the longest sequence of a batch."""

from typing import Any

KINDS = ("dynamic", "longrope")


def tokens_before_change(config: Any) -> int | None:
    """Return how many tokens a sequence may have until they change; None if they never do."""
    values = config.to_dict()
    limits = {
        "dynamic": getattr(config, "max_position_embeddings", 0),
        "longrope": min(_found(values, "original_max_position_embeddings"), default=0),
    }
    return min((limits[kind] for kind in limits.keys() & _found(values, "rope_type")), default=None)


def fix(model: Any) -> None:
    """Let rotary embeddings not look at the longest sequence of a step, where none is long enough to matter."""
    for module in model.modules():
        kinds = getattr(module, "rope_type", None)
        if isinstance(kinds, dict):
            module.rope_type = {layer: _fixed(kind) for layer, kind in kinds.items()}
        elif isinstance(kinds, str):
            module.rope_type = _fixed(kinds)


def _fixed(kind: str) -> str:
    return "default" if kind in KINDS else kind


def _found(value: Any, name: str) -> set[Any]:
    """Return all values of a name in a configuration, for all layers or by kind of layer."""
    if not isinstance(value, dict):
        return set()
    found = {value[name]} if isinstance(value.get(name), str | int) else set()
    return found.union(*(_found(other, name) for other in value.values()))
