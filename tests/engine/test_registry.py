"""Each engine is a line in the registry, and what a job gets follows from a few facts."""

import importlib.util
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast, get_args, get_type_hints

import pytest

from hpc.engine.registry import (
    AUTO,
    ENGINES,
    Checkpoint,
    Choice,
    EngineKind,
    asked_context,
    candidates,
    check_devices,
    choose,
    measurable,
    no_encoder,
)
from hpc.engine.vllm.installed import untested
from hpc.engine_args import Vllm
from hpc.exit import Refusal
from hpc.job import Job

NOT_INSTALLED = untested(None)
REFUSED = "the native engine does not support this model: it has recurrent layers"


def facts(vllm: str | None = None, native: str | None = None) -> Callable[[EngineKind], str | None]:
    """What speaks against an engine on a machine that is not there; hf is not to be asked."""
    reasons = {"vllm": vllm, "native": native}
    return lambda kind: reasons[kind.name]


def job(**values: Any) -> Job:
    return Job("m", ("c.jsonl",), **values)


# Models with an encoder.


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("encoder_decoder", [False, True])
def test_only_hf_generates_with_an_encoder_decoder(engine: str, encoder_decoder: bool) -> None:
    config = SimpleNamespace(is_encoder_decoder=encoder_decoder, model_type="t5")
    reason = no_encoder(ENGINES[engine], config)
    assert (reason is None) == (engine == "hf" or not encoder_decoder)
    assert reason is None or (engine in reason and "t5" in reason)


# What `auto` comes to.


@pytest.mark.parametrize(
    ("device", "vllm", "native", "engine"),
    [
        ("cuda", None, None, "vllm"),
        ("cuda", None, REFUSED, "vllm"),
        ("cuda", NOT_INSTALLED, None, "native"),
        ("cuda", "vLLM 0.32.0 has no XglmForCausalLM", REFUSED, "hf"),
        ("cpu", None, None, "native"),
        ("cpu", None, REFUSED, "hf"),
    ],
)
def test_auto_is_the_first_that_nothing_speaks_against(
    device: str, vllm: str | None, native: str | None, engine: str
) -> None:
    assert choose(AUTO, device, facts(vllm, native)).engine == engine


def test_auto_says_what_speaks_against_those_before() -> None:
    found = choose(AUTO, "cuda", facts(NOT_INSTALLED, REFUSED))
    assert [word for word in (NOT_INSTALLED, REFUSED, "hf", "GPU") if word not in found.reason] == []


def test_auto_says_what_generates_where_nothing_speaks_against_it() -> None:
    reason = choose(AUTO, "cpu", facts()).reason
    assert ("native" in reason, "CPU" in reason) == (True, True)


@pytest.mark.parametrize(("device", "vllm", "native"), [("cpu", None, REFUSED), ("cuda", NOT_INSTALLED, REFUSED)])
def test_it_fell_back_where_no_other_engine_has_the_model(device: str, vllm: str | None, native: str | None) -> None:
    assert choose(AUTO, device, facts(vllm, native)).fell_back


@pytest.mark.parametrize(("device", "vllm"), [("cuda", NOT_INSTALLED), ("cuda", None), ("cpu", None)])
def test_it_did_not_where_one_has(device: str, vllm: str | None) -> None:
    assert not choose(AUTO, device, facts(vllm)).fell_back


def test_on_a_cpu_vllm_is_not_even_looked_for() -> None:
    asked: list[str] = []
    choose(AUTO, "cpu", lambda kind: asked.append(kind.name))
    assert asked == ["native"]


# What a job names.


@pytest.mark.parametrize("name", sorted(ENGINES))
def test_the_engine_that_a_job_names_generates_and_nothing_is_said(name: str) -> None:
    assert choose(name, "cpu", facts()) == Choice(name)


def test_where_native_is_named_and_refuses_hf_generates_and_it_is_said_why() -> None:
    assert choose("native", "cpu", facts(native=REFUSED)) == Choice("hf", f"{REFUSED}; the hf engine generates", True)


