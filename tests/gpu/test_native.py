"""What only a CUDA GPU can show of the native engine, in the order in which it tells most: run this first on a new GPU.

    python -m pytest -x tests/gpu/test_native.py

1. FlashAttention itself: single queries of grouped heads, unsorted starts, windows, chunks; and in a replayed graph.
2. What is tried when a model is loaded: which kinds get FlashAttention and graphs here.
3. Tokens: float32 as `generate`, half precision nearly so, for every kind of model; with many short and long rows.
4. That nothing waits: a whole step with every wait an error.
5. Another GPU than the first.
6. Fixed sizes: rows alone, together, in other places.
7. Memory: the cache that was measured, and a cache that is too small.
"""

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from hpc.engine.cache import Cache
from hpc.engine.form import KVShape
from hpc.engine.layers.attention import AttentionMetadata, Flash, Span, attend, flash_spans
from hpc.engine.native.build import build_native
from hpc.engine.native.engine import NativeEngine
from hpc.engine.native.limits import EngineLimits
from hpc.sampling_params import SamplingParams
from tests.engine.acted_workloads import WORKLOADS, answers, varied
from tests.engine.models import CONFIGS, WINDOWED, engine_of, tiny
from tests.engine.oracle import generated, grow, letters, one_bucket, prompts
from tests.fakes import ListSource

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA GPU here")

NEW = 16
PROMPTS = prompts()
LIMITS = EngineLimits(max_seqs=8, step_tokens=64, cache_bytes=64 << 20, context_tokens=1024)
GREEDY = SamplingParams(max_new_tokens=NEW)
SAMPLED = SamplingParams(max_new_tokens=NEW, temperature=0.9, top_p=0.9)
KINDS = {**CONFIGS, **WINDOWED}
HAS_FLASH = torch.cuda.is_available() and torch.version.hip is None and torch.cuda.get_device_capability()[0] >= 8
needs_flash = pytest.mark.skipif(not HAS_FLASH, reason="FlashAttention needs compute capability 8 or more")


def engine_on_gpu(kind: str, dtype: torch.dtype, limits: EngineLimits = LIMITS, device: str = "cuda:0") -> NativeEngine:
    torch.cuda.set_device(device)
    return build_native(tiny(KINDS[kind], dtype).to(device), (), letters, limits, None)


# 1. FlashAttention itself.

SPANS = {
    "single queries, unsorted": [Span(0, 1, 40, 192, 0, 0), Span(1, 1, 7, 0, 0, 0), Span(2, 1, 63, 64, 0, 0)],
    "chunks and single queries": [Span(0, 1, 40, 128, 0, 0), Span(1, 7, 0, 0, 0, 0), Span(8, 4, 20, 64, 0, 0)],
    "one first token": [Span(0, 1, 0, 64, 0, 0)],
}


def attended(spans: list[Span], window: int, flash: Flash | None, seed: int = 0) -> torch.Tensor:
    """Attend with grouped heads over a cache of random numbers, by FlashAttention or by torch."""
    heads, groups, dim = 2, 4, 64
    count = sum(span.tokens for span in spans)
    generator = torch.Generator("cuda").manual_seed(seed)
    new: Any = lambda *shape: torch.randn(*shape, generator=generator, device="cuda").to(torch.bfloat16)  # noqa: E731
    q, k, v = new(1, heads * groups, count, dim), new(1, heads, count, dim), new(1, heads, count, dim)
    module: Any = torch.nn.Module()
    module.layer_idx = 0
    layout = KVShape((heads, dim), (heads, dim))
    cache = Cache({0: layout}, 256, torch.bfloat16, torch.device("cuda"), 0)
    for pool in cache.layers[0]:
        pool.copy_(new(*pool.shape))
    step = AttentionMetadata(cache, spans, flash=flash)
    return attend(module, q, k, v, None, engine=step, sliding_window=window or None)[0].float()


@needs_flash
@pytest.mark.parametrize("window", [0, 1, 13])
@pytest.mark.parametrize("name", SPANS)
def test_flash_attention_gives_what_torch_gives(name: str, window: int) -> None:
    flash = flash_spans(np.array(SPANS[name]), torch.device("cuda"))
    assert torch.allclose(
        attended(SPANS[name], window, flash), attended(SPANS[name], window, None), atol=2e-2, rtol=2e-2
    )


@needs_flash
def test_a_prefix_that_is_read_once_for_several_gives_what_torch_gives() -> None:
    spans = [Span(0, 1, 60, 64, 0, 40), Span(1, 3, 50, 128, 0, 40), Span(4, 1, 20, 192, 0, 0), Span(5, 1, 3, 224, 0, 2)]
    flash = flash_spans(np.array(spans), torch.device("cuda"))
    assert torch.allclose(attended(spans, 0, flash), attended(spans, 0, None), atol=2e-2, rtol=2e-2)


@needs_flash
@pytest.mark.parametrize("kind", ["llama", "mistral"])
def test_a_replayed_graph_gives_what_the_step_gives_whose_numbers_it_was_given(kind: str) -> None:
    engine = engine_on_gpu(kind, torch.bfloat16)
    assert (engine.flash, engine.graphs) == (True, True)
    requests = one_bucket(PROMPTS, GREEDY)
    replayed = generated(engine, requests)
    engine.graphs, engine._kept = False, None
    assert generated(engine, requests) == replayed


