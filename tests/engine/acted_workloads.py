"""Requests of all kinds, on an acted GPU and on the CPU: the same tokens, errors and log probabilities."""

import functools
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from hpc.engine.extents import ALIGN
from hpc.engine.native.limits import EngineLimits
from hpc.request import Request
from hpc.sampling_params import SamplingParams
from tests.engine.acted import engine_on_gpu
from tests.engine.models import VOCABULARY, engine_of
from tests.engine.oracle import grow, request
from tests.fakes import ListSource

NEW = 8
Answers = dict[tuple[Any, int], tuple[list[int], str | None, list[float]]]


@dataclass(frozen=True)
class Work:
    """Requests, and what the engine has for them."""

    requests: Callable[[], list[Request]]
    limits: EngineLimits
    cache_tokens: int = 0
    """Of the cache; 0: plenty."""
    eos: tuple[int, ...] = ()


def numbers(length: int, seed: int) -> list[int]:
    """Return a random prompt."""
    return random.Random(seed).choices(range(2, VOCABULARY), k=length)


PROMPTS = [numbers(length, length) for length in (3, 17, 9, 30, 12, 1, 22, 77, 5, 64, 65)]
LONG = [numbers(700, 3000), numbers(513, 3001), numbers(1, 3002), numbers(512, 3003)]
HEADER = numbers(43, 1000)
BEHIND = [HEADER + numbers(length, 2000 + length) for length in (1, 2, 14, 33, 3)]


def asks(prompts: Sequence[Sequence[int]], cut: int = 0, **values: Any) -> list[Request]:
    """Return requests for these prompts, which share their first `cut` tokens."""
    sampling = SamplingParams(**{"max_new_tokens": NEW, **values})
    return [replace(request(prompt, row, sampling), prefix=cut) for row, prompt in enumerate(prompts)]


def behind_several() -> list[Request]:
    """Return requests behind a long prefix, a short one and none, samples of one prompt, and a prefix of chunks."""
    return [replace(ask, row=row, id=row) for row, ask in enumerate(
        asks(BEHIND, cut=len(HEADER))
        + asks([PROMPTS[2] + tail for tail in ([5], [6, 7, 8])], cut=len(PROMPTS[2]))
        + asks(PROMPTS[:3])
        + asks(PROMPTS[3:4], temperature=1.0, n=4)
        + asks([LONG[0] + tail for tail in ([5], [6, 7, 8], [9])], cut=700, max_new_tokens=4)
        + asks(BEHIND, cut=len(HEADER), temperature=1.0)
    )]  # fmt: skip


def many(count: int, seed: int, longest: int = 90) -> list[Request]:
    """Return requests of many lengths and limits, greedy and drawn, which end at some token or at their limit."""
    rng = random.Random(seed)
    found = []
    for row in range(count):
        drawn: dict[str, Any] = rng.choice([{}, {}, {"temperature": 1.0}, {"temperature": 0.8, "top_p": 0.9}])
        stops = tuple(range(2, 12)) if rng.random() < 0.5 else ()
        sampling = SamplingParams(max_new_tokens=rng.choice((1, 2, 5, 9, 20)), stop_token_ids=stops, **drawn)
        found.append(request(numbers(rng.randint(1, longest), 7000 + seed * 1000 + row), row, sampling))
    return found


def short_then_long(new: int) -> list[Request]:
    """Return requests that end at once, and behind them such as outgrow what these let expect."""
    short = [request([7 + row], f"short {row}", SamplingParams(max_new_tokens=1)) for row in range(64)]
    return short + asks(PROMPTS[:4], max_new_tokens=new)


def varied() -> list[Request]:
    """Return requests of which each is sampled in its own way."""
    ways: list[dict[str, Any]] = [
        {}, {"temperature": 1.0}, {"temperature": 0.7, "top_k": 20}, {"temperature": 1.0, "top_p": 0.8, "seed": 3},
        {"repetition_penalty": 1.3}, {"presence_penalty": 0.5, "frequency_penalty": 0.2}, {"logprobs": 3},
        {"min_new_tokens": 5, "stop_token_ids": tuple(range(2, 300))},
        {"temperature": 1.2, "min_p": 0.05, "logprobs": 1}, {"temperature": 1.0, "n": 3},
        {"temperature": 0.9, "repetition_penalty": 1.1, "top_p": 0.9},
    ]  # fmt: skip
    return [
        request(prompt, row, SamplingParams(max_new_tokens=NEW, **way))
        for row, (prompt, way) in enumerate(zip(PROMPTS, ways, strict=True))
    ]


def _limits(max_seqs: int, step_tokens: int, **values: Any) -> EngineLimits:
    return EngineLimits(max_seqs, step_tokens, 32 << 20, context_tokens=1024, **values)