def test_a_vllm_that_is_named_is_never_passed_over() -> None:
    assert choose("vllm", "cuda", facts(vllm=NOT_INSTALLED)).engine == "vllm"


# A model on several devices.


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_a_model_on_several_devices_is_for_vllm(device: str) -> None:
    found = choose(AUTO, device, facts(), devices=2)
    assert (found.engine, "on 2 devices" in found.reason, found.fell_back) == ("vllm", True, False)


def test_where_vllm_cannot_there_is_no_other_engine_for_several_devices() -> None:
    with pytest.raises(Refusal, match=r"on 2 devices .* vllm engine alone, and vLLM is not installed; pip install"):
        choose(AUTO, "cuda", facts(NOT_INSTALLED), devices=2)


@pytest.mark.parametrize("name", ["native", "hf"])
@pytest.mark.parametrize("asked", [{"replica_gpus": 2}, {"replica_cpus": 3, "device": "cpu"}])
def test_an_engine_that_keeps_a_model_on_one_device_is_refused_more(name: str, asked: dict[str, Any]) -> None:
    flag, count = next(iter(asked.items()))
    with pytest.raises(Refusal, match=rf"--{flag.replace('_', '-')} is {count}, and the {name} .*--engine vllm"):
        check_devices(job(engine=name, **asked))


@pytest.mark.parametrize("name", [AUTO, "vllm"])
def test_others_are_not(name: str) -> None:
    check_devices(job(engine=name, replica_gpus=2))


@pytest.mark.parametrize(("heads", "devices", "said"), [(9, 2, "1, 3, 9 can"), (14, 4, "1, 2, 7, 14 can")])
def test_heads_that_devices_cannot_share_speak_against_vllm(
    played_vllm: Callable[..., None], heads: int, devices: int, said: str
) -> None:
    played_vllm("0.32.0")
    found = against_vllm(heads=heads, replica_gpus=devices)
    assert found == f"the model has {heads} attention heads, which {devices} devices cannot share evenly; {said}"


def test_heads_of_keys_and_values_that_devices_cannot_share_speak_against_vllm(
    played_vllm: Callable[..., None],
) -> None:
    played_vllm("0.32.0")
    found = against_vllm(heads=24, kv_heads=8, replica_gpus=3)
    assert found is not None
    assert "24 attention heads and 8 of keys and values, which 3 devices" in found
    assert found.endswith("1, 2, 4, 8, 24 can")


def test_heads_that_they_can_share_do_not(played_vllm: Callable[..., None]) -> None:
    played_vllm("0.32.0")
    assert against_vllm(heads=9, replica_gpus=3) is None


# What speaks against vLLM on a machine.

PLAYED = {
    "__init__": "class ModelRegistry:\n    get_supported_archs = staticmethod(lambda: {'LlamaForCausalLM'})\n",
    "platforms": "class current_platform:\n    is_cpu = staticmethod(lambda: KIND == 'cpu')\n",
}


@pytest.fixture
def played_vllm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[str, str], None]]:
    """What installs a vLLM of a version, built for a kind of device, that has one model and starts nothing."""
    if importlib.util.find_spec("vllm") is not None:
        pytest.skip("a real vLLM is installed here")
    before = dict(os.environ)

    def install(version: str, kind: str = "cuda") -> None:
        for name, text in PLAYED.items():
            (tmp_path / "vllm").mkdir(exist_ok=True)
            (tmp_path / "vllm" / f"{name}.py").write_text(f"KIND = {kind!r}\n{text}")
        found = tmp_path / f"vllm-{version}.dist-info"
        found.mkdir()
        (found / "METADATA").write_text(f"Metadata-Version: 2.1\nName: vllm\nVersion: {version}\n")
        monkeypatch.syspath_prepend(str(tmp_path))

    yield install
    for name in [name for name in sys.modules if name.split(".")[0] == "vllm"]:
        del sys.modules[name]
    os.environ.clear()
    os.environ.update(before)


