"""The native engine with real weights: real prompts against plain `generate`, and in any order and batch."""

import random
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from hpc.engine.native.build import build_native
from hpc.engine.native.engine import NativeEngine
from hpc.engine.native.limits import EngineLimits
from hpc.model.description import describe
from hpc.model.load import load, quiet
from hpc.model.tokenizer import Tokenizer
from hpc.plan.prefix import cuts
from hpc.request import Request
from hpc.sampling_params import SamplingParams
from tests.conftest import ROOT, finish, start
from tests.engine.models import kernel_of
from tests.engine.oracle import CPU, Plain, generated, request
from tests.engine.test_hf_slow import NEW, ROWS, demo_prompts

CROWDS = [
    EngineLimits(8, 64, 256 << 20, drafts=True),
    EngineLimits(128, 512, 512 << 20),
    EngineLimits(17, 2000, 512 << 20),
]


@pytest.fixture(scope="module")
def tokenizer(demo_model: Path) -> Tokenizer:
    quiet()
    return Tokenizer(demo_model)


@pytest.fixture(scope="module")
def prompts(tokenizer: Tokenizer) -> list[list[int]]:
    return demo_prompts(tokenizer)


@pytest.fixture(scope="module")
def expected(demo_model: Path, prompts: list[list[int]]) -> list[list[int]]:
    plain = Plain(demo_model, ends=True)
    return [plain.generate(prompt, NEW) for prompt in prompts]


def engine_of(path: Path, way: str, limits: EngineLimits, tokenizer: Tokenizer, dtype: str = "float32") -> NativeEngine:
    model = load(path, CPU, dtype, threads=torch.get_num_threads())
    return build_native(model, describe(path).eos_token_ids, tokenizer.decode, limits, kernel_of(way))


def with_cuts(prompts: list[list[int]], sampling: list[SamplingParams]) -> list[Request]:
    """Make requests with the prefixes that a plan gives them."""
    lengths = np.array([len(prompt) for prompt in prompts], dtype=np.int64)
    tokens = np.array([token for prompt in prompts for token in prompt], dtype=np.int32)
    cut, _ = cuts(tokens, np.cumsum(lengths) - lengths, lengths)
    made = [request(prompt, row, sampling[row % len(sampling)]) for row, prompt in enumerate(prompts)]
    return [Request(r.row, r.id, r.token_ids, r.sampling, r.key, r.bucket, int(cut[r.row])) for r in made]


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_greedy_output_of_64_real_prompts_equals_plain_generate(
    demo_model: Path,
    tokenizer: Tokenizer,
    prompts: list[list[int]],
    expected: list[list[int]],
) -> None:
    requests = with_cuts(prompts, [SamplingParams(max_new_tokens=NEW)])
    found = generated(engine_of(demo_model, "kernel", CROWDS[1], tokenizer), requests)
    assert [found[row] for row in range(ROWS)] == expected


SAMPLED = [
    SamplingParams(max_new_tokens=8, temperature=0.8, top_p=0.95),
    SamplingParams(max_new_tokens=8),
    SamplingParams(max_new_tokens=8, temperature=1.2, top_k=50, repetition_penalty=1.1),
    SamplingParams(max_new_tokens=8, temperature=1.0, min_p=0.02, presence_penalty=0.3),
]


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_greedy_and_sampled_output_of_real_prompts_does_not_depend_on_order_or_batch(
    demo_model: Path, tokenizer: Tokenizer, prompts: list[list[int]], dtype: str
) -> None:
    requests = with_cuts(prompts, SAMPLED)[:24]
    found = []
    for seed, limits in enumerate(CROWDS):
        limits = replace(limits, deterministic=True)
        shuffled = random.Random(seed).sample(requests, len(requests))
        found.append(generated(engine_of(demo_model, "kernel", limits, tokenizer, dtype), shuffled))
    assert found[0] == found[1]
    assert found[0] == found[2]


MEMORY = """
import re, sys
from pathlib import Path
import transformers.models.llama.modeling_llama
from hpc.job import Job
from hpc.model.loader import Loader
from hpc.mpi.binding import Binding
from hpc.model.tokenizer import Tokenizer
from tests.bench import workloads
from tests.bench.run_native import arranged
from tests.fakes import ListSource
import hpc.engine.native.engine, hpc.engine.kernel.kernel, hpc.engine.native.build

def memory(name):
    return int(re.search(name + r":\\s+(\\d+)", Path("/proc/self/status").read_text())[1]) * 1024

model = Path(sys.argv[1])
asks = workloads.make(Tokenizer(model).encode([workloads.corpus()], False)[0])["W1"]
imported = memory("VmRSS")
Path("/proc/self/clear_refs").write_text("5")  # VmHWM begins again
job = Job(str(model), ("none",), dtype="float32", device="cpu", engine="native", cache_gib=1)
replica = Loader().load(job, model, Binding("here", 0, 1))  # of two threads each would wait for a core
ended = sum(len(some) for some in replica.engine.generate(ListSource(arranged(asks, job)), lambda: False))
assert ended == len(asks)
print(memory("VmHWM") - imported)
"""


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_the_memory_of_w1_is_at_most_a_third_above_weights_and_cache(demo_model: Path) -> None:
    ended = finish(start(["-c", MEMORY, str(demo_model)], PYTHONPATH=str(ROOT)), 500)
    assert ended.code == 0, ended.err
    weights = sum(parameter.numel() * 4 for parameter in load(demo_model, CPU, "float32", 1).parameters())
    assert int(ended.out) <= 1.3 * (weights + 2**30)
