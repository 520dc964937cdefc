"""A trial measures steps of the shapes it was to measure, and leaves the engine as it was."""

import time
from collections.abc import Iterator

import pytest
import torch

from hpc.engine.native.limits import EngineLimits
from hpc.engine.native.trial import Shape, bytes_per_second, flops_per_second, shapes, trial
from hpc.sampling_params import SamplingParams
from tests.engine.models import WAYS, engine_of, greedy_of, model_of
from tests.engine.native.test_engine import SmallMemory, watched
from tests.engine.oracle import generated, request

LIMITS = EngineLimits(max_seqs=4, step_tokens=64, cache_bytes=8 << 20, context_tokens=256)
ENOUGH_S = 60.0


@pytest.fixture(autouse=True)
def _memory_is_not_zero_at_first() -> Iterator[None]:
    """New tensors hold no numbers until they are written, as memory may that was used before."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


def measured(kind: str = "llama") -> list[tuple[int, int, float, int, float]]:
    return trial(engine_of(kind, WAYS[0], LIMITS), ENOUGH_S)


def test_every_shape_is_measured() -> None:
    found = {(tokens, kv > 0) for tokens, _, _, kv, _ in measured()}
    assert found >= {(1, True), (2, True), (4, True), (16, False), (64, False)}


@pytest.mark.parametrize("kind", ["llama", "gpt2", "gemma2", "mixtral"])
def test_decoding_reads_what_is_stored_of_each_sequence(kind: str) -> None:
    decoding = [(tokens, kv) for tokens, chosen, pairs, kv, _ in measured(kind) if kv]
    assert decoding
    assert all(kv >= 33 * tokens for tokens, kv in decoding)


def test_a_chunk_behind_a_long_prompt_has_the_pairs_of_one() -> None:
    assert max(pairs for _, _, pairs, _, _ in measured()) == 64 * (128 + 32)


def test_times_are_above_nothing() -> None:
    assert min(seconds for *_, seconds in measured()) > 0


def test_without_time_the_first_shapes_are_measured_all_the_same() -> None:
    began = time.monotonic()
    found = trial(engine_of("llama", WAYS[0], LIMITS), 0.0)
    assert (len({tokens for tokens, *_ in found}) >= 3, time.monotonic() - began < ENOUGH_S) == (True, True)


def test_after_a_trial_an_engine_generates_what_it_would_have() -> None:
    engine = engine_of("llama", WAYS[0], LIMITS)
    trial(engine, 0.0)
    prompt = [5, 9, 30, 7]
    one = request(prompt, 0, SamplingParams(max_new_tokens=8))
    assert generated(engine, [one]) == {0: greedy_of("llama", prompt, 8)}


def test_steps_for_which_memory_is_short_are_left_out() -> None:
    with watched(model_of("llama", "torch"), SmallMemory(2)):
        found = trial(engine_of("llama", "torch", LIMITS), ENOUGH_S)
    assert {tokens for tokens, _, _, kv, _ in found if kv} == {1, 2}
    assert {tokens for tokens, _, pairs, _, _ in found if pairs} == {16, 64}


def test_shapes_fit_into_a_small_cache() -> None:
    for shape in shapes(128, 512, 4096, cache_tokens=1024):
        assert max(1, shape.decoding) * (shape.stored + shape.prompt) <= 1024 * 0.75, shape


def test_shapes_fit_into_a_short_context() -> None:
    assert all(shape.stored + shape.prompt < 128 for shape in shapes(8, 512, 128, 1 << 20))


def test_no_shape_is_measured_twice() -> None:
    found = shapes(128, 512, 4096, 1 << 20)
    assert (len(found), found[0]) == (len(set(found)), Shape(1, 32))


def test_a_device_reads_and_computes_at_some_rate() -> None:
    cpu = torch.device("cpu")
    assert bytes_per_second(cpu) > 1e8
    assert flops_per_second(cpu, torch.float32) > 1e8
