"""Attention over the KV cache, registered with transformers in the place of the model's own.

A step is one packed row of tokens: the newest token of every decoding sequence, and chunks of prompts. All
keys and values of the step are stored first; then every token attends to its sequence up to itself.
So decoding, chunks of prompts and shared prefixes need neither masks nor padding.
"""

from collections.abc import Sequence
from dataclasses import InitVar, dataclass, field
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch.nn.functional import pad, scaled_dot_product_attention
from transformers import AttentionInterface

from hpc.engine.alibi import Alibi
from hpc.engine.cache import Cache
from hpc.engine.form import AttentionSpec, KVShape
from hpc.engine.kernel.kernel import Kernel

NAME = "scattergen"
"""The name under which transformers has this attention."""


class Span(NamedTuple):
    """Neighbouring tokens of one sequence in a step, and where the sequence is in the cache."""

    first: int
    """Index of its first token in the step."""
    tokens: int
    """Number of tokens."""
    position: int
    """Position of its first token in the sequence."""
    start: int
    """First token of the sequence's own extent, which holds the positions from `cut` on."""
    prefix: int
    """First token of the extent that holds the positions before `cut`."""
    cut: int


Spans = npt.NDArray[np.int64]
"""[spans, 6], each line a `Span`."""


class Unsupported(Exception):
    """The model needs something that this engine does not have."""


@dataclass
class AttentionMetadata:
    """What attention needs to know about one forward pass."""

    cache: Cache | None
    """None: only record the `AttentionSpec` of each layer."""
    spans: InitVar[Spans | Sequence[Span]]
    kernel: Kernel | None = None
    forms: dict[int, AttentionSpec] = field(default_factory=dict)
    flash: "Flash | None" = None
    kept: torch.Tensor | None = None
    """int64 [rows]: tokens whose logits are wanted; for the others the last layer may skip all behind its attention."""
    is_long: torch.Tensor | None = None
    """bool [tokens]: the token is of a sequence with frequencies for long ones; None if none is."""

    def __post_init__(self, spans: Spans | Sequence[Span]) -> None:
        self.packed = torch.from_numpy(np.asarray(spans, dtype=np.int64).reshape(-1, len(Span._fields)))


@dataclass
class Flash:
    """The spans as torch's FlashAttention takes them."""

    stored: torch.Tensor
    """int64 [tokens]: where in the pool each token of the step is stored."""
    query_starts: torch.Tensor
    """int32 [spans + 1]"""
    key_starts: torch.Tensor
    """int32 [spans + 1]: where each extent starts, in any order."""
    key_counts: torch.Tensor
    """int32 [spans]"""
    max_queries: int
    max_keys: int
    behind: "Behind | None" = None
    """None if no span has a shared prefix."""


class Behind(NamedTuple):
    """Shared prefixes as FlashAttention takes them: neighbouring spans behind the same prefix are one run of queries.

    A run behind no prefix has no keys, and its result is dropped.
    """

    query_starts: torch.Tensor
    """int32 [runs + 1]"""
    key_starts: torch.Tensor
    """int32 [runs + 1]"""
    key_counts: torch.Tensor
    """int32 [runs]"""
    tokens: torch.Tensor
    """bool [tokens]: whether the token is behind a prefix."""
    max_queries: int
    max_keys: int