# 2. What is tried when a model is loaded.


@needs_flash
@pytest.mark.parametrize("kind", KINDS)
def test_flash_attention_is_taken_by_every_kind_that_it_can_do(kind: str) -> None:
    engine = engine_on_gpu(kind, torch.bfloat16)
    assert engine.flash == (kind not in ("gemma2", "gpt_oss"))
    if kind not in ("mixtral", "olmoe"):  # whose experts wait for the host on most GPUs
        assert engine.graphs == engine.flash


# 3. Tokens.


@pytest.mark.parametrize("kind", ["llama", "qwen3", "gemma3", "gpt_oss", "gpt2"])
def test_in_float32_a_gpu_gives_the_tokens_of_generate(kind: str) -> None:
    model = tiny(CONFIGS[kind]).to("cuda")
    model.set_attn_implementation("eager")
    inputs = [torch.tensor([prompt], device="cuda") for prompt in PROMPTS]
    whole = [model.generate(ids, max_new_tokens=NEW, do_sample=False, pad_token_id=0)[0] for ids in inputs]
    found = generated(engine_on_gpu(kind, torch.float32), one_bucket(PROMPTS, GREEDY))
    assert [found[row] for row in range(len(PROMPTS))] == [
        tokens[len(prompt) :].tolist() for tokens, prompt in zip(whole, PROMPTS, strict=True)
    ]


@pytest.mark.parametrize("kind", KINDS)
def test_in_half_precision_nearly_all_rows_begin_as_on_the_cpu(kind: str) -> None:
    work = WORKLOADS["slots used again"]
    found = answers(engine_on_gpu(kind, torch.bfloat16), work)
    expected = answers(engine_of(kind, "torch", work.limits, dtype=torch.bfloat16), work)
    same = [found[key][0][:1] == expected[key][0][:1] for key in expected]
    assert sum(same) >= 0.7 * len(same)


@pytest.mark.parametrize("name", WORKLOADS)
@pytest.mark.parametrize("kind", ["llama", "gemma3"])
def test_every_kind_of_work_is_done_without_an_error(kind: str, name: str) -> None:
    work = WORKLOADS[name]
    expected = {key: error for key, (_, error, _) in answers(engine_of(kind, "torch", work.limits), work).items()}
    if not work.cache_tokens:
        found = answers(engine_on_gpu(kind, torch.bfloat16, work.limits), work)
        assert {key: error for key, (_, error, _) in found.items()} == expected


# 4. That nothing waits.


@needs_flash
def test_no_step_waits_for_the_device() -> None:
    engine = engine_on_gpu("llama", torch.bfloat16, replace(LIMITS, max_seqs=16, step_tokens=512))
    run = engine.begin()
    run.admit(ListSource(varied()))
    with torch.inference_mode():
        run._launch(run.scheduler.next())  # what is done once
        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode("error")
        try:
            for _ in range(3):
                run._launch(run.scheduler.next())
        finally:
            torch.cuda.set_sync_debug_mode("default")


# 5. Another GPU than the first.


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="one GPU here")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_last_gpu_gives_what_the_first_gives_while_the_first_is_current(dtype: torch.dtype) -> None:
    requests = one_bucket(PROMPTS, GREEDY)
    first = generated(engine_on_gpu("llama", dtype), requests)
    last = f"cuda:{torch.cuda.device_count() - 1}"
    model = tiny(CONFIGS["llama"], dtype).to(last)
    engine = build_native(model, (), letters, LIMITS, None)
    torch.cuda.set_device(0)
    assert generated(engine, requests) == first


# 6. Fixed sizes.


@pytest.mark.parametrize("sampling", [GREEDY, SAMPLED], ids=["greedy", "sampled"])
def test_with_fixed_shapes_bfloat16_does_not_depend_on_the_batch(sampling: SamplingParams) -> None:
    engine = engine_on_gpu("llama", torch.bfloat16, replace(LIMITS, deterministic=True))
    requests = one_bucket(PROMPTS, sampling)
    alone = [generated(engine, [one])[one.id] for one in requests]
    for order in (requests[::-1], requests[3:] + requests[:3]):
        together = generated(engine, order)
        assert [together[row] for row in range(len(PROMPTS))] == alone


# 7. Memory.


def test_the_cache_that_was_measured_is_most_of_what_is_free() -> None:
    free = torch.cuda.mem_get_info()[0]
    engine = engine_on_gpu("llama", torch.bfloat16, replace(LIMITS, cache_bytes=0))
    assert 0.7 * free < engine._limits.cache_bytes < free


def test_in_a_small_cache_sequences_give_way_and_none_is_an_error() -> None:
    work = WORKLOADS["sequences that give way"]
    engine = engine_on_gpu("llama", torch.float32, work.limits)
    engine._limits = replace(work.limits, cache_bytes=work.cache_tokens * engine.bounds.token_bytes)
    expected = answers(engine_of("llama", "torch", work.limits), work)
    assert answers(engine, work) == expected
    assert [one.error for one in grow(engine, ListSource(work.requests())) if one.error] == []
