"""What engines are compared with: transformers' own `generate`, one prompt at a time. And the requests to do so."""

import random
from collections.abc import Iterator, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import AutoModelForCausalLM, GenerationConfig

from hpc.engine.hf import HFEngine
from hpc.engine.interface import Engine, Source
from hpc.engine.sequence import Sequence as Grown
from hpc.model.load import load
from hpc.request import Request, RowId
from hpc.sampling_params import SamplingParams
from tests.fakes import ListSource, Spelled

LENGTHS = (1, 2, 3, 5, 9, 31, 64, 65, 128, 301)
CPU = torch.device("cpu")


def prompts(lengths: Sequence[int] = LENGTHS, seed: int = 0) -> list[list[int]]:
    """Return random prompts of these lengths, made of the bytes of a tiny model."""
    numbers = random.Random(seed)
    return [[numbers.randrange(256) for _ in range(length)] for length in lengths]


def request(
    prompt: Sequence[int], identity: RowId = 0, sampling: SamplingParams | None = None, bucket: int | None = None
) -> Request:
    """Make a request; its bucket is the length of the prompt if none is given."""
    row = identity if isinstance(identity, int) else 0
    tokens = np.array(prompt, dtype=np.int32)
    return Request(row, identity, tokens, sampling or SamplingParams(), bytes(16), bucket or len(prompt))


def one_bucket(all_prompts: Sequence[Sequence[int]], sampling: SamplingParams) -> list[Request]:
    """Make requests that may all be in one batch, with the ids 0, 1, …"""
    bucket = max(len(prompt) for prompt in all_prompts)
    return [request(prompt, index, sampling, bucket) for index, prompt in enumerate(all_prompts)]


letters = Spelled(lambda token: chr(0x4E00 + int(token)).encode())
"""Each token is one letter of its own."""


@cache
def loaded(path: Path) -> Any:
    """Load a model in float32 on the CPU, as the program does; once, so it must not be changed."""
    return load(path, CPU, "float32", threads=1)


def load_engine(path: Path, batch_tokens: int = 100_000, eos: Sequence[int] = (), decode: Any = letters) -> HFEngine:
    """Make an engine of a model in float32 on the CPU."""
    return HFEngine(loaded(path), eos, decode, batch_tokens)


class Steps:
    """An `on_step` that counts, and says stop at a step."""

    def __init__(self, stop_at: int | None = None) -> None:
        self.count = 0
        self._stop_at = stop_at

    def __call__(self) -> bool:
        self.count += 1
        return self.count == self._stop_at


def grow(engine: Engine, source: Source, on_step: Steps | None = None) -> Iterator[Grown]:
    """Yield the sequences of an engine one by one."""
    for grown in engine.generate(source, on_step or Steps()):
        yield from grown


def generated(engine: Engine, requests: Sequence[Request], on_step: Steps | None = None) -> dict[RowId, list[int]]:
    """Return the tokens of each request that was completed, by id; fail if one was twice or had an error."""
    found: dict[RowId, list[int]] = {}
    for sequence in grow(engine, ListSource(requests), on_step):
        assert (sequence.error, sequence.sample) == (None, 0)
        assert sequence.request.id not in found
        found[sequence.request.id] = sequence.token_ids
    return found


def plain_output(model: Any, start: int, source: Sequence[int], max_new_tokens: int, **values: Any) -> list[int]:
    """Return what `generate` makes of one source with an encoder-decoder; the first token of a LED sees all others.

    `values` are fields of the generation config.
    """
    input_ids = torch.tensor([list(source)])
    seen = {"global_attention_mask": torch.tensor([[1] + [0] * (len(source) - 1)])}
    output = model.generate(
        input_ids,
        attention_mask=torch.ones_like(input_ids),
        generation_config=GenerationConfig(
            max_new_tokens=max_new_tokens, do_sample=False, pad_token_id=0, decoder_start_token_id=start, **values
        ),
        **(seen if model.config.model_type == "led" else {}),
    )
    return [int(token) for token in output[0, 1:]]


class Plain:
    """A model as transformers loads it, for greedy generation of one prompt.

    `ends` leaves the model's own end-of-sequence token in force.
    """

    def __init__(self, path: Path, device: str = "cpu", ends: bool = False) -> None:
        self._model: Any = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).to(device)
        if not ends:
            self._model.generation_config.eos_token_id = None

    def generate(self, prompt: Sequence[int], max_new_tokens: int, **values: Any) -> list[int]:
        """Return the tokens after the prompt; `values` go to generate."""
        input_ids = torch.tensor([list(prompt)], device=self._model.device)
        output = self._model.generate(
            input_ids,
            attention_mask=torch.ones_like(input_ids),
            max_new_tokens=max_new_tokens,
            do_sample=False,
            **values,
        )
        return [int(token) for token in output[0, len(prompt) :]]
