"""A model that the native engine cannot run, or would run wrongly, is found out before it generates."""

import gc
import logging
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf

from hpc.engine.attention import Unsupported
from hpc.engine.hf import HFEngine
from hpc.engine.kernel import Kernel, OneDnn
from hpc.engine.layers import PackedLinear
from hpc.engine.load import load
from hpc.engine.native import NativeEngine
from hpc.engine.support import build, check, prepare
from hpc.job import Job, SamplingParams
from hpc.loader import Loader
from hpc.place import Place
from tests.conftest import make_tiny_model
from tests.engine.models import CONFIGS, ROOMY, VOCABULARY, WAYS, build_engine, kernel_of, tiny
from tests.engine.oracle import Plain, generated, letters, prompts, request

SMALL: dict[str, Any] = {"vocab_size": VOCABULARY, "hidden_size": 64, "bos_token_id": None, "eos_token_id": None}
PLACE = Place(host="here", local_rank=0, ranks_on_node=1, threads=1)
PROMPTS = prompts((3, 20, 40))
SAMPLING = SamplingParams(max_new_tokens=8)


def reason_of(model: Any, way: str = "torch") -> str:
    with pytest.raises(Unsupported) as caught:
        build(model, (), letters, ROOMY, kernel_of(way))
    return str(caught.value)


def test_a_model_whose_attention_cannot_be_replaced_is_unsupported() -> None:
    bloom = tiny(hf.BloomConfig(**SMALL, n_layer=2, n_head=4))  # ALiBi
    assert reason_of(bloom) == "its attention cannot be replaced"


def test_a_recurrent_model_is_unsupported() -> None:
    mamba = tiny(hf.MambaConfig(**SMALL, num_hidden_layers=2, state_size=8), scale=1.0)
    assert reason_of(mamba) == "its attention cannot be replaced"


def test_a_model_that_declares_layers_of_another_kind_is_unsupported() -> None:
    model = tiny(CONFIGS["llama"])
    model.config.layer_types = ["full_attention", "chunked_attention"]
    assert reason_of(model) == "it has layers of chunked_attention"


def test_a_hybrid_of_attention_and_recurrence_is_unsupported() -> None:
    lfm = hf.Lfm2Config(
        **SMALL, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, intermediate_size=96,
        layer_types=["conv", "full_attention"], pad_token_id=None,
    )  # fmt: skip
    assert "conv" in reason_of(tiny(lfm, scale=1.0))


@pytest.mark.parametrize("kind", CONFIGS)
def test_the_architectures_of_the_tests_are_declared_as_supported(kind: str) -> None:
    check(tiny(CONFIGS[kind]))


@pytest.mark.parametrize("kind", CONFIGS)
def test_a_layer_is_found_for_every_layer_of_the_model(kind: str) -> None:
    assert sorted(prepare(tiny(CONFIGS[kind]))) == [0, 1]


def test_what_a_layer_keeps_is_what_its_heads_have() -> None:
    layout = prepare(tiny(CONFIGS["qwen3"]))[0].layout
    assert (layout.key, layout.value) == ((2, 24), (2, 24))


# The self-test: a model that declares nothing unusual, and attends in another way.


@pytest.mark.parametrize("way", WAYS)
def test_a_model_whose_attention_is_told_something_else_is_unsupported(way: str) -> None:
    model = tiny(CONFIGS["llama"])
    own = model.set_attn_implementation

    def misled(name: str) -> None:
        own(name)
        for layer in model.model.layers:
            layer.self_attn.scaling = 0.25 if name == "eager" else 0.3

    model.set_attn_implementation = misled
    assert "its logits differ" in reason_of(model, way)


def test_a_model_that_remembers_in_another_way_is_unsupported() -> None:
    class Remembers(torch.nn.Module):
        """Adds what the token before had, as a recurrent layer does."""

        def __init__(self, own: torch.nn.Module) -> None:
            super().__init__()
            self.own = own

        def forward(self, x: torch.Tensor) -> Any:
            return self.own(x) + 0.5 * torch.nn.functional.pad(x, (0, 0, 1, 0))[:, :-1]

    model = tiny(CONFIGS["llama"])
    model.model.layers[1].mlp = Remembers(model.model.layers[1].mlp)
    assert "its logits differ" in reason_of(model)


@pytest.mark.parametrize("rope", ["dynamic", "longrope"])
def test_positions_that_depend_on_the_longest_sequence_are_right_or_unsupported(rope: str) -> None:
    """Their frequencies change for a whole step when one of its sequences is long."""
    parameters: dict[str, Any] = {"rope_type": rope, "rope_theta": 10000.0, "factor": 4.0}
    if rope == "longrope":
        parameters |= {"short_factor": [1.0] * 8, "long_factor": [4.0] * 8, "original_max_position_embeddings": 64}
    values = {**CONFIGS["llama"].to_dict(), "max_position_embeddings": 64 if rope == "dynamic" else 256}
    values.pop("rope_parameters", None)
    config = hf.LlamaConfig(**values, rope_parameters=parameters)
    both = prompts((20, 120))
    plain = tiny(config)
    plain.set_attn_implementation("eager")
    expected = []
    for prompt in both:
        ids = torch.tensor([prompt])
        out = plain.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=8, do_sample=False)
        expected.append(out[0, len(prompt) :].tolist())
    try:
        engine = build_engine(tiny(config), "torch")
    except Unsupported:
        return
    found = generated(engine, [request(prompt, row, SAMPLING) for row, prompt in enumerate(both)])
    assert [found[0], found[1]] == expected


