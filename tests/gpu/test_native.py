"""What only a CUDA GPU can show of the native engine: the same tokens there, graphs, and fixed shapes."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from hpc.engine.attention import Span, Step, attend, flash_spans
from hpc.engine.cache import Cache, Layout
from hpc.engine.native import NativeEngine
from hpc.engine.run import Limits
from hpc.engine.support import build
from hpc.job import SamplingParams
from tests.engine.models import CONFIGS, tiny
from tests.engine.oracle import generated, letters, one_bucket, prompts

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA GPU here")

NEW = 16
PROMPTS = prompts()
LIMITS = Limits(max_seqs=8, step_tokens=64, cache_bytes=64 << 20, context_tokens=1024)
GREEDY = SamplingParams(max_new_tokens=NEW)
SAMPLED = SamplingParams(max_new_tokens=NEW, temperature=0.9, top_p=0.9)


def engine_on_gpu(kind: str, dtype: torch.dtype, limits: Limits = LIMITS) -> NativeEngine:
    return build(tiny(CONFIGS[kind], dtype).to("cuda"), (), letters, limits, None)


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


@pytest.mark.parametrize("sampling", [GREEDY, SAMPLED], ids=["greedy", "sampled"])
def test_with_fixed_shapes_bfloat16_does_not_depend_on_the_batch(sampling: SamplingParams) -> None:
    engine = engine_on_gpu("llama", torch.bfloat16, replace(LIMITS, deterministic=True))
    requests = one_bucket(PROMPTS, sampling)
    alone = [generated(engine, [one])[one.id] for one in requests]
    together = generated(engine, requests[::-1])
    assert [together[row] for row in range(len(PROMPTS))] == alone


def test_attention_of_packed_chunks_and_single_tokens_equals_the_plain_one() -> None:
    heads, groups, dim = 2, 3, 64
    layout = {0: Layout((heads, dim), (heads, dim))}
    spans = [Span(0, 1, 40, 128, 0, 0), Span(1, 7, 0, 0, 0, 0), Span(8, 4, 20, 64, 0, 0)]
    new = lambda *shape: torch.randn(*shape, device="cuda", dtype=torch.bfloat16)  # noqa: E731
    q, k, v = new(1, heads * groups, 12, dim), new(1, heads, 12, dim), new(1, heads, 12, dim)
    module = torch.nn.Module()
    module.layer_idx = 0  # type: ignore[assignment]
    found = []
    for flash in (True, False):
        cache = Cache(layout, 256, torch.bfloat16, torch.device("cuda"), 0)
        generator = torch.Generator("cuda").manual_seed(0)
        for pool in cache.layers[0]:
            pool.copy_(torch.randn(pool.shape, generator=generator, device="cuda"))
        step = Step(cache, spans, flash=flash_spans(np.array(spans), torch.device("cuda")) if flash else None)
        found.append(attend(module, q, k, v, None, engine=step)[0].float())
    assert torch.allclose(*found, atol=2e-2)
