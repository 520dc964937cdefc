"""`make gpu`: the native engine on one CUDA device against transformers' `generate` and continuous batching.

Random weights in the shapes of Qwen3-0.6B and Llama-3-8B in bfloat16, so that no model needs to be fetched. Beside
output tokens per second it tells how long a decoding step of 256 rows takes, and which part of that reading the weights
alone would take at the bandwidth measured on the same device. Writes runs/bench/gpu.md.
"""

import argparse
import gc
import random
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers as hf

from hpc.engine.admission import REFILL, SHARE_FROM
from hpc.engine.native.build import build_native
from hpc.engine.native.limits import EngineLimits
from hpc.model.load import quiet
from hpc.request import Request, completion_key
from hpc.sampling_params import SamplingParams
from tests.bench.measure import Ask
from tests.fakes import ListSource

CONFIGS: dict[str, Any] = {
    "Qwen3-0.6B": hf.Qwen3Config(
        vocab_size=151936, hidden_size=1024, intermediate_size=3072, num_hidden_layers=28, num_attention_heads=16,
        num_key_value_heads=8, head_dim=128, max_position_embeddings=40960, tie_word_embeddings=True,
    ),
    "Llama-3-8B": hf.LlamaConfig(
        vocab_size=128256, hidden_size=4096, intermediate_size=14336, num_hidden_layers=32, num_attention_heads=32,
        num_key_value_heads=8, max_position_embeddings=8192, rope_theta=500000.0,
    ),
}  # fmt: skip
ROWS, STEPS = 256, 128


