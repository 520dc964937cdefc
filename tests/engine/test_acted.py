"""The GPU path of the native engine on an acted GPU: right tokens, and every refusal dealt with before a request."""

import logging
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from hpc.engine.admission import REFILL
from hpc.engine.cache import Cache
from hpc.engine.form import AttentionSpec, KVShape
from hpc.engine.layers.attention import AttentionMetadata, Span, Unsupported, attend, flash_spans, lacks_flash
from hpc.engine.memory import MARGIN, SHARE
from hpc.engine.native.build import build_native
from hpc.engine.native.engine import NativeEngine
from hpc.engine.native.limits import EngineLimits
from hpc.engine.native.trial import trial
from hpc.model.device import resolve_device, resolve_dtype
from hpc.model.load import load
from tests.engine.acted import Gpu, Pretended, acted, engine_on_gpu, prepared
from tests.engine.acted_workloads import BEHIND, FEW, HEADER, NEW, PROMPTS, SOME, WORKLOADS, asks, check
from tests.engine.models import CONFIGS, WINDOWED, greedy_of, tiny
from tests.engine.oracle import generated, grow, letters
from tests.fakes import ListSource

QUICK = ("slots used again", "a shared prefix", "each sampled in its own way, fixed sizes")
KINDS = ("llama", "gemma2", "mixtral")
GREEDY = asks(PROMPTS)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", QUICK)
def test_an_acted_gpu_gives_what_the_cpu_gives(kind: str, name: str) -> None:
    assert check(kind, WORKLOADS[name], 3, 0) == ""


def test_greedy_output_on_an_acted_gpu_equals_plain_generate() -> None:
    with engine_on_gpu("llama", FEW) as (engine, _):
        assert generated(engine, GREEDY) == expected()


def expected() -> dict[Any, list[int]]:
    return {row: greedy_of("llama", prompt, 8) for row, prompt in enumerate(PROMPTS)}


# Shared prefixes.


def test_prefixes_that_are_read_where_they_lie_give_what_the_cpu_gives() -> None:
    assert check("llama", WORKLOADS["prefixes that are read where they lie"], 3, 0) == ""


def test_a_prefix_is_read_once_for_all_of_its_rows_in_replayed_steps_too() -> None:
    runs = []

    def note(*values: Any, **others: Any) -> Any:
        if not values[8]:  # not causal
            runs.append((len(values[0]), tuple(int(n) for n in others["seqused_k"] if n)))
        return own(*values, **others)

    with engine_on_gpu("llama", replace(SOME, share_from=20)) as (engine, gpu):
        own, gpu.flash.attend = gpu.flash.attend, note
        run = engine.begin()
        source = ListSource(asks(BEHIND, cut=len(HEADER)))
        before = gpu.captured
        while run.busy or not source.exhausted:
            run.step(source)
    assert gpu.captured == before + 1
    assert set(runs) == {(len(HEADER) + sum(map(len, BEHIND)) - 5 * len(HEADER), (43,)), (8, (43,))}


@pytest.mark.parametrize(
    ("kind", "deterministic", "factor", "expected", "words"),
    [
        ("llama", False, 1.0, 20, ""),
        ("llama", True, 1.0, None, ""),
        ("gemma3", False, 1.0, None, ""),
        ("llama", False, 1.5, None, "each sequence has a copy"),
    ],
)
def test_prefixes_are_read_where_they_lie_if_that_is_right(
    kind: str, deterministic: bool, factor: float, expected: int | None, words: str, caplog: pytest.LogCaptureFixture
) -> None:
    with half_on_gpu(kind) as (model, gpu):
        own = gpu.flash.attend
        gpu.flash.attend = lambda *values, **others: [
            part * (1.0 if values[8] else factor) for part in own(*values, **others)
        ]
        engine = built(model, replace(SOME, share_from=20, deterministic=deterministic))
    assert engine._limits.share_from == expected
    assert words in caplog.text


