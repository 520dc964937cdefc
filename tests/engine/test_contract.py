"""What every engine keeps to, be it an echo, transformers, our own or vLLM.

With vLLM in the environment of `make test-vllm`; elsewhere its cases are skipped.
"""

import functools
import importlib.util
import itertools
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from hpc.engine.interface import Engine
from hpc.engine.sequence import Sequence as Grown
from hpc.request import Request
from hpc.sampling_params import SamplingParams
from hpc.trim import Decode, trim
from tests.engine.oracle import CPU, Plain, Steps, grow, letters, load_engine, prompts, request
from tests.fakes import EchoEngine, ListSource, Spelled

MakeEngine = Callable[..., Engine]
SEQS = 4
NEW = 16


def needs_vllm() -> None:
    """Skip a test where there is no vLLM."""
    if importlib.util.find_spec("vllm") is None:
        pytest.skip("vLLM is not installed here; `make test-vllm` has an environment with it")


@functools.cache
def started(path: Path) -> Any:
    """Start vLLM, once: a process has room for one."""
    from hpc.engine.vllm.load import engine_arguments, start_vllm
    from hpc.engine_args import Vllm

    return start_vllm(engine_arguments(path, "float32", SEQS, 64 << 20, 512, False, Vllm()), None, 1)


@functools.cache
def native_parts(path: Path) -> Any:
    from hpc.engine.native.build import build_native
    from hpc.model.load import load
    from tests.engine.models import ROOMY, kernel_of

    model = load(path, CPU, "float32", threads=1)
    return model, build_native(model, (), letters, ROOMY, kernel_of("kernel"))


def native(path: Path, eos: Sequence[int], decode: Decode) -> Engine:
    from dataclasses import replace

    from hpc.engine.native.engine import NativeEngine
    from tests.engine.models import ROOMY, kernel_of

    model, built = native_parts(path)
    return NativeEngine(model, built.layouts, eos, decode, replace(ROOMY, max_seqs=SEQS), kernel_of("kernel"))


def vllm(path: Path, eos: Sequence[int], decode: Decode) -> Engine:
    needs_vllm()
    from hpc.engine.vllm.engine import VllmEngine

    return VllmEngine(started(path), eos, decode)


MAKERS: dict[str, Callable[[Path, Sequence[int], Decode], Engine]] = {
    "echo": lambda path, eos, decode: EchoEngine(slots=SEQS),
    "hf": lambda path, eos, decode: load_engine(path, eos=eos, decode=decode),
    "native": native,
    "vllm": vllm,
}