# The loader.


def job(path: Path, **values: Any) -> Job:
    return Job(
        **{"model": str(path), "corpus": ("c",), "device": "cpu", "dtype": "float32", "cache_gib": 0.01, **values}
    )


@pytest.fixture(scope="module")
def tiny_bloom(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_model(tmp_path_factory.mktemp("tiny-bloom"), "bloom")


def test_of_a_supported_model_the_loader_makes_a_native_engine(tiny_model: Path) -> None:
    assert isinstance(Loader().load(job(tiny_model, engine="native"), tiny_model, PLACE).engine, NativeEngine)


def test_asked_for_hf_the_loader_makes_that(tiny_model: Path) -> None:
    assert isinstance(Loader().load(job(tiny_model, engine="hf"), tiny_model, PLACE).engine, HFEngine)


def test_of_an_unsupported_model_the_loader_makes_an_hf_engine_and_says_why(
    tiny_bloom: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING, "hpc"):
        replica = Loader().load(job(tiny_bloom, engine="native"), tiny_bloom, PLACE)
    assert isinstance(replica.engine, HFEngine)
    assert "does not support this model: its attention cannot be replaced; the hf engine generates" in caplog.text


@pytest.mark.parametrize("kind", ["tiny_model", "tiny_bloom"])
def test_what_the_loaders_engine_generates_is_what_plain_generate_gives(
    kind: str, request: pytest.FixtureRequest
) -> None:
    path: Path = request.getfixturevalue(kind)
    engine = Loader().load(job(path, engine="native"), path, PLACE).engine
    sampling = SamplingParams(max_new_tokens=8, ignore_eos=True)
    found = generated(engine, [_request(prompt, row, sampling) for row, prompt in enumerate(PROMPTS)])
    plain = Plain(path)
    assert [found[row] for row in range(3)] == [plain.generate(prompt, 8) for prompt in PROMPTS]


def test_a_model_that_the_self_test_refuses_is_loaded_anew_for_hf(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = make_tiny_model(tmp_path, "llama")
    model = hf.AutoModelForCausalLM.from_pretrained(path)
    with torch.no_grad():  # logits that are no numbers equal nothing
        model.get_input_embeddings().weight[7] = torch.nan
    model.save_pretrained(path)
    with caplog.at_level(logging.WARNING, "hpc"):
        engine = Loader().load(job(path, engine="native"), path, PLACE).engine
    found = generated(engine, [_request([5, 6, 8], 0, SamplingParams(max_new_tokens=8, ignore_eos=True))])
    assert (isinstance(engine, HFEngine), found[0]) == (True, Plain(path).generate([5, 6, 8], 8))


def test_a_model_that_the_self_test_has_changed_is_gone_before_it_is_loaded_anew(tmp_path: Path) -> None:
    path = make_tiny_model(tmp_path, "llama")
    model = hf.AutoModelForCausalLM.from_pretrained(path)
    with torch.no_grad():
        model.get_input_embeddings().weight[7] = torch.nan
    model.save_pretrained(path)
    del model
    alive: list[int] = []
    before = models_alive()

    def note(frame: Any, event: str, _: Any) -> None:
        if event == "call" and frame.f_code is load.__code__:
            alive.append(models_alive() - before)

    sys.setprofile(note)
    try:
        Loader().load(job(path, engine="native"), path, PLACE)
    finally:
        sys.setprofile(None)
    assert alive == [0, 0]


def models_alive() -> int:
    gc.collect()
    return sum(type(thing) is hf.LlamaForCausalLM for thing in gc.get_objects())


_request = request


def packed_by(dtype: torch.dtype, deterministic: bool) -> set[type]:
    """Return what has packed the linear layers of a llama on this CPU."""
    engine = build_engine(tiny(CONFIGS["llama"], dtype), "kernel", replace(ROOMY, deterministic=deterministic))
    return {type(module.linears) for module in engine._model.modules() if isinstance(module, PackedLinear)}


@pytest.mark.parametrize(("dtype", "deterministic"), [(torch.float32, False), (torch.bfloat16, True)], ids=str)
def test_what_must_not_depend_on_the_batch_is_computed_by_the_kernel(dtype: torch.dtype, deterministic: bool) -> None:
    assert packed_by(dtype, deterministic) == {Kernel}


def test_where_the_kernel_multiplies_bfloat16_it_computes_all_of_a_model() -> None:
    kernel = kernel_of("kernel")
    if kernel is None or not kernel.has_bfloat16 or OneDnn().has_amx:
        pytest.skip("this CPU has no AVX512-BF16, or AMX")
    assert packed_by(torch.bfloat16, False) == {Kernel}
