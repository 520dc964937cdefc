"""Compute the step, and capture the CUDA graph, with the largest memory beside the cache."""

from typing import Any

import numpy as np
import torch

from hpc.engine.admission import CHUNK
from hpc.engine.cache import Cache
from hpc.engine.extents import ALIGN
from hpc.engine.form import KVShape
from hpc.engine.layers.attention import AttentionMetadata, Span, flash_spans
from hpc.engine.native.cuda_graphs import DecodeGraphs
from hpc.engine.native.limits import EngineLimits
from hpc.engine.sampling.sampler import Sampler
from hpc.request import Request
from hpc.sampling_params import SamplingParams

_DEAREST = SamplingParams(temperature=1.0, top_p=0.9, repetition_penalty=1.1, presence_penalty=0.1)
"""Sampling parameters with the largest memory: penalties count tokens, and a top_p looks at all of them."""


@torch.inference_mode()
def largest_step(model: Any, layouts: dict[int, KVShape], limits: EngineLimits, flash: bool) -> None:
    """Compute a step with the maximum number of prompt tokens, after which every sequence chooses a token."""
    tokens = limits.step_tokens + CHUNK
    cache = Cache(layouts, CHUNK, model.dtype, model.device, 0)
    starts = np.arange(0, tokens, CHUNK)
    spans = np.zeros((len(starts), len(Span._fields)), dtype=np.int64)
    spans[:, 0], spans[:, 1] = starts, np.minimum(CHUNK, tokens - starts)  # all of them in one extent
    device: torch.device = model.device
    kept = torch.arange(limits.max_seqs, device=device) % tokens
    logits = model(
        input_ids=torch.zeros(1, tokens, dtype=torch.int64, device=device),
        position_ids=torch.arange(tokens, device=device)[None] % min(CHUNK, limits.context_tokens),
        use_cache=False,
        logits_to_keep=kept,
        engine=AttentionMetadata(cache, spans, flash=flash_spans(spans, device) if flash else None, kept=kept),
    ).logits[0]
    sampler = Sampler(limits.max_seqs, device)
    for slot in range(limits.max_seqs):
        sampler.set(slot, Request(slot, slot, np.zeros(1, dtype=np.int32), _DEAREST, bytes(16), 1))
    sampler.choose(logits, list(range(limits.max_seqs)))
    torch.cuda.synchronize(device)


@torch.inference_mode()
def largest_graph(model: Any, layouts: dict[int, KVShape], limits: EngineLimits) -> DecodeGraphs:
    """Return a captured graph of the maximum number of rows, whose memory the smaller ones use too."""
    cache = Cache(layouts, 0, model.dtype, model.device, 0, ALIGN)
    graphs = DecodeGraphs(model, cache, limits.max_seqs, limits.context_tokens, fixed=True)
    graphs.capture_all()
    return graphs