# What attention asks of FlashAttention.


def test_in_decoding_steps_the_heads_of_a_group_are_folded_and_keys_are_split() -> None:
    with engine_on_gpu("llama", FEW) as (engine, gpu):
        graphs = engine.begin()._graphs
        before = gpu.flash.calls, gpu.flash.folded
        assert graphs is not None
        with torch.inference_mode():
            graphs.run(torch.zeros(3, dtype=torch.int64), np.array([[0, 1, 5, 64 * row, 0, 0] for row in range(3)]))
        after = gpu.flash.calls, gpu.flash.folded
    assert (after[0] - before[0], after[1] - before[1]) == (2, 2)


def test_with_fixed_sizes_prompts_of_any_length_are_computed_alike() -> None:
    seen = set()

    def note(*values: Any, **others: Any) -> Any:
        seen.add(values[5:7])
        return own(*values, **others)

    with engine_on_gpu("llama", replace(FEW, deterministic=True)) as (engine, gpu):
        own, gpu.flash.attend = gpu.flash.attend, note
        generated(engine, GREEDY)
    assert seen == {(512, 1024), (1, 1024)}


def test_rows_that_only_fill_a_step_up_come_out_of_attention_as_zeros() -> None:
    layout = {0: KVShape((2, 16), (2, 16))}
    q, k = torch.ones(1, 4, 8, 16), torch.ones(1, 2, 8, 16)
    module = torch.nn.Module()
    module.layer_idx = 0  # type: ignore[assignment]
    with acted() as gpu:
        cache = Cache(layout, 64, torch.float32, gpu.device, 0)
        spans = [Span(0, 5, 0, 0, 0, 0)]
        step = AttentionMetadata(cache, spans, flash=flash_spans(np.array(spans), gpu.device))
        out = attend(module, q, k, k, None, engine=step)[0]
    assert (out[0, :5].sum(), out[0, 5:].abs().sum()) == (5 * 4 * 16, 0)


@pytest.mark.parametrize(
    ("form", "lack"),
    [
        (AttentionSpec(KVShape((2, 64), (2, 64)), 1.0, 0, 0.0, None), ""),
        (AttentionSpec(KVShape((2, 256), (2, 256)), 1.0, 13, 0.0, None), ""),
        (AttentionSpec(KVShape((2, 64), (2, 64)), 1.0, 0, 30.0, None), "capped scores"),
        (AttentionSpec(KVShape((2, 64), (2, 64)), 1.0, 0, 0.0, torch.zeros(2)), "sinks"),
        (
            AttentionSpec(KVShape((2, 192), (2, 128)), 1.0, 0, 0.0, None),
            "values of another size than keys (192 and 128)",
        ),
        (
            AttentionSpec(KVShape((2, 20), (2, 20)), 1.0, 0, 0.0, None),
            "heads of 20 numbers: up to 256, and a multiple of 8",
        ),
        (
            AttentionSpec(KVShape((2, 264), (2, 264)), 1.0, 0, 0.0, None),
            "heads of 264 numbers: up to 256, and a multiple of 8",
        ),
    ],
)
def test_what_flash_attention_has_not_is_named(form: AttentionSpec, lack: str) -> None:
    assert lacks_flash(form) == lack


@pytest.mark.parametrize("softcap", [None, 30.0])
def test_attention_of_which_the_host_knows_no_spans_raises_where_it_would_give_zeros(softcap: float | None) -> None:
    cache = Cache({0: KVShape((2, 16), (2, 16))}, 64, torch.float32, torch.device("cpu"), 0)
    q, module = torch.ones(1, 2, 1, 16), torch.nn.Module()
    module.layer_idx = 0  # type: ignore[assignment]
    flash = None if softcap is None else flash_spans(np.array([[0, 1, 0, 0, 0, 0]]), torch.device("cpu"))
    with pytest.raises(Unsupported):
        attend(module, q, q, q, None, engine=AttentionMetadata(cache, [], flash=flash), softcap=softcap)