def against_vllm(
    architecture: str = "LlamaForCausalLM", heads: int = 4, kv_heads: int | None = None, **values: Any
) -> str | None:
    """What speaks against vLLM on a machine with a GPU that this process does not see."""
    config = SimpleNamespace(architectures=[architecture], num_attention_heads=heads, num_key_value_heads=kv_heads)
    config.get_text_config = lambda: config
    asked = SimpleNamespace(job=job(device="cuda", **values), path=Path("m"), config=config, cuda=True)
    return ENGINES["vllm"].maker.supports(cast("Checkpoint", asked))


def test_without_vllm_it_is_said_how_to_install_it() -> None:
    if importlib.util.find_spec("vllm") is not None:
        pytest.skip("a real vLLM is installed here")
    assert against_vllm() == NOT_INSTALLED


def test_nothing_speaks_against_a_tested_vllm_that_has_the_model(played_vllm: Callable[..., None]) -> None:
    played_vllm("0.32.0")
    assert against_vllm() is None


def test_a_model_that_vllm_does_not_have_is_named(played_vllm: Callable[..., None]) -> None:
    played_vllm("0.32.0")
    assert against_vllm("XglmForCausalLM") == "vLLM 0.32.0 has no XglmForCausalLM"


def test_a_vllm_that_was_not_tested_is_not_imported(played_vllm: Callable[..., None]) -> None:
    played_vllm("0.11.0")
    assert "vLLM 0.11.0 is installed" in str(against_vllm())
    assert "vllm" not in sys.modules


def test_a_vllm_for_cpus_does_not_generate_on_a_gpu(played_vllm: Callable[..., None]) -> None:
    played_vllm("0.32.0", "cpu")
    said = against_vllm()
    assert said is not None
    assert ("0.32.0" in said, "CPU" in said) == (True, True)


def test_a_vllm_that_cannot_be_imported_is_passed_over(played_vllm: Callable[..., None], tmp_path: Path) -> None:
    played_vllm("0.32.0")
    (tmp_path / "vllm/__init__.py").write_text("raise ImportError('no libcuda')\n")
    said = against_vllm()
    assert said is not None
    assert "no libcuda" in said


def test_numbers_that_must_not_depend_on_the_batch_are_not_asked_of_vllm(played_vllm: Callable[..., None]) -> None:
    played_vllm("0.32.0")
    assert against_vllm(deterministic=True) == "vLLM knows no --deterministic"


# The registry.


def test_the_job_knows_the_engines_and_auto() -> None:
    assert set(get_args(get_type_hints(Job)["engine"])) == {AUTO, *ENGINES}


def test_auto_is_the_default() -> None:
    assert job().engine == AUTO


def test_the_last_engine_is_for_every_device_and_has_no_fallback() -> None:
    last = list(ENGINES.values())[-1]
    assert (last.auto_on, last.fallback, last.optional) == (("cpu", "cuda"), "", False)


@pytest.mark.parametrize("name", sorted(ENGINES))
def test_an_engine_is_made_in_the_engine_package(name: str) -> None:
    assert ENGINES[name].module.startswith("hpc.engine.")
    assert callable(ENGINES[name].maker.load)


@pytest.mark.parametrize(("asked", "names"), [(AUTO, ("vllm", "native")), ("native", ("native",)), ("hf", ())])
def test_what_can_have_been_measured_for_a_job_is_what_may_generate(asked: str, names: tuple[str, ...]) -> None:
    assert measurable(asked) == names


@pytest.mark.parametrize(("engine", "context"), [("auto", 64), ("vllm", 64), ("native", None), ("hf", None)])
def test_the_context_asked_of_vllm_holds_where_vllm_may_generate(engine: str, context: int | None) -> None:
    assert asked_context(job(engine=engine, vllm=Vllm(max_model_len=64))) == context


def test_the_candidates_of_a_named_engine_are_it_and_its_fallback() -> None:
    assert [[kind.name for kind in candidates(name)] for name in ("native", "hf", "vllm")] == [
        ["native", "hf"], ["hf"], ["vllm"],
    ]  # fmt: skip


def test_the_registry_imports_no_engine() -> None:
    code = "import sys, hpc.engine.registry; print(sorted({'torch', 'transformers'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60).stdout == "[]\n"