FEW, SOME, PLENTY = _limits(3, 64), _limits(8, 512), _limits(12, 4096)
WORKLOADS: dict[str, Work] = {
    "slots used again": Work(lambda: asks(PROMPTS), FEW),
    "slots used again, fixed sizes": Work(lambda: asks(PROMPTS), replace(FEW, deterministic=True)),
    "one slot": Work(lambda: asks(PROMPTS[:5]), _limits(1, 512)),
    "long prompts in chunks": Work(lambda: asks(LONG, max_new_tokens=4), SOME),
    "long prompts in small steps": Work(lambda: asks(LONG, max_new_tokens=4), _limits(8, 1)),
    "long prompts, fixed sizes": Work(lambda: asks(LONG, max_new_tokens=4), replace(SOME, deterministic=True)),
    "a shared prefix": Work(lambda: asks(BEHIND, cut=len(HEADER)), FEW),
    "a shared prefix longer than a chunk": Work(
        lambda: asks([LONG[0] + tail for tail in ([5], [6, 7, 8], [9])], cut=700, max_new_tokens=4), SOME
    ),
    "prefixes that are read where they lie": Work(behind_several, replace(PLENTY, share_from=20)),
    "prefixes that are read where they lie, in small steps": Work(behind_several, replace(FEW, share_from=20)),
    "samples of a prompt": Work(lambda: asks(PROMPTS[:4], temperature=1.0, n=5), SOME),
    "each sampled in its own way": Work(varied, FEW),
    "each sampled in its own way, fixed sizes": Work(varied, replace(FEW, deterministic=True)),
    "limits of one token": Work(lambda: asks(PROMPTS, max_new_tokens=1), FEW),
    "ends at tokens of the model": Work(
        lambda: asks(PROMPTS, max_new_tokens=40, temperature=1.0), FEW, eos=tuple(range(2, 60))
    ),
    "ends at a text": Work(
        lambda: asks(PROMPTS, max_new_tokens=40, temperature=1.0, stop=tuple(chr(0x4E00 + n) for n in range(2, 40))),
        FEW,
    ),
    "extents that grow": Work(lambda: short_then_long(ALIGN + 20), SOME),
    "sequences that give way": Work(lambda: short_then_long(ALIGN + 20), SOME, 4 * ALIGN),
    "many in a small cache": Work(lambda: many(80, 1), PLENTY, 12 * ALIGN),
    "many on few slots, fixed sizes": Work(lambda: many(60, 2), replace(FEW, deterministic=True)),
    "many that are admitted together": Work(lambda: many(60, 3), replace(PLENTY, refill=1 / 4)),
    "requests that fill the cache, and larger ones": Work(
        lambda: [*asks([numbers(4 * ALIGN - NEW + 1, 9), numbers(4 * ALIGN, 10), numbers(20, 11)])], SOME, 4 * ALIGN
    ),
}


def answers(engine: Any, work: Work) -> Answers:
    """Return what an engine makes of the requests."""
    found: Answers = {}
    for grown in grow(engine, ListSource(work.requests())):
        key = grown.request.id, grown.sample
        assert key not in found, f"{key} came twice"
        found[key] = grown.token_ids, grown.error, [round(value, 3) for value, _ in grown.logprobs]
    return found


@functools.cache
def _expected(kind: str, work: Work) -> Answers:
    return answers(engine_of(kind, "torch", work.limits, work.eos, cache_tokens=work.cache_tokens), work)


def check(kind: str, work: Work, index: int = 0, current: int | None = None) -> str:
    """Return how an acted GPU's answers differ from the CPU's; nothing if they do not."""
    expected = _expected(kind, work)
    with engine_on_gpu(kind, work.limits, work.eos, index, current, cache_tokens=work.cache_tokens) as (engine, gpu):
        try:
            found = answers(engine, work)
        except Exception as error:
            return f"{type(error).__name__}: {error}"
    wrong = [key for key in expected if not _alike(found.get(key), expected[key])]
    if wrong or len(found) != len(expected):
        first = wrong[0] if wrong else None
        return (
            f"{len(wrong)} of {len(expected)} wrong, {len(found)} answers, as {first}: "
            f"{first and found.get(first)} and not {first and expected[first]}"
        )
    if gpu.pageable:
        return f"the host waits at {sorted(gpu.pageable)}"
    if gpu.empty_captures:
        return "a graph is empty: another device was current"
    if engine.graphs and not gpu.replayed and any(len(tokens) > 2 for tokens, _, _ in expected.values()):
        return "no step was replayed"
    return ""


def _alike(found: Any, expected: Any) -> bool:
    if found is None or found[:2] != expected[:2] or len(found[2]) != len(expected[2]):
        return False
    return all(abs(a - b) <= 0.002 for a, b in zip(found[2], expected[2], strict=True))