# What is tried before anything is generated.


@contextmanager
def half_on_gpu(kind: str = "llama", **values: Any) -> Iterator[tuple[Pretended, Gpu]]:
    with acted(**values) as gpu:
        yield Pretended(tiny({**CONFIGS, **WINDOWED}[kind], torch.bfloat16), gpu), gpu


def built(model: Any, limits: EngineLimits = SOME) -> NativeEngine:
    return build_native(model, (), letters, limits, None)


def test_a_model_in_half_precision_gets_flash_attention_and_graphs() -> None:
    with half_on_gpu() as (model, gpu):
        engine = built(model)
        assert (engine.flash, engine.graphs, gpu.flash.calls > 0, gpu.replayed) == (True, True, True, 1)


@pytest.mark.parametrize(
    ("kind", "capability", "rocm", "words"),
    [
        ("gemma2", (9, 0), False, "capped scores"),
        ("gpt_oss", (9, 0), False, "sinks"),
        ("llama", (7, 5), False, "compute capability 8 or more, and this one has 7"),
        ("llama", (9, 4), True, "ROCm"),
    ],
)
def test_where_flash_attention_is_known_to_be_missing_it_is_not_tried(
    kind: str, capability: tuple[int, int], rocm: bool, words: str, caplog: pytest.LogCaptureFixture
) -> None:
    with half_on_gpu(kind, rocm=rocm) as (model, gpu):
        gpu.flash.capability = capability
        engine = built(model)
    assert (engine.flash, engine.graphs, gpu.flash.calls) == (False, False, 0)
    assert [words in record.message for record in caplog.records] == [True]


def warnings_of(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING]


def test_in_float32_a_gpu_attends_with_torch_and_warns_of_nothing(caplog: pytest.LogCaptureFixture) -> None:
    with acted() as gpu:
        engine = built(Pretended(tiny(CONFIGS["llama"]), gpu))
    assert (engine.flash, engine.graphs, warnings_of(caplog)) == (False, False, [])


def test_what_is_tried_is_tried_on_the_models_device_whichever_is_current() -> None:
    with half_on_gpu(index=3, current=0) as (model, gpu):
        engine = built(model)
    assert (engine.flash, engine.graphs, gpu.empty_captures) == (True, True, 0)


def test_a_flash_attention_that_refuses_is_found_before_it_is_needed(caplog: pytest.LogCaptureFixture) -> None:
    with half_on_gpu() as (model, gpu):
        gpu.flash.refuses = "no kernel image is available for execution on the device"
        engine = built(model)
        assert [one.error for one in grow(engine, ListSource(GREEDY))] == [None] * len(GREEDY)
    assert (engine.flash, engine.graphs) == (False, False)
    assert ["no kernel image" in message for message in warnings_of(caplog)] == [True]


def test_a_flash_attention_that_computes_something_else_is_found_out(caplog: pytest.LogCaptureFixture) -> None:
    with half_on_gpu() as (model, gpu):
        own = gpu.flash.attend
        gpu.flash.attend = lambda *values, **others: [part * 1.5 for part in own(*values, **others)]
        engine = built(model)
    assert (engine.flash, engine.graphs, len(warnings_of(caplog))) == (False, False, 1)
    assert "its logits differ" in caplog.text


@contextmanager
def looking(model: Any) -> Iterator[None]:
    """Let a layer look at a number on the host, as experts do that need a size."""
    handle = model.model.layers[0].register_forward_hook(lambda module, args, output: looks(output))
    try:
        yield
    finally:
        handle.remove()


def looks(output: Any) -> None:
    (output[0] if isinstance(output, tuple) else output).sum().item()


