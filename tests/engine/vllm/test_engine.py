"""The `vllm` engine beyond what every engine keeps to: its limits, its steps, what it is started with."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from hpc.engine.steps import StepShape
from hpc.engine.vllm.engine import shape
from hpc.engine.vllm.load import engine_arguments, shown
from hpc.engine_args import Vllm
from hpc.model.load import load, weights, weights_of
from hpc.sampling_params import SamplingParams
from tests.engine.oracle import CPU, prompts, request
from tests.engine.test_contract import GREEDY, all_of, some, vllm


def planned(new: dict[str, tuple[int, int]], old: dict[str, tuple[int, int, int]]) -> Any:
    """A step as vLLM plans it: of new requests the tokens to compute and stored, of old ones the generated too."""
    counts = {name: tokens for name, (tokens, *_) in {**new, **old}.items()}
    return SimpleNamespace(
        total_num_scheduled_tokens=sum(counts.values()),
        num_scheduled_tokens=counts,
        scheduled_new_reqs=[SimpleNamespace(req_id=n, num_computed_tokens=stored) for n, (_, stored) in new.items()],
        scheduled_cached_reqs=SimpleNamespace(
            req_ids=list(old),
            num_computed_tokens=[stored for _, stored, _ in old.values()],
            num_output_tokens=[generated for *_, generated in old.values()],
        ),
    )


def test_a_step_of_prompts_has_their_pairs() -> None:
    found = shape(planned({"a": (10, 0), "b": (4, 100)}, {}))
    assert found == StepShape(tokens=14, prompt=14, chosen=2, pairs=10 * 5.0 + 4 * 102.0, kv=0)


def test_a_step_that_decodes_reads_what_is_stored() -> None:
    assert shape(planned({}, {"a": (1, 30, 5), "b": (1, 7, 1)})) == StepShape(2, 0, 2, 0.0, 37)


def test_a_later_part_of_a_prompt_is_of_the_prompt() -> None:
    assert shape(planned({}, {"a": (8, 512, 0), "b": (1, 9, 2)})) == StepShape(9, 8, 2, 8 * 516.0, 9)


NOTHING = Vllm()


def arguments(asked: Vllm = NOTHING, cache_bytes: int = 0, cuda: bool = True, devices: int = 1) -> dict[str, Any]:
    return engine_arguments(Path("/m"), "float32", 64, cache_bytes, 2048, cuda, asked, devices)


def test_on_a_gpu_cache_and_steps_are_left_to_vllm() -> None:
    assert {"kv_cache_memory_bytes", "max_num_batched_tokens", "enable_chunked_prefill"}.isdisjoint(arguments())


def test_on_a_cpu_nothing_is_compiled_and_no_prompt_is_cut() -> None:
    found = arguments(cache_bytes=1 << 30, cuda=False)
    assert (found["enforce_eager"], found["enable_chunked_prefill"], found["max_num_batched_tokens"]) == (
        True, False, 2048,
    )  # fmt: skip
    assert found["kv_cache_memory_bytes"] == 1 << 30


def test_a_model_on_several_devices_has_a_process_for_each_and_shares_the_cache_out() -> None:
    found = arguments(cache_bytes=4 << 30, devices=4)
    assert (found["tensor_parallel_size"], found["distributed_executor_backend"]) == (4, "mp")
    assert found["kv_cache_memory_bytes"] == 1 << 30


@pytest.mark.parametrize(
    ("variables", "gpu", "count", "expected"),
    [
        ({}, 0, 1, "0"),
        ({}, 3, 1, "3"),
        ({"CUDA_VISIBLE_DEVICES": "GPU-a"}, 0, 1, "GPU-a"),
        ({"CUDA_VISIBLE_DEVICES": "4,5,6,7"}, 2, 1, "6"),
        ({"CUDA_VISIBLE_DEVICES": "GPU-a,GPU-b"}, 0, 2, "GPU-a,GPU-b"),
        ({"CUDA_VISIBLE_DEVICES": "4,5,6,7"}, 1, 2, "5,6"),
    ],
)
def test_vllm_sees_the_gpus_of_the_rank_alone(variables: dict[str, str], gpu: int, count: int, expected: str) -> None:
    assert shown(variables, gpu, count) == {"CUDA_VISIBLE_DEVICES": expected}


def test_what_shows_a_rank_gpus_of_amd_stays() -> None:
    assert shown({"HIP_VISIBLE_DEVICES": "2,3"}, 0, 2) == {}


def test_a_model_on_one_device_has_no_process_beside_the_rank() -> None:
    assert {"tensor_parallel_size", "distributed_executor_backend"}.isdisjoint(arguments())


def test_the_weights_of_a_model_are_counted_without_it(tiny_model: Path) -> None:
    assert weights_of(tiny_model, "float32") == weights(load(tiny_model, CPU, "float32", threads=1))


def test_a_prompt_that_vllm_refuses_is_an_error_and_the_others_are_not(wide_model: Path) -> None:
    long = request(prompts([600])[0], 99, GREEDY)
    errors = {grown.request.row: grown.error for grown in all_of(vllm(wide_model, (), str), [*some(3, GREEDY), long])}
    assert [errors[row] for row in range(3)] == [None] * 3
    assert "512" in (errors[99] or "")


def test_a_row_that_reaches_vllms_limit_is_an_error_that_says_so(wide_model: Path) -> None:
    one = request(prompts([500])[0], 0, SamplingParams(max_new_tokens=40))
    [grown] = all_of(vllm(wide_model, (), str), [one])
    assert "it reached vLLM's limit of 512 tokens after 12 new ones" in (grown.error or "")


@pytest.mark.parametrize("temperature", [0.005, 0.0001])
def test_a_temperature_that_vllm_would_raise_is_an_error(wide_model: Path, temperature: float) -> None:
    [grown] = all_of(vllm(wide_model, (), str), [request([1, 2], 0, SamplingParams(temperature=temperature))])
    assert f"the temperature is {temperature}" in (grown.error or "")


def test_what_prompts_share_is_computed_once_and_counted(wide_model: Path) -> None:
    engine, shared = vllm(wide_model, (), str), prompts([300], seed=7)[0]
    both = [request([*shared, token], token, GREEDY) for token in (1, 2)]
    all_of(engine, both)
    assert engine.steps.totals.cached_tokens >= 128
    assert engine.steps.totals.step_prompt == 602 - engine.steps.totals.cached_tokens
