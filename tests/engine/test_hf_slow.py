"""The hf engine with real weights: batches of real prompts against plain `generate` of one prompt at a time."""

import json
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import torch

from hpc.engine.bucket import assign, boundaries
from hpc.engine.hf import HFEngine
from hpc.model.description import describe
from hpc.model.load import load, quiet
from hpc.model.tokenizer import Tokenizer
from hpc.sampling_params import SamplingParams
from tests.conftest import ROOT
from tests.engine.oracle import CPU, Plain, generated, request

ROWS = 64
NEW = 16


def demo_prompts(tokenizer: Tokenizer) -> list[list[int]]:
    """Return the token ids of the first rows of the demo's corpus."""
    with open(ROOT / "jobs" / "demo.jsonl", encoding="utf-8") as file:
        rows = [json.loads(line) for line in islice(file, ROWS)]
    found = []
    for row in rows:
        text = tokenizer.render(row["messages"]) if "messages" in row else row["prompt"]
        found += tokenizer.encode([text], special_tokens="prompt" in row)
    return found


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_greedy_output_of_64_real_prompts_equals_plain_generate(demo_model: Path) -> None:
    quiet()
    tokenizer = Tokenizer(demo_model)
    prompts = demo_prompts(tokenizer)
    lengths = np.array([len(prompt) for prompt in prompts])
    buckets = assign(lengths, boundaries(lengths, 6)).tolist()
    sampling = SamplingParams(max_new_tokens=NEW)
    requests = [request(prompts[row], row, sampling, buckets[row]) for row in np.argsort(lengths).tolist()]
    model = load(demo_model, CPU, "float32", threads=torch.get_num_threads())
    engine = HFEngine(model, describe(demo_model).eos_token_ids, tokenizer.decode, batch_tokens=4096)
    found = generated(engine, requests)
    plain = Plain(demo_model, ends=True)
    assert [found[row] for row in range(ROWS)] == [plain.generate(prompt, NEW) for prompt in prompts]