def main() -> None:
    """Measure, print and write the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--models", nargs="+", choices=CONFIGS, default=list(CONFIGS))
    parser.add_argument("--requests", type=int, default=512)
    flags = parser.parse_args()
    if not torch.cuda.is_available():
        raise SystemExit("this process sees no CUDA GPU: nothing was measured")
    quiet()
    bandwidth = read_bandwidth()
    lines = [
        f"{torch.cuda.get_device_name()}, torch {torch.__version__}, transformers {hf.__version__}; "
        f"read bandwidth {bandwidth / 1e9:,.0f} GB/s",
        "",
        "| model | engine | output tokens/s | ms per step of 256 rows | reading the weights, share of the step |",
        "|---|---|---|---|---|",
    ]
    for name in flags.models:
        for engine, (rate, step_s, weights) in measure(name, flags.requests).items():
            step = f"{1000 * step_s:.2f} | {weights / bandwidth / step_s:.0%}" if step_s else "|"
            lines.append(f"| {name} | {engine} | {rate:,.0f} | {step} |")
    text = "\n".join(lines) + "\n"
    print(text)
    folder = Path("runs/bench")
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "gpu.md").write_text(text)


def measure(name: str, count: int) -> dict[str, tuple[float, float, int]]:
    """Return for each engine output tokens/s, seconds of a decoding step (0: not measured) and bytes of weights."""
    work = asks(count, CONFIGS[name].vocab_size)
    model = new_model(name)
    weights = sum(parameter.nbytes for parameter in model.parameters())
    found = {
        "transformers' generate, batches of 8": (timed(by_hand(model), work[: count // 8]), 0.0, weights),
        "transformers' continuous batching": (timed(continuous(model), work[: count // 4]), 0.0, weights),
    }
    gc.collect()
    torch.cuda.empty_cache()  # what these two have left to torch's allocator
    expected = first_tokens(model, work[:ROWS])
    context_tokens = CONFIGS[name].max_position_embeddings
    limits = EngineLimits(ROWS, 8192, 0, context_tokens, refill=REFILL, share_from=SHARE_FROM)
    engine = build_native(model, (), lambda _: "", limits, None)
    check(engine, work[:ROWS], expected)

    def native(some: Sequence[Ask]) -> None:
        for ended in engine.generate(ListSource(requests(some)), lambda: False):
            if wrong := [sequence.error for sequence in ended if sequence.error]:
                raise RuntimeError(wrong[0])

    rate = timed(native, work)
    short = [Ask(row, work[0].prompt[:16], STEPS) for row in range(ROWS)]
    native(short)
    begin = time.perf_counter()
    native(short)
    found["scattergen"] = rate, (time.perf_counter() - begin) / STEPS, weights
    return found


@torch.inference_mode()
def first_tokens(model: Any, some: Sequence[Ask]) -> dict[int, int]:
    """Return the first token that the model itself gives after each prompt."""
    found = {}
    for ask in some:
        logits = model(torch.tensor([ask.prompt], device=model.device), logits_to_keep=1).logits
        found[ask.id] = int(logits[0, -1].argmax())
    return found


def check(engine: Any, some: Sequence[Ask], expected: dict[int, int]) -> None:
    """Raise `RuntimeError` unless nearly all rows begin as they should; by rounding, some may not."""
    ended = (one for ended in engine.generate(ListSource(requests(some)), lambda: False) for one in ended)
    right = sum(one.token_ids[:1] == [expected[one.request.id]] for one in ended)
    if right < 0.9 * len(some):
        raise RuntimeError(f"of {len(some)} rows only {right} begin as the model says: the engine is wrong here")


def asks(count: int, vocab_size: int) -> list[Ask]:
    """Return requests with lengths as in W1: lognormal, prompts up to 1,000 tokens, completions up to 256."""
    rng = random.Random(20261122)

    def length(median: float, sigma: float, most: int) -> int:
        return max(4, min(most, round(median * rng.lognormvariate(0, sigma))))

    return [
        Ask(row, [rng.randrange(vocab_size) for _ in range(length(60, 1.15, 1000))], length(48, 0.8, 256))
        for row in range(count)
    ]


def requests(some: Sequence[Ask]) -> list[Request]:
    """Return them as requests, longest first."""
    made = []
    for ask in sorted(some, key=lambda ask: -ask.max_new):
        tokens = np.array(ask.prompt, dtype=np.int32)
        sampling = SamplingParams(max_new_tokens=ask.max_new, ignore_eos=True)
        made.append(Request(ask.id, ask.id, tokens, sampling, completion_key(tokens, sampling, ask.id), len(tokens)))
    return made


def timed(run: Callable[[Sequence[Ask]], None], work: Sequence[Ask]) -> float:
    """Return output tokens per second, after a warm-up on a part of the work."""
    run(work[:16])
    torch.cuda.synchronize()
    begin = time.perf_counter()
    run(work)
    torch.cuda.synchronize()
    return sum(ask.max_new for ask in work) / (time.perf_counter() - begin)


def by_hand(model: Any) -> Callable[[Sequence[Ask]], None]:
    """Return what people write by hand: batches of 8 in the order given, left-padded."""

    def run(work: Sequence[Ask]) -> None:
        for begin in range(0, len(work), 8):
            batch = work[begin : begin + 8]
            width = max(len(ask.prompt) for ask in batch)
            ids = torch.tensor([[0] * (width - len(ask.prompt)) + ask.prompt for ask in batch], device=model.device)
            mask = torch.tensor([[0] * (width - len(a.prompt)) + [1] * len(a.prompt) for a in batch], device=ids.device)
            new = max(ask.max_new for ask in batch)
            model.generate(ids, attention_mask=mask, max_new_tokens=new, do_sample=False, pad_token_id=0)

    return run


def continuous(model: Any) -> Callable[[Sequence[Ask]], None]:
    """Return transformers' own continuous batching; every request has the limit of the longest of 16 like it."""

    def run(work: Sequence[Ask]) -> None:
        for begin in range(0, len(work), 16):
            batch = sorted(work, key=lambda ask: ask.max_new)[begin : begin + 16]
            config = hf.GenerationConfig(
                max_new_tokens=max(ask.max_new for ask in batch), do_sample=False, eos_token_id=-1, pad_token_id=0
            )
            model.generate_batch([ask.prompt for ask in batch], generation_config=config)

    return run


def new_model(name: str) -> Any:
    """Make a model of random weights on the GPU."""
    torch.manual_seed(0)
    with torch.device("cuda"):
        model = hf.AutoModelForCausalLM.from_config(CONFIGS[name], dtype=torch.bfloat16).eval()
    model.generation_config = hf.GenerationConfig()
    return model


def read_bandwidth() -> float:
    """Return how many bytes per second the device reads."""
    data = torch.ones(1 << 30, dtype=torch.float16, device="cuda")
    data.sum()
    torch.cuda.synchronize()
    begin = time.perf_counter()
    for _ in range(8):
        data.sum()
    torch.cuda.synchronize()
    return 8 * data.nbytes / (time.perf_counter() - begin)


if __name__ == "__main__":
    main()
