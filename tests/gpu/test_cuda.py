"""What only a CUDA GPU can show: the hf engine there, in float32, and which GPU a rank gets."""

from pathlib import Path

import pytest
import torch

from hpc.engine.hf import HFEngine
from hpc.model.device import gpu_uuids, resolve_device, resolve_dtype
from hpc.model.load import load, quiet
from hpc.sampling_params import SamplingParams
from tests.engine.oracle import Plain, generated, letters, one_bucket, prompts

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA GPU here")

NEW = 16
PROMPTS = prompts()


@pytest.fixture(scope="module")
def engine(tiny_model: Path) -> HFEngine:
    """The tiny llama on the first GPU."""
    quiet()
    return HFEngine(load(tiny_model, resolve_device("cuda", 0), "float32", threads=1), (), letters, 100_000)


def test_greedy_output_of_a_batch_on_a_gpu_equals_plain_generate(engine: HFEngine, tiny_model: Path) -> None:
    found = generated(engine, one_bucket(PROMPTS, SamplingParams(max_new_tokens=NEW)))
    plain = Plain(tiny_model, "cuda")
    assert [found[row] for row in range(len(PROMPTS))] == [plain.generate(prompt, NEW) for prompt in PROMPTS]


@pytest.mark.parametrize(
    "sampling",
    [
        SamplingParams(max_new_tokens=NEW, temperature=0.9),
        SamplingParams(max_new_tokens=NEW, temperature=1.3, top_k=20),
        SamplingParams(max_new_tokens=NEW, temperature=0.8, top_p=0.9, seed=5),
    ],
    ids=["all", "top_k", "top_p"],
)
def test_sampled_output_on_a_gpu_does_not_depend_on_the_batch(engine: HFEngine, sampling: SamplingParams) -> None:
    requests = one_bucket(PROMPTS, sampling)
    alone = [generated(engine, [one])[one.id] for one in requests]
    together = generated(engine, requests[::-1])
    assert [together[row] for row in range(len(PROMPTS))] == alone


@pytest.mark.parametrize("device", ["auto", "cuda"])
def test_the_gpu_of_a_rank_is_its_own_of_those_it_sees(device: str) -> None:
    count = torch.cuda.device_count()
    assert [resolve_device(device, rank) for rank in range(count)] == [torch.device("cuda", n) for n in range(count)]


def test_torch_says_which_gpu_it_is() -> None:
    assert len({gpu_uuids(torch.device("cuda", index)) for index in range(torch.cuda.device_count())} - {""}) > 0


def test_where_there_is_a_gpu_the_device_cpu_is_still_the_cpu() -> None:
    assert resolve_device("cpu", 0) == torch.device("cpu")


def test_a_model_is_loaded_onto_the_gpu_of_its_rank(tiny_model: Path) -> None:
    last = torch.cuda.device_count() - 1
    model = load(tiny_model, resolve_device("auto", last), "float32", threads=1)
    assert {parameter.device for parameter in model.parameters()} == {torch.device("cuda", last)}


def test_on_a_gpu_the_dtype_auto_is_a_half_precision() -> None:
    assert resolve_dtype("auto", "cuda") == ("bfloat16" if torch.cuda.get_device_capability()[0] >= 8 else "float16")