def test_a_layer_that_waits_is_found_before_a_capture_is_begun(caplog: pytest.LogCaptureFixture) -> None:
    with half_on_gpu() as (model, gpu), looking(model.model):
        engine = built(model)
        assert (engine.flash, engine.graphs, gpu.captured) == (True, False, 0)
    assert ["graphs are off" in message for message in warnings_of(caplog)] == [True]


@pytest.mark.parametrize("waits", [False, True])
def test_requests_wait_for_others_to_begin_with_only_where_steps_are_replayed(waits: bool) -> None:
    with half_on_gpu() as (model, _), looking(model.model) if waits else nullcontext():
        assert built(model, replace(SOME, refill=REFILL)).bounds.refill == (0.0 if waits else REFILL)


def test_a_capture_that_fails_fails_no_request(caplog: pytest.LogCaptureFixture) -> None:
    with engine_on_gpu("llama", FEW) as (engine, _), looking(prepared("llama")[0]):
        assert generated(engine, GREEDY) == expected()
    assert ["graphs are off" in message for message in warnings_of(caplog)] == [True]


def test_a_capture_that_fails_while_rows_decode_fails_no_request(caplog: pytest.LogCaptureFixture) -> None:
    with engine_on_gpu("llama", FEW) as (engine, _):
        engine.begin()._graphs.drop(3)  # as when memory was short: they are captured anew when they are wanted
        with looking(prepared("llama")[0]):
            assert generated(engine, GREEDY) == expected()
    assert ["graphs are off" in message for message in warnings_of(caplog)] == [True]


def test_a_graph_for_which_there_is_no_memory_fails_no_request(caplog: pytest.LogCaptureFixture) -> None:
    with engine_on_gpu("llama", FEW) as (engine, gpu):
        engine.begin()._graphs.drop(3)

        def short(*given: Any) -> None:
            if gpu.recorder:  # a capture, or the trial before it
                raise torch.cuda.OutOfMemoryError("CUDA out of memory: a graph")

        handle = prepared("llama")[0].register_forward_pre_hook(short)
        try:
            assert generated(engine, GREEDY[:1]) == {0: expected()[0]}
        finally:
            handle.remove()
    assert ["graphs are off" in message for message in warnings_of(caplog)] == [True]


def test_where_no_graph_can_be_captured_no_request_waits_for_others_to_begin_with() -> None:
    with engine_on_gpu("llama", replace(FEW, refill=1.0)) as (engine, _), looking(prepared("llama")[0]):
        run = engine.begin()
        source = ListSource([*asks(PROMPTS[:1], max_new_tokens=2), *asks(PROMPTS[:3])])
        together = 0
        while run.busy or not source.exhausted:
            run.step(source)
            together = max(together, sum(row.limit == NEW for row in run.scheduler.rows))
    assert together == 3


# Memory.


@pytest.mark.parametrize("deterministic", [False, True])
def test_when_a_gpu_has_too_little_memory_for_a_step_all_requests_still_complete(
    deterministic: bool, caplog: pytest.LogCaptureFixture
) -> None:
    with engine_on_gpu("llama", replace(SOME, deterministic=deterministic)) as (engine, _):
        engine._model.most_tokens = 100
        assert generated(engine, GREEDY) == expected()
    assert ("fixed sizes" in caplog.text) == deterministic


def test_with_fixed_sizes_a_request_that_does_not_fit_in_memory_alone_is_the_only_error() -> None:
    with engine_on_gpu("llama", replace(SOME, deterministic=True)) as (engine, _):
        engine._model.most_tokens = 70
        errors = [(one.request.id, one.error) for one in grow(engine, ListSource(GREEDY)) if one.error]
    assert errors == [(7, "it does not fit in memory, even alone")]


def test_a_request_that_does_not_fit_takes_the_graphs_from_no_other() -> None:
    with engine_on_gpu("llama", SOME) as (engine, gpu):
        engine._model.most_tokens = 70
        requests = asks([PROMPTS[7], *PROMPTS[:4]])  # the first has 77 tokens
        errors = [one.request.id for one in grow(engine, ListSource(requests)) if one.error]
    assert (errors, gpu.replayed >= NEW - 1) == ([0], True)


