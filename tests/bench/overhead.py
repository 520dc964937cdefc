"""What a step costs beside the model's forward pass: a model of 2 layers, 64 wide, whose rows only decode, one thread.

Run it with `python -m tests.bench.overhead`. A shared machine has slow minutes: the forward pass stands beside the
overhead to tell them by, and of several runs the one with the least median is shown.
"""

import argparse
import itertools
import statistics
import time
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from hpc.engine.kernel import compiler
from hpc.engine.native.build import build_native
from hpc.engine.native.engine import NativeEngine
from hpc.engine.native.limits import EngineLimits
from hpc.model.find import user_cache
from hpc.sampling_params import SamplingParams
from tests.engine.oracle import request
from tests.fakes import ListSource

NEW_TOKENS = 100
EDGES = 10
"""Steps left out at both ends, which compute prompts, or that a row ends in."""


class Clocked:
    """Takes the time of a model's forward passes."""

    def __init__(self, model: Any) -> None:
        self.seconds = 0.0
        self._forward = model.forward
        model.forward = self

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        began = time.perf_counter()
        try:
            return self._forward(*args, **kwargs)
        finally:
            self.seconds += time.perf_counter() - began


def measure(engine: NativeEngine, forward: Clocked, rows: int) -> tuple[float, float]:
    """Run once; return the medians over steps of the overhead and of the forward pass, in microseconds."""
    sampling = SamplingParams(max_new_tokens=NEW_TOKENS, ignore_eos=True)
    source = ListSource([request([3, 4, 5, 6], row, sampling) for row in range(rows)])
    clocks: list[tuple[float, float]] = []

    def on_step() -> bool:
        clocks.append((time.perf_counter(), forward.seconds))
        return False

    for _ in engine.generate(source, on_step):
        pass
    steps = list(itertools.pairwise(clocks))[EDGES:-EDGES]
    inside = [after[1] - before[1] for before, after in steps]
    whole = [after[0] - before[0] for before, after in steps]
    return (
        statistics.median(a - b for a, b in zip(whole, inside, strict=True)) * 1e6,
        statistics.median(inside) * 1e6,
    )


def main() -> None:
    """Print a line for each number of rows."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 16, 64, 128, 256])
    parser.add_argument("--runs", type=int, default=9)
    told = parser.parse_args()
    torch.set_num_threads(1)
    config: Any = LlamaConfig(
        vocab_size=512, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2,
    )  # fmt: skip
    model = LlamaForCausalLM(config).eval()
    limits = EngineLimits(max(told.rows), 512, 1 << 28)
    engine = build_native(model, (), lambda _: "", limits, compiler.load(user_cache() / "kernels"))
    forward = Clocked(model)
    print("rows  overhead us  forward us")
    for rows in told.rows:
        overhead, inside = min(measure(engine, forward, rows) for _ in range(told.runs))
        print(f"{rows:4d}  {overhead:11.0f}  {inside:10.0f}", flush=True)


if __name__ == "__main__":
    main()
