"""Draws and choices from made-up logits, for the tests of the sampler."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from hpc.engine.sampling.choice import SamplerOutput
from hpc.engine.sampling.draw import ALL, BY_MASS, draw, stream, uniforms
from hpc.engine.sampling.rounding import Rounding
from hpc.engine.sampling.sampler import Sampler
from hpc.request import RowId
from hpc.sampling_params import SamplingParams
from tests.engine.oracle import request

Floats = npt.NDArray[np.float64]

CPU = torch.device("cpu")
JUST_BELOW_1 = 1 - 2.0**-53
LOGITS = (0.3, -1.2, 2.0, 1.1, -0.4, 0.9, 1.7, -2.5, 0.0, 1.4)
BEST, NEXT = 2, 6
"""The most probable tokens of LOGITS."""


def numbers(seed: int, identity: RowId, count: int, first: int = 0) -> Floats:
    """Return the uniform numbers of a request at the first positions."""
    return uniforms(
        np.full(count, stream(seed, identity), dtype=np.uint64), np.arange(first, first + count, dtype=np.uint64)
    )


def column(values: Any, rows: int) -> torch.Tensor:
    """Return one value, or one for each row, as `draw` takes it."""
    return torch.tensor(np.broadcast_to(np.asarray(values, dtype=np.float64), rows).copy())[:, None]


def draw_with(
    logits: Sequence[float],
    uniform: Sequence[float] | Floats,
    temperature: float = 1.0,
    top_p: float = 1.0,
    top_k: int = 0,
    min_p: float = 0.0,
    reads: bool = True,
) -> list[int]:
    """Draw once from the same logits for each uniform number."""
    rows = len(uniform)
    tokens = draw(
        torch.tensor(logits, dtype=torch.float32).expand(rows, -1),
        *(column(value, rows) for value in (temperature, top_p, top_k, min_p, uniform)),
        ranked=ALL if reads or top_k else BY_MASS,
        reads=reads,
    )
    return tokens.tolist()  # type: ignore[no-any-return]


def sampler_of(
    sampling: Sequence[SamplingParams],
    ids: Sequence[RowId] | None = None,
    prompts: Sequence[Sequence[int]] | None = None,
    eos: Sequence[int] = (),
    noise: float | None = None,
    device: torch.device = CPU,
) -> Sampler:
    """Return a sampler whose slots 0, 1, … have requests with these parameters and prompts."""
    sampler = Sampler(len(sampling), device, eos, None if noise is None else Rounding(noise))
    for slot, params in enumerate(sampling):
        prompt = prompts[slot] if prompts else [0]
        sampler.set(slot, request(prompt, ids[slot] if ids is not None else slot, params))
    return sampler


def choose(
    sampling: Sequence[SamplingParams], logits: torch.Tensor, ids: Sequence[RowId] | None = None, **more: Any
) -> SamplerOutput:
    """Choose a first token for requests with these parameters, one a row of the logits."""
    return sampler_of(sampling, ids, **more).choose(logits, list(range(len(sampling))))


def choose_often(sampler: Sampler, logits: Sequence[float] | torch.Tensor, count: int, slot: int = 0) -> list[int]:
    """Choose `count` tokens for a slot, one after the other, from the same logits."""
    row = torch.as_tensor(logits, dtype=torch.float32)[None]
    return [int(sampler.choose(row, [slot]).tokens.item()) for _ in range(count)]


def mixed_rows(rows: int, vocabulary: int = 50) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """Return the arguments of `draw` for rows of all kinds: logits, and the columns; the last is their noise."""
    random = np.random.default_rng(0)
    logits = torch.tensor(random.normal(size=(rows, vocabulary)) * 3, dtype=torch.float32)
    columns = [
        random.choice([0.3, 1.0, 2.0], rows),
        random.choice([0.5, 0.9, 1.0], rows),
        random.choice([0, 1, 5, 40], rows).astype(float),
        random.choice([0.0, 0.02, 0.5], rows),
        random.random(rows),
        random.choice([0.0, 1e-3, 0.3], rows),
    ]
    return logits, [torch.tensor(column)[:, None] for column in columns]


KINDS: list[dict[str, Any]] = [
    {},
    {"temperature": 1.0},
    {"temperature": 1.5, "top_k": 4},
    {"temperature": 1.5, "top_p": 0.7},
    {"temperature": 2.0, "min_p": 0.2, "seed": 5},
    {"repetition_penalty": 1.8},
    {"temperature": 1.2, "frequency_penalty": 0.8, "presence_penalty": -0.5},
    {"min_new_tokens": 4, "frequency_penalty": 0.4},
    {"temperature": 0.8, "repetition_penalty": 0.5, "min_new_tokens": 3, "logprobs": 2},
    {"logprobs": 1},
]


def kind(number: int) -> SamplingParams:
    """Return parameters of one of the kinds."""
    return SamplingParams(**KINDS[number % len(KINDS)])


def prompt_of(number: int) -> list[int]:
    """Return a prompt of tokens that LOGITS has."""
    return [number % 10, (3 * number + 1) % 10]