@pytest.fixture(params=MAKERS)
def kind(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def make(kind: str, wide_model: Path) -> MakeEngine:
    """Make an engine of a kind: make(eos=…, decode=…)."""

    def make_engine(eos: Sequence[int] = (), decode: Decode = letters) -> Engine:
        return MAKERS[kind](wide_model, eos, decode)

    return make_engine


def all_of(engine: Engine, requests: Sequence[Request], on_step: Steps | None = None) -> list[Grown]:
    return list(grow(engine, ListSource(requests), on_step))


def tokens_of(engine: Engine, one: Request) -> list[int]:
    [grown] = all_of(engine, [one])
    assert grown.error is None
    return grown.token_ids


def some(count: int, sampling: SamplingParams) -> list[Request]:
    lengths = [(1, 3, 9, 40)[index % 4] for index in range(count)]
    return [request(prompt, index, sampling, 40) for index, prompt in enumerate(prompts(lengths))]


GREEDY = SamplingParams(max_new_tokens=NEW)
DRAWN = SamplingParams(max_new_tokens=NEW, temperature=1.0, top_p=0.9, seed=3)


def test_every_request_ends_exactly_once(make: MakeEngine) -> None:
    ended = all_of(make(), some(11, GREEDY))
    assert sorted(grown.request.row for grown in ended) == list(range(11))
    assert {grown.error for grown in ended} == {None}


def test_an_empty_source_ends_at_once(make: MakeEngine) -> None:
    assert all_of(make(), []) == []


def test_what_is_generated_ends_for_a_reason(make: MakeEngine) -> None:
    for grown in all_of(make(), some(5, GREEDY)):
        kept, _, reason = trim(grown.token_ids, GREEDY, (), letters)
        assert (len(kept), reason) == (NEW, "length")


def test_greedy_tokens_are_those_of_generate(make: MakeEngine, kind: str, wide_model: Path) -> None:
    if kind == "echo":
        pytest.skip("an echo has no model")
    plain = Plain(wide_model)
    for grown in all_of(make(), some(6, GREEDY)):
        assert grown.token_ids == plain.generate(grown.request.token_ids.tolist(), NEW)


@pytest.mark.parametrize("where", [0, 3])
def test_a_stop_token_ends_where_trim_would_have_cut(make: MakeEngine, where: int) -> None:
    engine, prompt = make(), prompts([9])[0]
    whole = tokens_of(engine, request(prompt, 0, GREEDY))
    asked = SamplingParams(max_new_tokens=NEW, stop_token_ids=(whole[where],))
    found = tokens_of(engine, request(prompt, 0, asked))
    assert trim(found, asked, (), letters) == trim(whole, asked, (), letters)
    assert trim(found, asked, (), letters)[2] == "stop"


def test_the_models_end_counts_unless_it_is_ignored(make: MakeEngine) -> None:
    prompt = prompts([9])[0]
    whole = tokens_of(make(), request(prompt, 0, GREEDY))
    engine = make(eos=(whole[2],))
    ignoring = SamplingParams(max_new_tokens=NEW, ignore_eos=True)
    for asked in (GREEDY, ignoring):
        found = tokens_of(engine, request(prompt, 0, asked))
        assert trim(found, asked, (whole[2],), letters) == trim(whole, asked, (whole[2],), letters)


def test_no_ending_token_is_chosen_before_min_new_tokens(make: MakeEngine, kind: str) -> None:
    if kind == "echo":
        pytest.skip("an echo chooses nothing")
    prompt = prompts([9])[0]
    whole = tokens_of(make(), request(prompt, 0, GREEDY))
    asked = SamplingParams(max_new_tokens=NEW, min_new_tokens=5)
    found = tokens_of(make(eos=(whole[0],)), request(prompt, 0, asked))
    assert whole[0] not in found[:5]
    assert trim(found, asked, (whole[0],), letters)[2] is not None


@pytest.mark.parametrize("least", [0, 6])
def test_a_stop_string_ends_where_trim_would_have_cut(make: MakeEngine, least: int) -> None:
    engine, prompt = make(), prompts([9])[0]
    whole = tokens_of(engine, request(prompt, 0, GREEDY))
    asked = SamplingParams(max_new_tokens=NEW, stop=(letters(whole[3:5]), "never"), min_new_tokens=least)
    found = tokens_of(engine, request(prompt, 0, asked))
    assert trim(found, asked, (), letters) == trim(whole, asked, (), letters)


def straddling(token: int) -> bytes:
    """Return the end of a character, a letter, and the beginning of a character that the next token ends."""
    return bytes([0x80 | token & 0x3F, 97 + token % 26, 0xC4 | token >> 3 & 0x0F])


def test_a_stop_string_whose_characters_are_of_two_tokens_ends_where_trim_would_have_cut(make: MakeEngine) -> None:
    text = Spelled(straddling)
    engine, prompt = make(decode=text), prompts([9])[0]
    whole = tokens_of(engine, request(prompt, 0, GREEDY))
    asked = SamplingParams(max_new_tokens=NEW, stop=(text(whole[:6])[3:6],))
    found = tokens_of(engine, request(prompt, 0, asked))
    assert trim(found, asked, (), text) == trim(whole, asked, (), text)
    assert trim(found, asked, (), text)[2] == "stop"


def test_what_is_drawn_depends_on_seed_and_id_alone(make: MakeEngine, kind: str) -> None:
    if kind == "echo":
        pytest.skip("an echo draws nothing")
    engine, requests = make(), some(9, DRAWN)
    together = {grown.request.row: grown.token_ids for grown in all_of(engine, requests)}
    assert [tokens_of(engine, one) for one in requests] == [together[row] for row in range(9)]
    other = SamplingParams(max_new_tokens=NEW, temperature=1.0, top_p=0.9, seed=4)
    assert tokens_of(engine, request(requests[0].token_ids.tolist(), 0, other)) != together[0]


def test_each_sample_of_a_request_ends_once_and_is_another(make: MakeEngine) -> None:
    asked = SamplingParams(max_new_tokens=NEW, temperature=1.0, n=3)
    ended = all_of(make(), [request(prompts([9])[0], 0, asked)])
    assert sorted(grown.sample for grown in ended) == [0, 1, 2]
    assert len({tuple(grown.token_ids) for grown in ended}) == 3


@pytest.mark.parametrize("count", [0, 3])
@pytest.mark.parametrize("stop", [(), ("never",)])
def test_every_token_has_its_log_probability(make: MakeEngine, count: int, stop: tuple[str, ...]) -> None:
    asked = SamplingParams(max_new_tokens=NEW, logprobs=count, stop=stop)
    for grown in all_of(make(), some(3, asked)):
        assert len(grown.logprobs) >= NEW
        for chosen, top in grown.logprobs:
            assert chosen <= 0
            assert len(top) == count
            assert [value for _, value in top] == sorted((value for _, value in top), reverse=True)


def test_log_probabilities_of_greedy_tokens_are_those_of_the_reference(
    make: MakeEngine, kind: str, wide_model: Path
) -> None:
    if kind == "echo":
        pytest.skip("an echo has no model")
    asked = SamplingParams(max_new_tokens=NEW, logprobs=3, repetition_penalty=1.2)
    one = request(prompts([9])[0], 0, asked)
    [expected], [found] = all_of(load_engine(wide_model), [one]), all_of(make(), [one])
    assert found.token_ids == expected.token_ids
    for (chosen, top), (also, others) in zip(found.logprobs, expected.logprobs, strict=True):
        assert chosen == pytest.approx(also, abs=1e-4)
        assert [token for token, _ in top] == [token for token, _ in others]


@pytest.mark.parametrize(
    "values",
    [{"repetition_penalty": 1.5}, {"presence_penalty": 1.5}, {"frequency_penalty": 1.5}, {"frequency_penalty": -1.0}],
)
def test_penalties_choose_what_the_reference_chooses(
    make: MakeEngine, kind: str, wide_model: Path, values: dict[str, float]
) -> None:
    if kind == "echo":
        pytest.skip("an echo chooses nothing")
    asked = SamplingParams(max_new_tokens=NEW, **values)  # type: ignore[arg-type]
    one = request(prompts([9])[0], 0, asked)
    assert tokens_of(make(), one) == tokens_of(load_engine(wide_model), one)


@pytest.mark.parametrize("values", [{"top_k": 1}, {"min_p": 1.0}, {"top_p": 1e-6}])
def test_drawing_from_one_token_is_greedy(make: MakeEngine, kind: str, values: dict[str, Any]) -> None:
    if kind == "echo":
        pytest.skip("an echo draws nothing")
    engine, prompt = make(), prompts([9])[0]
    asked = SamplingParams(max_new_tokens=NEW, temperature=1.0, **values)
    assert tokens_of(engine, request(prompt, 0, asked)) == tokens_of(engine, request(prompt, 0, GREEDY))


def test_told_to_stop_it_ends_with_what_has_ended_and_begins_afresh(make: MakeEngine) -> None:
    engine, requests, steps = make(), some(9, GREEDY), Steps(stop_at=2)
    assert len(all_of(engine, requests, steps)) < 9
    assert steps.count == 2
    assert sorted(grown.request.row for grown in all_of(engine, requests)) == list(range(9))


@pytest.mark.parametrize("at", [1, 3])
def test_what_a_step_raises_is_no_failure_of_a_request(make: MakeEngine, at: int) -> None:
    engine, requests, steps = make(), some(9, GREEDY), itertools.count(1)

    def on_step() -> bool:
        if next(steps) >= at:
            raise OSError("the disk is full")
        return False

    ended: list[Grown] = []
    with pytest.raises(OSError, match="the disk is full"):
        ended.extend(itertools.chain.from_iterable(engine.generate(ListSource(requests), on_step)))
    assert [grown.error for grown in ended] == [None] * len(ended)
    assert sorted(grown.request.row for grown in all_of(engine, requests)) == list(range(9))


def test_closed_it_leaves_nothing_behind(make: MakeEngine) -> None:
    engine = make()
    limits = [SamplingParams(max_new_tokens=count) for count in (2, NEW, NEW, NEW)]
    rows = zip(range(4), prompts([9] * 4), limits, strict=True)
    requests = [request(prompt, row, limit, 40) for row, prompt, limit in rows]
    generating = engine.generate(ListSource(requests), Steps())
    next(generating)
    generating.close()  # type: ignore[attr-defined]
    assert len(tokens_of(engine, request(prompts([3])[0], 7, GREEDY))) >= NEW


def test_it_takes_no_more_than_it_has_room_for(make: MakeEngine, kind: str) -> None:
    if kind in ("echo", "hf"):
        pytest.skip("it takes a batch of so many tokens")
    source = ListSource(some(20, GREEDY))
    left: list[int] = []

    def on_step() -> bool:
        left.append(len(source.requests))
        return len(left) == 3

    list(make().generate(source, on_step))
    assert left[-1] >= 20 - 2 * SEQS


def test_its_steps_are_counted_where_it_tells_of_them(make: MakeEngine, kind: str) -> None:
    engine = make()
    asked = some(5, GREEDY)
    ended = all_of(engine, asked)
    if engine.bounds is None:
        assert engine.steps.totals.steps == 0
        return
    totals = engine.steps.totals
    assert totals.step_prompt + totals.cached_tokens == sum(len(one.token_ids) for one in asked)
    assert totals.step_tokens - totals.step_prompt == sum(len(grown.token_ids) - 1 for grown in ended)
    assert totals.step_kv > 0
    assert totals.prefill_s + totals.decode_s > 0
