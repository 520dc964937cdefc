"""transformers' `generate`, as written by hand: batches of 8 in the order of the input, padded on the left.

A batch generates as many tokens as the longest of its requests wants; what is too much is cut off.
"""

from collections.abc import Sequence

import torch
from transformers import AutoModelForCausalLM, GenerationConfig

from tests.bench.measure import Ask, Generate, Options, main

BATCH = 8


def load(options: Options) -> Generate:
    """Load the model as the documentation of transformers shows."""
    torch.set_num_threads(options.threads)
    model = AutoModelForCausalLM.from_pretrained(options.model, dtype=getattr(torch, options.dtype)).eval()
    model.generation_config = GenerationConfig()
    pad = model.config.pad_token_id or 0

    def generate_batch(asks: Sequence[Ask]) -> list[list[int]]:
        longest = max(len(ask.prompt) for ask in asks)
        padding = [longest - len(ask.prompt) for ask in asks]
        ids = torch.tensor([[pad] * left + ask.prompt for left, ask in zip(padding, asks, strict=True)])
        mask = torch.tensor([[0] * left + [1] * (longest - left) for left in padding])
        most = max(ask.max_new for ask in asks)
        config = GenerationConfig(max_new_tokens=most, do_sample=False, pad_token_id=pad)  # no EOS: it ends nothing
        with torch.inference_mode():
            output = model.generate(ids, attention_mask=mask, generation_config=config)
        return [row[: ask.max_new] for row, ask in zip(output[:, longest:].tolist(), asks, strict=True)]

    def generate(asks: Sequence[Ask]) -> list[list[int]]:
        batches = [asks[begin : begin + BATCH] for begin in range(0, len(asks), BATCH)]
        return [tokens for batch in batches for tokens in generate_batch(batch)]

    return generate


if __name__ == "__main__":
    main(load)