def test_a_second_run_of_an_engine_captures_nothing_anew() -> None:
    with engine_on_gpu("llama", FEW) as (engine, gpu):
        generated(engine, GREEDY)
        before = gpu.captured
        assert (generated(engine, GREEDY), gpu.captured) == (expected(), before)


def test_graphs_are_captured_at_the_start_the_largest_first() -> None:
    with engine_on_gpu("llama", SOME) as (engine, gpu):
        engine.begin()
        rows = [graph.rows for graph in gpu.graphs]
    assert rows == [8, 4, 2, 1]


def test_the_cache_of_a_gpu_has_what_the_largest_step_leaves() -> None:
    with half_on_gpu() as (model, gpu):
        gpu.peak = 7 << 30
        engine = built(model, replace(SOME, cache_bytes=0))
        assert gpu.rows == gpu.graphs[-1].rows == 8
    assert engine._limits.cache_bytes == gpu.free - gpu.peak - int(MARGIN * gpu.total)


def test_where_the_largest_step_does_not_fit_a_cache_has_its_share_all_the_same() -> None:
    with half_on_gpu() as (model, gpu):
        model.most_tokens = 900
        engine = built(model, replace(SOME, cache_bytes=0))
    assert engine._limits.cache_bytes == int(gpu.free * SHARE / 2)


@pytest.mark.parametrize(("capability", "dtype"), [((8, 0), "bfloat16"), ((7, 0), "float16"), ((7, 5), "float16")])
def test_where_bfloat16_is_emulated_the_dtype_auto_is_float16(capability: tuple[int, int], dtype: str) -> None:
    with acted() as gpu:
        gpu.flash.capability = capability
        assert resolve_dtype("auto", "auto") == dtype


@pytest.mark.parametrize(("devices", "index", "expected"), [(1, 0, 0), (1, 3, 0), (4, 3, 3)])
def test_a_rank_takes_the_only_gpu_that_it_sees_or_its_own_of_several(devices: int, index: int, expected: int) -> None:
    with acted(devices=devices):
        assert resolve_device("auto", index) == torch.device("cuda", expected)


def test_a_ranks_device_is_current_before_its_model_is_loaded(tiny_model: Path) -> None:
    with acted(3, 0) as gpu, suppress(AssertionError, RuntimeError):  # a torch for CPUs loads nothing onto a GPU
        load(tiny_model, gpu.device, "float32", threads=1)
    assert gpu.current == 3


def test_a_rank_for_which_there_is_no_gpu_is_refused() -> None:
    with acted(devices=2), pytest.raises(ValueError, match="rank 3 of its node, and torch sees 2 GPUs"):
        resolve_device("auto", 2)


# Time.


def test_the_step_log_charges_each_step_with_its_own_time() -> None:
    with engine_on_gpu("llama", SOME) as (engine, _):
        generated(engine, asks([PROMPTS[7] * 5, PROMPTS[0]]))
    found = [(tokens, round(seconds, 3)) for tokens, *_, seconds in engine.steps.samples]
    filled = [next(n for n in (1, 2, 4, 8, 400) if n >= tokens) / 1000 for tokens, _ in found]  # 392, in rows of 16
    assert len(found) == engine.steps.totals.steps > 7
    assert [seconds for _, seconds in found] == filled


def test_a_trial_measures_what_the_device_takes_and_not_what_launching_does() -> None:
    with engine_on_gpu("llama", EngineLimits(4, 64, 8 << 20, context_tokens=256)) as (engine, _):
        engine._model.second_per_token = 100.0
        found = trial(engine, 30.0)
    assert {round(seconds) for tokens, _, pairs, _, seconds in found if not pairs} == {100, 200, 400}
    assert {round(seconds) for tokens, _, pairs, _, seconds in found if pairs} == {1600, 6400}