def attend(
    module: Any,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    *,
    engine: AttentionMetadata | None = None,
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: torch.Tensor | None = None,
    alibi: Alibi | None = None,
    **others: Any,
) -> tuple[torch.Tensor, None]:
    """Attend; query [1, query heads, tokens, dim], key and value [1, heads, tokens, dim].

    The keyword arguments are transformers', except `alibi`. If a model does not pass `engine` on, the module has it in
    `handed`. Returns [1, tokens, query heads, value dim]. Raises `Unsupported`.
    """
    engine = engine or module.handed.step
    assert engine is not None
    if attention_mask is not None or others.get("position_bias") is not None or others.get("is_causal") is False:
        raise Unsupported("a mask or a bias of its own")
    q, k, v = (tensor[0].transpose(0, 1) for tensor in (query, key, value))
    layer = module.layer_idx
    layout = KVShape((k.shape[1], k.shape[2]), (v.shape[1], v.shape[2]))
    scale = q.shape[-1] ** -0.5 if scaling is None else float(scaling)
    form = AttentionSpec(layout, scale, sliding_window or 0, softcap or 0.0, s_aux, alibi)
    if engine.cache is None:
        if layer in engine.forms:
            raise Unsupported("two attentions in one layer")
        engine.forms[layer] = form
        return v.repeat_interleave(q.shape[1] // v.shape[1], 1)[None], None
    pools = engine.cache.layers[layer]
    if engine.cache.panel and engine.kernel is not None:
        return engine.kernel.attention(q, k, v, pools, engine.packed, form)[None], None
    if engine.flash is not None:
        if lack := lacks_flash(form):
            raise Unsupported(f"FlashAttention has no {lack}")
        return _flash(q, k, v, pools, engine.flash, form)[None], None
    if not len(engine.packed):
        raise Unsupported("attention without FlashAttention, in a step whose spans the host does not know")
    return _torch(q, k, v, pools, engine.packed, form)[None], None


AttentionInterface.register(NAME, attend)


def lacks_flash(form: AttentionSpec) -> str:
    """Return what a layer needs and torch's FlashAttention lacks; an empty string if it lacks nothing."""
    dim = form.layout.key[1]
    if form.alibi is not None:
        return "scores by position"
    if form.softcap:
        return "capped scores"
    if form.sinks is not None:
        return "sinks"
    if dim != form.layout.value[1]:
        return f"values of another size than keys ({dim} and {form.layout.value[1]})"
    return "" if dim <= 256 and dim % 8 == 0 else f"heads of {dim} numbers: up to 256, and a multiple of 8"


def _torch(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    pools: tuple[torch.Tensor, torch.Tensor],
    packed: torch.Tensor,
    form: AttentionSpec,
) -> torch.Tensor:
    """Attend span by span with torch's own functions, each span as if it were alone."""
    (keys, values), window = pools, form.window
    out = v.new_zeros(q.shape[0], q.shape[1], v.shape[-1])
    spans = [Span(*line) for line in packed.tolist()]
    for span in spans:
        rows, at = slice(span.first, span.first + span.tokens), span.start + span.position - span.cut
        keys[at : at + span.tokens], values[at : at + span.tokens] = k[rows], v[rows]
    for span in spans:
        rows, end = slice(span.first, span.first + span.tokens), span.position + span.tokens
        own = slice(span.start, span.start + end - span.cut)
        before = slice(span.prefix, span.prefix + span.cut)
        k_all, v_all = ((torch.cat([pool[before], pool[own]]) if span.cut else pool[own]) for pool in (keys, values))
        # The query heads of a key head stand as further query positions: [key heads, groups * count, dim].
        n, heads, dim = span.tokens, k.shape[1], q.shape[2]
        grouped = q[rows].view(n, heads, -1, dim).permute(1, 2, 0, 3).reshape(1, heads, -1, dim)
        mask = None
        if n > 1 or window:
            at_q, at_k = torch.arange(span.position, end, device=q.device)[:, None], torch.arange(end, device=q.device)
            mask = at_k <= at_q
            if window:
                mask &= at_k > at_q - window
            mask = mask.repeat(q.shape[1] // heads, 1)
        k_t, v_t = k_all.transpose(0, 1)[None], v_all.transpose(0, 1)[None]
        if form.softcap or form.sinks is not None or form.alibi is not None:
            done = _by_hand(grouped, k_t, v_t, mask, form)
        else:
            done = scaled_dot_product_attention(grouped, k_t, v_t, attn_mask=mask, scale=form.scale)
        out[rows] = done[0].view(heads, -1, n, v.shape[-1]).permute(2, 0, 1, 3).reshape(n, q.shape[1], -1)
    return out


def _by_hand(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    mask: torch.Tensor | None,
    form: AttentionSpec,
) -> torch.Tensor:
    """Attend with capped scores (Gemma 2), ALiBi (BLOOM) or sinks (gpt-oss), which torch's function does not have."""
    scores = (q @ k.transpose(-1, -2) * form.scale).float()
    heads, keys = k.shape[1:3]
    if form.alibi is not None:
        by_head = form.alibi.scores(keys)[:, :keys].view(heads, -1, 1, keys)
        scores = (scores.view(heads, by_head.shape[1], -1, keys) + by_head).view(scores.shape)
    if form.softcap:
        scores = form.softcap * torch.tanh(scores / form.softcap)
    if mask is not None:
        scores = scores.masked_fill(~mask, -torch.inf)
    if form.sinks is not None:
        groups = len(form.sinks) // heads
        sink = form.sinks.float().view(heads, -1, 1).expand(-1, -1, q.shape[2] // groups)
        scores = torch.cat([scores, sink.reshape(1, heads, -1, 1)], dim=-1)
    return scores.softmax(dim=-1)[..., :keys].to(v.dtype) @ v


def runs_of(spans: Spans) -> Spans:
    """Return [runs, 3]: first token, `prefix` and `cut` of each run of spans behind the same prefix, or behind none."""
    begins = np.ones(len(spans), dtype=np.bool_)
    begins[1:] = (spans[1:, 4:] != spans[:-1, 4:]).any(axis=1)
    return spans[begins][:, [0, 4, 5]]


def flash_spans(spans: Spans, device: torch.device, max_queries: int = 0, max_keys: int = 0) -> Flash:
    """Describe spans for torch's FlashAttention kernel.

    `max_queries` and `max_keys` are lower bounds of the maxima that it is told, by which it divides its work.
    """
    first, tokens, position, start, _, cut = spans.T
    ends, total = position + tokens - cut, int(tokens.sum())
    stored = np.arange(total) + np.repeat(start + position - cut - first, tokens)
    values = np.concatenate([stored, first, [total], start, [start.max() + ends.max()], ends])
    if cut.any():
        begins, prefix, count = (runs := runs_of(spans)).T
        values = np.concatenate([values, begins, [total], prefix, [prefix.max()], count, np.repeat(cut > 0, tokens)])
    host = torch.from_numpy(values)  # one copy: each takes some microseconds of the host
    on_device = (host.pin_memory() if device.type == "cuda" else host).to(device, non_blocking=True)
    small = on_device[total:].to(torch.int32)
    n = len(spans)
    behind = None
    if cut.any():
        m, more = len(runs), small[3 * n + 2 :]
        behind = Behind(
            more[: m + 1], more[m + 1 : 2 * m + 2], more[2 * m + 2 : 3 * m + 2], more[3 * m + 2 :] > 0,
            total, int(count.max()),
        )  # fmt: skip
    return Flash(
        on_device[:total], small[: n + 1], small[n + 1 : 2 * n + 2], small[2 * n + 2 : 3 * n + 2],
        max(max_queries, int(tokens.max())), max(max_keys, int(ends.max())), behind,
    )  # fmt: skip


def _flash(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    pools: tuple[torch.Tensor, torch.Tensor],
    flash: Flash,
    form: AttentionSpec,
) -> torch.Tensor:
    """Store keys and values, then attend with torch's FlashAttention: packed queries over extents of the pool."""
    (keys, values), num_tokens = pools, len(flash.stored)
    keys.index_copy_(0, flash.stored, k[:num_tokens])
    values.index_copy_(0, flash.stored, v[:num_tokens])
    # Its causal mask puts the last query at the last key, which is what a chunk is. No right window besides: with
    # one, single queries get neither the heads of a group folded together nor their keys split over processors.
    out: torch.Tensor
    out, sums, *_ = torch.ops.aten._flash_attention_forward(
        q[:num_tokens], keys, values, flash.query_starts, flash.key_starts, flash.max_queries, flash.max_keys,
        0.0, True, False, scale=form.scale, window_size_left=form.window - 1 if form.window else -1,
        window_size_right=-1, seqused_k=flash.key_counts,
    )  # fmt: skip
    if flash.behind is not None:
        out = _with_prefixes(q[:num_tokens], out, sums, keys, values, flash.behind, form)
    return out if num_tokens == len(q) else pad(out, (0, 0, 0, 0, 0, len(q) - num_tokens))


def _with_prefixes(
    q: torch.Tensor,
    own: torch.Tensor,
    own_sums: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    behind: Behind,
    form: AttentionSpec,
) -> torch.Tensor:
    """Combine attention to the own extents with attention to the prefixes, each of which is read once for a whole run.

    `own` is the former, [tokens, heads, dim]; `own_sums` are the logarithms of its softmax sums, [heads, tokens].
    """
    # At least 2 queries: with a maximum of 1 the function expects one query for each run.
    other, sums, *_ = torch.ops.aten._flash_attention_forward(
        q, keys, values, behind.query_starts, behind.key_starts, max(2, behind.max_queries), behind.max_keys,
        0.0, False, False, scale=form.scale, window_size_left=-1, window_size_right=-1, seqused_k=behind.key_counts,
    )  # fmt: skip
    share = (sums - own_sums).sigmoid().T[:, :, None]
    both = (own + (other.float() - own) * share).to(own.dtype)
    return torch.where(behind.tokens[:, None, None], both, own)
