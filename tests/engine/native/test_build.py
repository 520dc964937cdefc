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

from hpc.engine.hf import HFEngine
from hpc.engine.kernel.kernel import Kernel
from hpc.engine.kernel.onednn import OneDnn
from hpc.engine.layers.attention import Unsupported
from hpc.engine.layers.fused import PackedLinear
from hpc.engine.native.build import build_native, check_supported, prepare, unsupported
from hpc.engine.native.engine import NativeEngine
from hpc.job import Job
from hpc.model.load import configuration, load
from hpc.model.loader import Loader
from hpc.mpi.binding import Binding
from hpc.sampling_params import SamplingParams
from tests.conftest import make_tiny_model
from tests.engine.models import (
    CONFIGS,
    ROOMY,
    VOCABULARY,
    WAYS,
    build_engine,
    kernel_of,
    plain_of,
    tiered,
    tiny,
    with_rope,
)
from tests.engine.oracle import Plain, generated, letters, prompts, request

SMALL: dict[str, Any] = {"vocab_size": VOCABULARY, "hidden_size": 64, "bos_token_id": None, "eos_token_id": None}
PLACE = Binding(host="here", local_rank=0, ranks_on_node=1, threads=1)
PROMPTS = prompts((3, 20, 40))
SAMPLING = SamplingParams(max_new_tokens=8)


def reason_of(model: Any, way: str = "torch") -> str:
    with pytest.raises(Unsupported) as caught:
        build_native(model, (), letters, ROOMY, kernel_of(way))
    return str(caught.value)


def test_a_model_whose_attention_cannot_be_replaced_is_unsupported() -> None:
    xglm = tiny(hf.XGLMConfig(vocab_size=VOCABULARY, d_model=64, ffn_dim=96, num_layers=2, attention_heads=4))
    assert reason_of(xglm) == "its attention cannot be replaced"


def test_a_recurrent_model_is_unsupported() -> None:
    mamba = tiny(hf.MambaConfig(**SMALL, num_hidden_layers=2, state_size=8), scale=1.0)
    assert reason_of(mamba) == "it has layers of linear_attention"


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


@pytest.mark.parametrize("kind", tiered(CONFIGS))
def test_the_architectures_of_the_tests_are_declared_as_supported(kind: str) -> None:
    model = tiny(CONFIGS[kind])
    check_supported(model, 512)


@pytest.mark.parametrize("kind", tiered(CONFIGS))
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
@pytest.mark.parametrize("way", WAYS)
def test_positions_whose_frequencies_no_sequence_is_long_enough_to_change_are_right(rope: str, way: str) -> None:
    both = prompts((20, 56))
    expected = plain_of(tiny(with_rope(rope)), both, 8)
    engine = build_engine(tiny(with_rope(rope)), way, replace(ROOMY, context_tokens=64))
    found = generated(engine, [request(prompt, row, SAMPLING) for row, prompt in enumerate(both)])
    assert [found[0], found[1]] == expected


@pytest.mark.parametrize("rope", ["dynamic", "longrope"])
def test_positions_whose_frequencies_change_as_a_sequence_grows_are_unsupported(rope: str) -> None:
    with pytest.raises(Unsupported, match="grows beyond 64 tokens, and its sequences may have 65"):
        build_engine(tiny(with_rope(rope)), "torch", replace(ROOMY, context_tokens=65))


# The loader.


def job(path: Path, **values: Any) -> Job:
    return Job(
        **{"model": str(path), "corpus": ("c",), "device": "cpu", "dtype": "float32", "cache_gib": 0.01, **values}
    )


@pytest.fixture(scope="module")
def tiny_xglm(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_model(tmp_path_factory.mktemp("tiny-xglm"), "xglm")


def test_of_a_supported_model_the_loader_makes_a_native_engine(tiny_model: Path) -> None:
    assert isinstance(Loader().load(job(tiny_model, engine="native"), tiny_model, PLACE).engine, NativeEngine)


def test_asked_for_hf_the_loader_makes_that(tiny_model: Path) -> None:
    assert isinstance(Loader().load(job(tiny_model, engine="hf"), tiny_model, PLACE).engine, HFEngine)


def test_of_an_unsupported_model_the_loader_makes_an_hf_engine_and_says_why(
    tiny_xglm: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING, "hpc"):
        replica = Loader().load(job(tiny_xglm, engine="native"), tiny_xglm, PLACE)
    assert isinstance(replica.engine, HFEngine)
    assert "does not support this model: its attention cannot be replaced; the hf engine generates" in caplog.text


def test_support_is_told_from_configuration_and_class_alone(tmp_path: Path, tiny_xglm: Path) -> None:
    (tmp_path / "config.json").write_bytes((tiny_xglm / "config.json").read_bytes())
    assert unsupported(configuration(tmp_path), 512) == "its attention cannot be replaced"


def test_a_model_whose_frequencies_change_within_its_context_is_left_to_the_hf_engine() -> None:
    assert "change when a sequence grows beyond 64" in str(unsupported(with_rope("dynamic"), 65))


def test_a_model_whose_frequencies_change_beyond_its_context_is_the_native_engines() -> None:
    assert unsupported(with_rope("dynamic"), 64) is None


@pytest.mark.parametrize("kind", ["tiny_model", "tiny_xglm"])
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
