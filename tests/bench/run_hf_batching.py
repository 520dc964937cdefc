"""transformers' continuous batching with SDPA, 16 requests in a batch, and each request's own limit.

`generate_batch` has one limit for all requests, so the manager behind it is used. On a CPU each step gathers the whole
cache of every live request and masks it densely, so fewer requests in a batch are faster: 16 were faster than no limit.
"""

import time
from collections.abc import Sequence

import torch
from transformers import AutoModelForCausalLM, ContinuousBatchingConfig, GenerationConfig

from tests.bench.measure import Ask, Generate, Options, main

REQUESTS_PER_BATCH = 16
PAGE = 256
PAGES_TO_SPARE = 2
"""For each live request: its last page is not full, and shared pages are copied before they are written."""


def load(options: Options) -> Generate:
    """Load the model, and start a manager whose cache holds every request at once."""
    torch.set_num_threads(options.threads)
    model = AutoModelForCausalLM.from_pretrained(
        options.model, dtype=getattr(torch, options.dtype), attn_implementation="sdpa"
    ).eval()
    settings = {
        "max_requests_per_batch": REQUESTS_PER_BATCH,
        "max_batch_tokens": 2048,
        "num_blocks": options.most_tokens // PAGE + PAGES_TO_SPARE * REQUESTS_PER_BATCH,
        "page_size": PAGE,
        **options.settings,
    }
    manager = model.init_continuous_batching(
        generation_config=GenerationConfig(do_sample=False, eos_token_id=-1, max_new_tokens=256),
        continuous_batching_config=ContinuousBatchingConfig(**settings),
    )
    manager.start()

    def generate(asks: Sequence[Ask]) -> list[list[int]]:
        stamp = time.monotonic_ns()
        for ask in asks:
            manager.add_request(ask.prompt, request_id=f"{stamp}-{ask.id}", max_new_tokens=ask.max_new)
        tokens: dict[int, list[int]] = {}
        while len(tokens) < len(asks):
            result = manager.get_result(timeout=1)
            if result is None:
                if not manager.is_running():
                    raise RuntimeError("the thread of continuous batching has ended")
            elif result.error is not None:
                raise RuntimeError(f"request {result.request_id}: {result.error}")
            elif result.is_finished():
                tokens[int(result.request_id.rpartition("-")[2])] = list(result.generated_tokens)
        return [tokens[ask.id] for ask in asks]

    return generate


if __name__ == "__main__":
    main(load)
