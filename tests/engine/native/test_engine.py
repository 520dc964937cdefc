"""The native engine, with tiny random models of many architectures in float32, against plain `generate`."""

import gc
import random
import threading
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import pytest
import torch

from hpc.engine.extents import ALIGN
from hpc.engine.failure import EngineFault
from hpc.engine.layers.attention import AttentionMetadata, Span
from hpc.engine.native.engine import NativeEngine
from hpc.engine.native.limits import EngineLimits
from hpc.engine.sequence import Sequence as Grown
from hpc.request import Request, RowId
from hpc.sampling_params import SamplingParams
from tests.engine.models import (
    CONFIGS,
    ROOMY,
    VOCABULARY,
    WAYS,
    WINDOWED,
    build_engine,
    engine_of,
    greedy_of,
    model_of,
    tiered,
    tiny,
)
from tests.engine.oracle import Steps, generated, grow, letters, request
from tests.fakes import Behind, ListSource

NEW = 8
FEW_SLOTS = EngineLimits(max_seqs=3, step_tokens=64, cache_bytes=32 << 20)
ONE_SLOT = EngineLimits(max_seqs=1, step_tokens=512, cache_bytes=32 << 20)
KINDS = [*CONFIGS, *WINDOWED]
CASES = tiered((kind, way) for kind in KINDS for way in WAYS)


def numbers(length: int, seed: int) -> list[int]:
    """Return a random prompt."""
    return random.Random(seed).choices(range(2, VOCABULARY), k=length)


PROMPTS = [numbers(length, length) for length in (3, 17, 9, 30, 12, 1, 22, 77)]
HEADER = numbers(43, 1000)
BEHIND = [HEADER + numbers(length, 2000 + length) for length in (1, 2, 14, 33)]
LONG = [numbers(700, 3000), numbers(513, 3001), numbers(20, 3002)]


def greedy(**values: Any) -> SamplingParams:
    return SamplingParams(**{"max_new_tokens": NEW, **values})


def hot(**values: Any) -> SamplingParams:
    return greedy(temperature=1.0, **values)


def requests_of(
    prompts: Sequence[Sequence[int]], sampling: SamplingParams | None = None, cut: int = 0
) -> list[Request]:
    """Make requests with the ids 0, 1, …, which share their first `cut` tokens."""
    return [behind(request(prompt, row, sampling or greedy()), cut) for row, prompt in enumerate(prompts)]


def behind(one: Request, cut: int) -> Request:
    return Request(one.row, one.id, one.token_ids, one.sampling, one.key, one.bucket, cut)


def by_row(found: dict[RowId, list[int]]) -> list[list[int]]:
    return [found[row] for row in range(len(found))]


def expected(prompts: Sequence[Sequence[int]], kind: str = "llama", new: int = NEW) -> list[list[int]]:
    return [greedy_of(kind, prompt, new) for prompt in prompts]


def first_at(tokens: Sequence[int], least: int) -> int:
    """Return the first index, from `least` on, of a token that stands nowhere before it."""
    return next(index for index in range(least, len(tokens)) if tokens[index] not in tokens[:index])


@pytest.fixture(scope="module", autouse=True)
def _old_objects_are_not_looked_at() -> Iterator[None]:
    """An engine collects garbage when a step fails; in a process full of tests' modules that takes long."""
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()


def spans_of(step: AttentionMetadata) -> list[Span]:
    return [Span(*line) for line in step.packed.tolist()]


class Passes:
    """What a hook has seen of the forward passes of a model."""

    def __init__(self) -> None:
        self.spans: list[list[Any]] = []
        self.logits: list[torch.Tensor] = []
        self.caches: list[weakref.ref[Any]] = []

    @property
    def computed(self) -> int:
        """Tokens, without those that only fill a step up."""
        return sum(span.tokens for spans in self.spans for span in spans)


@contextmanager
def watched(model: Any, before: Callable[[list[Any]], None] = lambda spans: None) -> Iterator[Passes]:
    """Record the forward passes of a model; `before` sees the spans of each and may raise."""
    passes = Passes()

    def enter(_: Any, args: Any, given: dict[str, Any]) -> None:
        step = given["engine"]
        passes.spans.append(spans_of(step))
        passes.caches.append(weakref.ref(step.cache))
        before(passes.spans[-1])

    def leave(_: Any, args: Any, output: Any) -> None:
        passes.logits.append(output.logits[0])

    handles = [model.register_forward_pre_hook(enter, with_kwargs=True), model.register_forward_hook(leave)]
    try:
        yield passes
    finally:
        for handle in handles:
            handle.remove()


# Greedy: what plain generate gives, for every architecture, with the kernel and with torch.


@pytest.mark.parametrize(("kind", "way"), CASES)
def test_greedy_output_with_slots_reused_equals_plain_generate(kind: str, way: str) -> None:
    found = generated(engine_of(kind, way, FEW_SLOTS), requests_of(PROMPTS))
    assert by_row(found) == expected(PROMPTS, kind)


@pytest.mark.parametrize(("kind", "way"), CASES)
def test_greedy_output_behind_a_shared_prefix_equals_plain_generate(kind: str, way: str) -> None:
    found = generated(engine_of(kind, way, FEW_SLOTS), requests_of(BEHIND, cut=len(HEADER)))
    assert by_row(found) == expected(BEHIND, kind)


@pytest.mark.parametrize(
    "kind", tiered(["llama", "gemma2", "gemma3", "gpt_oss", "gpt2", "bloom", "mpt", "falcon_alibi", "gpt_neo"])
)
@pytest.mark.parametrize("way", WAYS)
def test_greedy_output_of_prompts_longer_than_a_chunk_equals_plain_generate(kind: str, way: str) -> None:
    found = generated(engine_of(kind, way), requests_of(LONG, greedy(max_new_tokens=4)))
    assert by_row(found) == expected(LONG, kind, 4)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("step_tokens", [1, 100, 5000])
def test_greedy_output_with_steps_of_any_size_equals_plain_generate(way: str, step_tokens: int) -> None:
    engine = engine_of("llama", way, EngineLimits(8, step_tokens, 32 << 20))
    found = generated(engine, requests_of(LONG, greedy(max_new_tokens=4)))
    assert by_row(found) == expected(LONG, new=4)


@pytest.mark.parametrize("way", WAYS)
def test_a_prefix_longer_than_a_chunk_changes_no_greedy_output(way: str) -> None:
    prompts = [LONG[0] + tail for tail in ([5], [6, 7, 8])]
    found = generated(engine_of("llama", way), requests_of(prompts, greedy(max_new_tokens=4), cut=len(LONG[0])))
    assert by_row(found) == expected(prompts, new=4)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("cut", [1, 31, 32, 33])
def test_a_cut_anywhere_changes_no_greedy_output(way: str, cut: int) -> None:
    found = generated(engine_of("gemma3", way), requests_of(BEHIND[:3], cut=cut))
    assert by_row(found) == expected(BEHIND[:3], "gemma3")


def test_a_prefix_is_computed_once() -> None:
    with watched(model_of("llama", "torch")) as passes:
        generated(engine_of("llama", "torch"), requests_of(BEHIND, greedy(max_new_tokens=1), cut=len(HEADER)))
    assert passes.computed == len(HEADER) + sum(len(prompt) - len(HEADER) for prompt in BEHIND)


@pytest.mark.parametrize("way", WAYS)
def test_greedy_output_beside_sampled_requests_equals_plain_generate(way: str) -> None:
    requests = [request(prompt, row, hot() if row % 2 else greedy()) for row, prompt in enumerate(PROMPTS)]
    found = generated(engine_of("llama", way, FEW_SLOTS), requests)
    assert by_row(found)[::2] == expected(PROMPTS)[::2]


def test_prompts_with_and_without_a_prefix_stand_side_by_side() -> None:
    requests = [behind(one, 43 if one.row % 2 else 0) for one in requests_of(BEHIND)]
    assert by_row(generated(engine_of("llama", "torch"), requests)) == expected(BEHIND)


def test_a_prompt_of_one_prefix_stands_beside_one_of_another() -> None:
    prompts = [*BEHIND[:3], *(PROMPTS[3] + tail for tail in ([5], [6, 7]))]
    requests = [behind(one, 43 if one.row < 3 else 30) for one in requests_of(prompts)]
    assert by_row(generated(engine_of("llama", "torch"), requests)) == expected(prompts)


# Where a sequence ends.


@pytest.mark.parametrize("way", WAYS)
def test_an_end_of_sequence_token_ends_its_row_and_no_other(way: str) -> None:
    plain = expected(PROMPTS)
    eos = plain[3][first_at(plain[3], 2)]
    found = generated(engine_of("llama", way, FEW_SLOTS, eos=(eos,)), requests_of(PROMPTS))
    assert by_row(found) == [tokens[: tokens.index(eos) + 1] if eos in tokens else tokens for tokens in plain]


def test_a_row_that_ignores_end_of_sequence_goes_on() -> None:
    plain = expected(PROMPTS)
    engine = engine_of("llama", "torch", eos=(plain[3][2],))
    assert by_row(generated(engine, requests_of(PROMPTS, greedy(ignore_eos=True)))) == plain


def test_a_stop_token_ends_a_row() -> None:
    [plain] = expected(PROMPTS[3:4])
    sampling = greedy(stop_token_ids=(plain[first_at(plain, 2)],))
    found = generated(engine_of("llama", "torch"), requests_of(PROMPTS[3:4], sampling))
    assert found[0] == plain[: first_at(plain, 2) + 1]


@pytest.mark.parametrize("span", [1, 2, 3])
def test_a_stop_string_of_some_tokens_ends_a_row(span: int) -> None:
    [plain] = expected(PROMPTS[3:4])
    stop = letters(plain)[first_at(plain, 3) :][:span]
    found = generated(engine_of("llama", "torch"), requests_of(PROMPTS[3:4], greedy(stop=(stop,))))
    assert found[0] == plain[: letters(plain).index(stop) + span]


def test_a_stop_string_is_looked_for_in_the_text_behind_the_prompt() -> None:
    [plain] = expected(PROMPTS[3:4])
    stop = letters(plain)[0]
    found = generated(engine_of("llama", "torch", decode=Behind()), requests_of(PROMPTS[3:4], greedy(stop=(stop,))))
    assert found[0] == plain[:1]


def test_a_stop_string_ends_no_row_that_does_not_ask_for_it() -> None:
    [plain] = expected(PROMPTS[3:4])
    stop = letters(plain)[2]
    requests = [request(PROMPTS[3], "stops", greedy(stop=(stop,))), request(PROMPTS[3], "goes on", greedy())]
    assert generated(engine_of("llama", "torch"), requests)["goes on"] == plain


def test_before_min_new_tokens_nothing_ends_a_row() -> None:
    [plain] = expected(PROMPTS[3:4])
    sampling = greedy(stop=(letters(plain)[2],), min_new_tokens=NEW)
    assert len(generated(engine_of("llama", "torch"), requests_of(PROMPTS[3:4], sampling))[0]) == NEW


def test_each_row_ends_at_its_own_max_new_tokens() -> None:
    requests = [request(prompt, row, greedy(max_new_tokens=1 + row % 5)) for row, prompt in enumerate(PROMPTS)]
    found = generated(engine_of("llama", "torch", FEW_SLOTS), requests)
    assert by_row(found) == [tokens[: 1 + row % 5] for row, tokens in enumerate(expected(PROMPTS))]


def test_log_probabilities_are_those_of_the_model() -> None:
    requests = requests_of(PROMPTS, hot(logprobs=3))
    model = model_of("llama", "torch")
    grown = list(grow(engine_of("llama", "torch", FEW_SLOTS), ListSource(requests)))
    for sequence in grown:
        with watched(model) as passes:  # each prefix as a prompt of its own
            prompt = PROMPTS[sequence.request.row]
            prefixes = [prompt + sequence.token_ids[:count] for count in range(NEW)]
            generated(engine_of("llama", "torch", ONE_SLOT), requests_of(prefixes, greedy(max_new_tokens=1)))
        exact = torch.stack([logits[0] for logits in passes.logits]).double().log_softmax(dim=-1)
        chosen = exact.gather(1, torch.tensor(sequence.token_ids)[:, None])[:, 0]
        assert [value for value, _ in sequence.logprobs] == pytest.approx(chosen.tolist(), abs=1e-4)
        assert [[token for token, _ in top] for _, top in sequence.logprobs] == exact.topk(3).indices.tolist()
    assert len(grown) == len(PROMPTS)


# Guesses: several tokens of a row in a step, and the same output.

GUESSING = replace(ROOMY, drafts=True)
CIRCLING = "repetitive llama"
LOOPING = 120


def guessed(kind: str = CIRCLING, limits: EngineLimits = GUESSING, **others: Any) -> list[Grown]:
    """Return what comes of the prompts with guesses, in their order."""
    requests = requests_of(PROMPTS, greedy(**{"max_new_tokens": LOOPING, **others}))
    return sorted(grow(engine_of(kind, "kernel", limits), ListSource(requests)), key=lambda grown: grown.request.row)


@pytest.mark.parametrize("kind", tiered(["llama", "qwen3", "gemma3", "gpt2", "phi3_windowed", "mistral"]))
def test_with_guesses_greedy_output_equals_plain_generate(kind: str) -> None:
    kind = f"repetitive {kind}"
    assert [grown.token_ids for grown in guessed(kind)] == expected(PROMPTS, kind, LOOPING)


def test_guesses_that_are_right_save_steps() -> None:
    with watched(model_of(CIRCLING, "kernel")) as passes:
        guessed()
    assert len(passes.spans) < 0.9 * LOOPING


def test_every_token_that_saves_a_step_is_counted_as_accepted() -> None:
    prompt = requests_of(PROMPTS[:1], greedy(max_new_tokens=LOOPING))
    with watched(model_of(CIRCLING, "kernel")) as passes:
        [grown] = grow(engine_of(CIRCLING, "kernel", GUESSING), ListSource(prompt))
    assert len(passes.spans) + grown.accepted == LOOPING


def test_more_is_guessed_than_is_right() -> None:
    grown = guessed(limits=replace(GUESSING, max_seqs=2))
    assert sum(one.guessed for one in grown) > sum(one.accepted for one in grown) > 0


@pytest.mark.parametrize("new", [1, 2, 30, 59, 60, 61])
def test_with_guesses_a_row_ends_at_max_new_tokens(new: int) -> None:
    assert [len(grown.token_ids) for grown in guessed(max_new_tokens=new)] == [new] * len(PROMPTS)


@pytest.mark.parametrize("at", range(12))
def test_with_guesses_a_row_ends_at_a_stop_token_wherever_it_stands(at: int) -> None:
    plain = expected(PROMPTS, CIRCLING, LOOPING)
    stop = plain[3][at]
    ended = [tokens[: tokens.index(stop) + 1] if stop in tokens else tokens for tokens in plain]
    assert [grown.token_ids for grown in guessed(stop_token_ids=(stop,))] == ended


def test_with_guesses_a_row_ends_at_a_stop_string() -> None:
    plain = expected(PROMPTS, CIRCLING, LOOPING)
    stop = letters(plain[3])[8:11]
    texts = [letters(tokens) for tokens in plain]
    ended = [text[: text.index(stop) + 3] if stop in text else text for text in texts]
    assert [letters(grown.token_ids) for grown in guessed(stop=(stop,))] == ended


def test_with_guesses_sampled_rows_beside_are_what_they_were() -> None:
    requests = [
        request(prompt, row, greedy(max_new_tokens=40) if row % 2 else hot(max_new_tokens=40))
        for row, prompt in enumerate(PROMPTS)
    ]
    plain = generated(engine_of(CIRCLING, "kernel"), requests)
    assert generated(engine_of(CIRCLING, "kernel", GUESSING), requests) == plain


def test_with_guesses_rows_in_a_small_cache_give_what_plain_generate_gives() -> None:
    engine = engine_of(CIRCLING, "kernel", GUESSING, cache_tokens=4 * ALIGN)
    found = generated(engine, short_then_long(4, LONG_ENOUGH))
    assert long_ones(found) == expected(PROMPTS[:4], CIRCLING, LONG_ENOUGH)


@pytest.mark.parametrize("way", WAYS)
def test_only_where_numbers_do_not_depend_on_the_batch_tokens_are_guessed(way: str) -> None:
    engine = build_engine(tiny(CONFIGS["llama"], scale=3.0), way, GUESSING)
    grown = list(grow(engine, ListSource(requests_of(PROMPTS[:1], greedy(max_new_tokens=LOOPING)))))
    assert (grown[0].guessed > 0) == (way == "kernel")


# Samples.


def samples_of(engine: NativeEngine, requests: Sequence[Request]) -> dict[tuple[RowId, int], list[int]]:
    """Return the tokens of each sample, by id and index; fail if one was twice or had an error."""
    grown = list(grow(engine, ListSource(requests)))
    found = {(sequence.request.id, sequence.sample): sequence.token_ids for sequence in grown}
    assert len(found) == len(grown)
    assert [sequence.error for sequence in grown if sequence.error] == []
    return found


def test_every_sample_of_every_request_is_yielded_once() -> None:
    requests = [request(prompt, row, hot(n=row + 1)) for row, prompt in enumerate(PROMPTS)]
    found = samples_of(engine_of("llama", "torch", FEW_SLOTS), requests)
    assert sorted(found, key=str) == sorted(
        ((row, at) for row in range(len(PROMPTS)) for at in range(row + 1)), key=str
    )


def test_the_samples_of_a_request_differ() -> None:
    found = samples_of(engine_of("llama", "torch"), requests_of(PROMPTS[3:4], hot(n=6)))
    assert len({tuple(tokens) for tokens in found.values()}) == 6


@pytest.mark.parametrize("way", WAYS)
def test_samples_are_the_same_however_many_there_are_and_whatever_is_beside_them(way: str) -> None:
    few = samples_of(engine_of("llama", way, ONE_SLOT), requests_of(PROMPTS[3:4], hot(n=2)))
    requests = [request(PROMPTS[3], 0, hot(n=7)), *(request(p, row + 1, hot(n=2)) for row, p in enumerate(PROMPTS))]
    many = samples_of(engine_of("llama", way), requests)
    assert {key: many[key] for key in few} == few


def test_the_first_sample_is_that_of_a_request_for_one() -> None:
    several = samples_of(engine_of("llama", "torch"), requests_of(PROMPTS, hot(n=3)))
    one = samples_of(engine_of("llama", "torch"), requests_of(PROMPTS, hot()))
    assert {key: several[key] for key in one} == one


def test_the_prompt_of_several_samples_is_computed_once_but_for_its_last_token() -> None:
    with watched(model_of("llama", "torch")) as passes:
        samples_of(engine_of("llama", "torch"), requests_of(PROMPTS[3:4], hot(n=5, max_new_tokens=1)))
    assert passes.computed == len(PROMPTS[3]) - 1 + 5


@pytest.mark.parametrize("way", WAYS)
def test_samples_of_a_prompt_of_one_token_are_generated(way: str) -> None:
    found = samples_of(engine_of("llama", way), requests_of([[5]], hot(n=3)))
    assert [len(tokens) for tokens in found.values()] == [NEW] * 3


# Memory: growth, sequences that give way, requests that are too large.

SHORT = 64
"""Requests that end at once, after which the scheduler thinks that others do too."""
LONG_ENOUGH = ALIGN + 20
"""Tokens for which an extent has to grow."""


def short_then_long(count: int, new: int) -> list[Request]:
    short = [request([7 + row], f"short {row}", greedy(max_new_tokens=1)) for row in range(SHORT)]
    long = [request(PROMPTS[row], row, greedy(max_new_tokens=new)) for row in range(count)]
    return short + long


def long_ones(found: dict[RowId, list[int]]) -> list[list[int]]:
    return [tokens for key, tokens in sorted(found.items(), key=str) if isinstance(key, int)]


def least_tokens(requests: Sequence[Request]) -> int:
    """Return how many tokens must be computed if nothing is computed twice."""
    return sum(len(one.token_ids) + one.sampling.max_new_tokens - 1 for one in requests)


@pytest.mark.parametrize("way", WAYS)
def test_sequences_that_outgrow_their_extents_give_what_plain_generate_gives(way: str) -> None:
    found = generated(engine_of("llama", way), short_then_long(4, LONG_ENOUGH))
    assert long_ones(found) == expected(PROMPTS[:4], new=LONG_ENOUGH)


def test_a_sequence_that_outgrows_its_extent_is_not_computed_again() -> None:
    requests = short_then_long(4, LONG_ENOUGH)
    with watched(model_of("llama", "torch")) as passes:
        generated(engine_of("llama", "torch"), requests)
    assert passes.computed == least_tokens(requests)


@pytest.mark.parametrize("way", WAYS)
def test_sequences_that_give_way_give_what_plain_generate_gives(way: str) -> None:
    found = generated(engine_of("llama", way, cache_tokens=4 * ALIGN), short_then_long(4, LONG_ENOUGH))
    assert long_ones(found) == expected(PROMPTS[:4], new=LONG_ENOUGH)


def test_in_a_small_cache_a_sequence_gives_way_and_is_computed_again() -> None:
    requests = short_then_long(4, LONG_ENOUGH)
    with watched(model_of("llama", "torch")) as passes:
        generated(engine_of("llama", "torch", cache_tokens=4 * ALIGN), requests)
    assert passes.computed > least_tokens(requests)


def test_sampled_sequences_that_give_way_are_what_they_are_with_room() -> None:
    requests = [
        request(one.token_ids.tolist(), one.id, hot(max_new_tokens=one.sampling.max_new_tokens, repetition_penalty=1.2))
        for one in short_then_long(4, LONG_ENOUGH)
    ]
    tight = generated(engine_of("llama", "torch", cache_tokens=4 * ALIGN), requests)
    assert tight == generated(engine_of("llama", "torch"), requests)


@pytest.mark.parametrize("way", WAYS)
def test_sequences_behind_prefixes_that_give_way_give_what_plain_generate_gives(way: str) -> None:
    requests = short_then_long(0, 1) + requests_of(BEHIND[:4], greedy(max_new_tokens=LONG_ENOUGH), cut=len(HEADER))
    found = generated(engine_of("llama", way, cache_tokens=5 * ALIGN), requests)
    assert long_ones(found) == expected(BEHIND[:4], new=LONG_ENOUGH)


def test_a_request_too_large_for_the_cache_is_an_error() -> None:
    [grown] = grow(engine_of("llama", "torch", cache_tokens=ALIGN), ListSource(requests_of([PROMPTS[7]])))
    assert f"room for {ALIGN};" in (grown.error or "")


def test_requests_beside_one_too_large_for_the_cache_are_what_they_were() -> None:
    grown = list(grow(engine_of("llama", "torch", cache_tokens=ALIGN), ListSource(requests_of(PROMPTS))))
    assert by_row({g.request.id: g.token_ids for g in grown if not g.error}) == expected(PROMPTS[:7])


def test_each_sample_of_a_request_too_large_for_the_cache_is_an_error() -> None:
    grown = list(grow(engine_of("llama", "torch", cache_tokens=ALIGN), ListSource(requests_of([PROMPTS[7]], hot(n=3)))))
    assert [(g.sample, g.error is not None) for g in grown] == [(0, True), (1, True), (2, True)]


def test_a_request_that_just_fits_the_cache_is_completed() -> None:
    sampling = greedy(max_new_tokens=2 * ALIGN - len(PROMPTS[7]) + 1)
    found = generated(engine_of("llama", "torch", cache_tokens=2 * ALIGN), requests_of(PROMPTS[7:], sampling))
    assert by_row(found) == expected(PROMPTS[7:], new=sampling.max_new_tokens)


def test_a_request_that_fits_the_cache_is_completed_wherever_its_prefix_ends() -> None:
    found = generated(engine_of("llama", "torch", cache_tokens=2 * ALIGN), requests_of(PROMPTS[7:], cut=70))
    assert by_row(found) == expected(PROMPTS[7:])


# Failures.


BROKEN = VOCABULARY + 5
"""No such token: the embedding raises."""


def errors_of(grown: Sequence[Grown]) -> list[RowId]:
    return [g.request.id for g in grown if g.error]


def tokens_of(grown: Sequence[Grown]) -> dict[RowId, list[int]]:
    return {g.request.id: g.token_ids for g in grown if not g.error}


@pytest.mark.parametrize("limits", [ONE_SLOT, FEW_SLOTS, ROOMY], ids=["one slot", "few slots", "many slots"])
def test_a_request_that_the_model_refuses_is_the_only_error(limits: EngineLimits) -> None:
    requests = [*requests_of(PROMPTS), request([9, BROKEN, 9], "broken")]
    random.Random(1).shuffle(requests)
    assert errors_of(list(grow(engine_of("llama", "torch", limits), ListSource(requests)))) == ["broken"]


@pytest.mark.parametrize("way", WAYS)
def test_requests_beside_one_that_the_model_refuses_are_what_they_were(way: str) -> None:
    requests = [*requests_of(PROMPTS[:4]), request([9, BROKEN], "broken"), *requests_of(PROMPTS)[4:]]
    grown = list(grow(engine_of("llama", way), ListSource(requests)))
    assert by_row(tokens_of(grown)) == expected(PROMPTS)


def test_a_refused_request_says_what_the_model_said() -> None:
    [grown] = grow(engine_of("llama", "torch"), ListSource([request([BROKEN])]))
    assert grown.error == "IndexError: index out of range in self"


def test_all_samples_of_a_refused_request_are_errors() -> None:
    requests = [*requests_of(PROMPTS[:2]), request([9, BROKEN, 9], "broken", hot(n=3))]
    grown = list(grow(engine_of("llama", "torch"), ListSource(requests)))
    assert errors_of(grown) == ["broken"] * 3


def test_requests_behind_a_prefix_that_the_model_refuses_are_errors_and_the_others_none() -> None:
    broken = [request([9, BROKEN, 9, tail], f"broken {tail}") for tail in (1, 2)]
    requests = [*requests_of(PROMPTS[:2]), *(behind(one, 3) for one in broken), *requests_of(PROMPTS)[2:]]
    grown = list(grow(engine_of("llama", "torch"), ListSource(requests)))
    assert sorted(map(str, errors_of(grown))) == ["broken 1", "broken 2"]


def test_failures_that_are_found_one_by_one_do_not_end_batching() -> None:
    requests = [request([BROKEN], "broken"), *requests_of(PROMPTS * 3)]
    with watched(model_of("llama", "torch")) as passes:
        list(grow(engine_of("llama", "torch"), ListSource(requests)))
    assert max(len(spans) for spans in passes.spans[-3 * NEW :]) > 1


def test_8_requests_that_fail_one_after_the_other_are_the_engines_fault() -> None:
    requests = [request([BROKEN], row) for row in range(20)]
    with pytest.raises(EngineFault, match="8 requests failed one after the other"):
        list(grow(engine_of("llama", "torch", ONE_SLOT), ListSource(requests)))


def until_it_breaks(engine: NativeEngine, source: ListSource) -> list[Grown]:
    """Return what an engine yields before it raises; fail if it does not."""
    grown: list[Grown] = []
    try:
        for sequence in grow(engine, source):
            grown.append(sequence)  # noqa: PERF402  # they count although an exception follows
    except (EngineFault, RuntimeError):
        return grown
    pytest.fail("it did not raise")


def test_where_the_engine_is_at_fault_no_request_is_an_error() -> None:
    requests = [request([BROKEN], row) for row in range(20)]
    assert errors_of(until_it_breaks(engine_of("llama", "torch", ONE_SLOT), ListSource(requests))) == []


class BrokenSource(ListSource):
    """A source that breaks when it is looked at again, as one that MPI has left does."""

    looks = 0

    def pull(self, num_tokens: int) -> list[Request]:
        self.looks += 1
        if self.looks > 1:
            raise RuntimeError("the source is broken")
        return super().pull(num_tokens)


def test_where_a_source_breaks_no_request_is_an_error() -> None:
    source = BrokenSource([request(PROMPTS[0])])
    assert errors_of(until_it_breaks(engine_of("llama", "torch"), source)) == []


def test_7_requests_that_fail_one_after_the_other_are_7_errors() -> None:
    requests = [*(request([BROKEN], f"broken {row}") for row in range(7)), *requests_of(PROMPTS)]
    grown = list(grow(engine_of("llama", "torch"), ListSource(requests)))
    assert len(errors_of(grown)) == 7


def test_many_requests_that_fail_among_others_are_not_the_engines_fault() -> None:
    requests = []
    for row in range(9):
        requests += [request([BROKEN], f"broken {row}"), request(PROMPTS[0], row, greedy(max_new_tokens=1))]
    grown = list(grow(engine_of("llama", "torch", ONE_SLOT), ListSource(requests)))
    assert len(errors_of(grown)) == 9


@contextmanager
def poisoned(model: Any, token: int, value: float = torch.nan) -> Iterator[None]:
    """Let the embedding of a token be no number."""

    def poison(_: Any, args: Any, output: torch.Tensor) -> torch.Tensor:
        return torch.where((args[0] == token)[..., None], value, output)

    handle = model.get_input_embeddings().register_forward_hook(poison)
    try:
        yield
    finally:
        handle.remove()


def poison_of(kind: str = "llama") -> int:
    """Return a token that stands in no prompt and in no completion of a prompt."""
    used = {token for tokens in PROMPTS + BEHIND + expected(PROMPTS, kind) + expected(BEHIND, kind) for token in tokens}
    return next(token for token in range(2, VOCABULARY) if token not in used)


@pytest.mark.parametrize("limits", [ONE_SLOT, ROOMY], ids=["in the same cache", "in the same step"])
@pytest.mark.parametrize(
    ("kind", "value"),
    [("llama", torch.inf), *((kind, torch.nan) for kind in ("llama", "gemma3", "mixtral", "gpt_oss"))],
)
@pytest.mark.parametrize("way", WAYS)
def test_requests_with_one_whose_logits_are_no_numbers_are_what_they_were(
    kind: str, way: str, limits: EngineLimits, value: float
) -> None:
    token = poison_of(kind)
    requests = [request([5, 6, token, 7, 8] * 5, "poisoned"), *requests_of(PROMPTS)]
    with poisoned(model_of(kind, way), token, value):
        grown = list(grow(engine_of(kind, way, limits), ListSource(requests)))
    assert by_row(tokens_of(grown)) == expected(PROMPTS, kind)


@pytest.mark.parametrize("way", WAYS)
def test_a_request_whose_logits_are_no_numbers_is_the_only_error(way: str) -> None:
    token = poison_of()
    requests = [*requests_of(PROMPTS[:3]), request([5, 6, token, 7], "poisoned"), *requests_of(PROMPTS)[3:]]
    with poisoned(model_of("llama", way), token):
        grown = list(grow(engine_of("llama", way), ListSource(requests)))
    assert [(g.request.id, "try another dtype" in g.error) for g in grown if g.error] == [("poisoned", True)]


@pytest.mark.parametrize("way", WAYS)
def test_logits_that_become_no_numbers_in_the_middle_are_an_error(way: str) -> None:
    [plain] = expected(PROMPTS[3:4])
    at = first_at(plain, 3)
    assert plain[at] not in PROMPTS[3]
    with poisoned(model_of("llama", way), plain[at]):
        [grown] = grow(engine_of("llama", way), ListSource(requests_of(PROMPTS[3:4])))
    assert (grown.error is not None, grown.token_ids) == (True, plain[: at + 1])


@pytest.mark.parametrize("way", WAYS)
def test_a_prefix_whose_keys_are_no_numbers_harms_no_other_request(way: str) -> None:
    token = poison_of()
    bad = [behind(request([5, 6, token, 7, tail], f"poisoned {tail}"), 4) for tail in (9, 10)]
    requests = [bad[0], *requests_of(BEHIND, cut=len(HEADER)), bad[1]]
    with poisoned(model_of("llama", way), token):
        grown = list(grow(engine_of("llama", way, FEW_SLOTS), ListSource(requests)))
    assert by_row(tokens_of(grown)) == expected(BEHIND)


def test_the_token_that_fills_steps_up_may_be_no_number() -> None:
    assert not any(0 in tokens for tokens in expected(PROMPTS) + PROMPTS)
    with poisoned(model_of("llama", "torch"), 0):
        assert by_row(generated(engine_of("llama", "torch"), requests_of(PROMPTS))) == expected(PROMPTS)


class SmallMemory:
    """Steps of more than so many rows or tokens do not fit; torch's own allocator says so."""

    def __init__(self, rows: int, tokens: int = 10**6) -> None:
        self.refused: list[int] = []
        self._rows = rows
        self._tokens = tokens

    def __call__(self, spans: list[Any]) -> None:
        if len(spans) > self._rows or sum(span.tokens for span in spans) > self._tokens:
            self.refused.append(len(spans))
            torch.empty(10**15)  # 4 PB are beyond the address space of any CPU


@pytest.mark.parametrize("rows", [1, 3])
@pytest.mark.parametrize("way", WAYS)
def test_when_memory_is_short_all_requests_still_complete(way: str, rows: int) -> None:
    with watched(model_of("llama", way), SmallMemory(rows)):
        found = generated(engine_of("llama", way), requests_of(PROMPTS))
    assert by_row(found) == expected(PROMPTS)


def test_once_the_budget_has_shrunk_no_more_steps_fail() -> None:
    memory = SmallMemory(2)
    with watched(model_of("llama", "torch"), memory):
        generated(engine_of("llama", "torch"), requests_of(PROMPTS * 3))
    assert memory.refused == [8, 4]


def test_when_memory_is_short_in_the_middle_of_a_model_all_requests_still_complete() -> None:
    model, memory = model_of("llama", "torch"), SmallMemory(2)
    handle = model.model.layers[1].register_forward_pre_hook(
        lambda _, args, given: memory(spans_of(given["engine"])), with_kwargs=True
    )
    try:
        found = generated(engine_of("llama", "torch"), requests_of(BEHIND, cut=len(HEADER)))
    finally:
        handle.remove()
    assert by_row(found) == expected(BEHIND)


def test_a_request_that_does_not_fit_in_memory_alone_is_the_only_error() -> None:
    with watched(model_of("llama", "torch"), SmallMemory(8, 64)):
        grown = list(grow(engine_of("llama", "torch"), ListSource(requests_of(PROMPTS))))
    assert [(g.request.id, g.error) for g in grown if g.error] == [(7, "it does not fit in memory, even alone")]


def test_requests_that_do_not_fit_in_memory_are_not_the_engines_fault() -> None:
    with watched(model_of("llama", "torch"), SmallMemory(0)):
        limits = EngineLimits(1, ALIGN, 1 << 20)  # too small to be halved
        grown = list(grow(engine_of("llama", "torch", limits), ListSource(requests_of([[5]] * 9))))
    assert len(errors_of(grown)) == 9


def test_after_a_request_that_does_not_fit_others_are_still_batched() -> None:
    with watched(model_of("llama", "torch"), SmallMemory(8, 100)) as passes:
        list(grow(engine_of("llama", "torch"), ListSource(requests_of([LONG[0], *PROMPTS[:7] * 2]))))
    assert max(len(spans) for spans in passes.spans[-NEW:]) > 1


# Steps, being told to stop, being closed.


@pytest.mark.parametrize("rows", [1, 4])
def test_on_step_is_called_at_every_token(rows: int) -> None:
    steps = Steps()
    generated(engine_of("llama", "torch"), requests_of(PROMPTS[:rows]), steps)
    assert steps.count == NEW


def test_on_step_is_called_between_the_chunks_of_a_prompt() -> None:
    steps = Steps()
    generated(engine_of("llama", "torch"), requests_of(LONG[:1], greedy(max_new_tokens=1)), steps)
    assert steps.count == 2


def stoppable() -> list[Request]:
    """Requests that end after 1, 2, … tokens."""
    return [request(prompt, row, greedy(max_new_tokens=row + 1)) for row, prompt in enumerate(PROMPTS)]


@pytest.mark.parametrize("stop_at", [1, 3, 6])
def test_when_told_to_stop_only_what_has_ended_is_yielded(stop_at: int) -> None:
    found = generated(engine_of("llama", "torch"), stoppable(), Steps(stop_at))
    assert by_row(found) == [tokens[: row + 1] for row, tokens in enumerate(expected(PROMPTS[:stop_at]))]


def test_when_told_to_stop_no_further_step_is_made() -> None:
    with watched(model_of("llama", "torch")) as passes:
        generated(engine_of("llama", "torch"), stoppable(), Steps(3))
    assert len(passes.spans) == 3


def test_an_engine_that_was_told_to_stop_can_be_used_again() -> None:
    engine = engine_of("llama", "torch")
    generated(engine, requests_of(PROMPTS), Steps(3))
    assert by_row(generated(engine, requests_of(PROMPTS))) == expected(PROMPTS)


@pytest.mark.parametrize("close_at", [1, 4, 7])
@pytest.mark.parametrize("way", WAYS)
def test_closed_at_any_step_the_engine_frees_its_cache(way: str, close_at: int) -> None:
    with watched(model_of("llama", way)) as passes:
        running = engine_of("llama", way).generate(ListSource(stoppable()), Steps())
        for _ in range(close_at):
            next(iter(running))
        running.close()  # type: ignore[attr-defined]
        del running
    gc.collect()
    assert {cache() for cache in passes.caches} == {None}


def test_an_engine_that_has_ended_frees_its_cache() -> None:
    with watched(model_of("llama", "torch")) as passes:
        generated(engine_of("llama", "torch"), requests_of(PROMPTS))
    gc.collect()
    assert {cache() for cache in passes.caches} == {None}


def test_an_engine_that_is_closed_leaves_no_thread() -> None:
    before = set(threading.enumerate())
    running = engine_of("llama", "torch").generate(ListSource(stoppable()), Steps())
    next(iter(running))
    running.close()  # type: ignore[attr-defined]
    assert set(threading.enumerate()) <= before


def test_an_engine_that_was_closed_can_be_used_again() -> None:
    engine = engine_of("llama", "torch")
    running = engine.generate(ListSource(stoppable()), Steps())
    next(iter(running))
    running.close()  # type: ignore[attr-defined]
    assert by_row(generated(engine, requests_of(PROMPTS))) == expected(PROMPTS)


class SlowSource(ListSource):
    """A source that hands out one request at every third look."""

    def __init__(self, requests: Sequence[Request]) -> None:
        super().__init__(requests)
        self.looks = 0

    def pull(self, num_tokens: int) -> list[Request]:
        self.looks += 1
        return super().pull(1) if self.looks % 3 == 0 else []


def test_requests_that_come_late_and_one_by_one_are_what_they_are_together() -> None:
    grown = list(grow(engine_of("llama", "torch"), SlowSource(requests_of(PROMPTS))))
    assert by_row(tokens_of(grown)) == expected(PROMPTS)


def test_an_engine_that_waits_for_requests_is_told_to_stop() -> None:
    source = SlowSource(requests_of(PROMPTS))
    list(grow(engine_of("llama", "torch"), source, Steps(2)))
    assert source.looks == 2


def test_an_exhausted_source_ends_the_engine_at_once() -> None:
    steps = Steps()
    assert (list(grow(engine_of("llama", "torch"), ListSource([]), steps)), steps.count) == ([], 0)


# Batch independence: the logits of a request are bitwise the same, alone and beside any others.

MIXED = [
    *requests_of(PROMPTS[1:6]),
    *(behind(request(prompt, 100 + row, greedy()), 43) for row, prompt in enumerate(BEHIND[1:])),
    request(LONG[0], 200, greedy(max_new_tokens=4)),
    request(PROMPTS[3], 300, hot(n=3)),
    request(PROMPTS[7], 301, hot(top_k=20, repetition_penalty=1.3)),
    request(PROMPTS[4], 302, hot(top_p=0.9, presence_penalty=0.5, min_p=0.01)),
]
CROWDS = {
    "3 slots, small steps": EngineLimits(3, 32, 32 << 20),
    "64 slots, large steps": EngineLimits(64, 4096, 32 << 20),
}
DENSE = ["llama", "gemma2", "gpt2", "qwen3", "gpt_neox", "bloom", "falcon_alibi"]
EXPERTS = ["mixtral", "olmoe", "gpt_oss"]
INDEPENDENT = tiered(
    [
        *((kind, way, torch.float32) for kind in DENSE + EXPERTS for way in WAYS),
        *((kind, "kernel", torch.bfloat16) for kind in (*DENSE[:3], "bloom", EXPERTS[0])),
    ]
)


def blas() -> str:
    """Return the lines in which torch names the libraries of its matrix products."""
    lines = torch.__config__.show().splitlines()
    return "; ".join(line.strip(" -") for line in lines if "Kernel" in line or "MKL" in line or "BLAS" in line)[:300]


def logits_of(kind: str, way: str, dtype: torch.dtype, limits: EngineLimits, requests: Sequence[Request]) -> set[bytes]:
    """Return the logits of all choices, each as bytes: of the rows alone that are looked at where it is one request."""
    with watched(model_of(kind, way, dtype)) as passes:
        samples_of(engine_of(kind, way, limits, dtype=dtype), requests)
    rows = 1 if limits.max_seqs == 1 else None
    steps = [logits[:rows] for logits in passes.logits]
    return {row.float().numpy().tobytes() for logits in steps for row in logits}


def alone_of(kind: str, way: str, dtype: torch.dtype) -> dict[RowId, set[bytes]]:
    key = kind, way, dtype
    if key not in _ALONE:
        _ALONE[key] = {one.id: logits_of(kind, way, dtype, ONE_SLOT, [one]) for one in MIXED}
    return _ALONE[key]


_ALONE: dict[Any, dict[RowId, set[bytes]]] = {}


@pytest.mark.parametrize("crowd", CROWDS)
@pytest.mark.parametrize(("kind", "way", "dtype"), INDEPENDENT)
def test_logits_in_any_batch_are_bitwise_those_of_the_request_alone(
    kind: str, way: str, dtype: torch.dtype, crowd: str
) -> None:
    shuffled = random.Random(crowd).sample(MIXED, len(MIXED))
    together = logits_of(kind, way, dtype, CROWDS[crowd], shuffled)
    differ = [key for key, logits in alone_of(kind, way, dtype).items() if not logits <= together]
    if way == "torch":
        assert differ == [], f"matrix products of this BLAS depend on how many rows they have: {blas()}"
    assert differ == []


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("seed", range(2))
def test_output_in_any_order_and_batch_is_that_of_the_request_alone(way: str, seed: int) -> None:
    alone: dict[tuple[RowId, int], list[int]] = {}
    for one in MIXED:
        alone.update(samples_of(engine_of("llama", way, ONE_SLOT), [one]))
    shuffled = random.Random(seed).sample(MIXED, len(MIXED))
    limits = EngineLimits((3, 40)[seed], (48, 2000)[seed], 32 << 20)
    assert samples_of(engine_of("llama", way, limits), shuffled) == alone


@contextmanager
def two_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        yield
    finally:
        torch.set_num_threads(before)


SOME = requests_of([*PROMPTS[1:6], PROMPTS[7], LONG[1]], greedy(max_new_tokens=2))
"""Two threads wait for each other at every layer, on a busy machine for long."""


@pytest.mark.parametrize(
    ("way", "dtype"), [("kernel", torch.float32), ("kernel", torch.bfloat16), ("torch", torch.float32)]
)
def test_with_two_threads_logits_in_any_batch_are_bitwise_those_of_the_request_alone(
    way: str, dtype: torch.dtype
) -> None:
    with two_threads():
        alone = {one.id: logits_of("llama", way, dtype, ONE_SLOT, [one]) for one in SOME}
        together = logits_of("llama", way, dtype, CROWDS["64 slots, large steps"], SOME)
    differ = [key for key, logits in alone.items() if not logits <= together]
    assert differ == [], f"with torch, matrix products of this BLAS depend on how many rows they have: {blas()}"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_kernels_logits_with_two_threads_are_bitwise_those_with_one(dtype: torch.dtype) -> None:
    with two_threads():
        two = logits_of("llama", "kernel", dtype, CROWDS["64 slots, large steps"], SOME)
    assert two == logits_of("llama", "kernel", dtype, CROWDS["64 slots, large steps"], SOME)


def test_an_extent_anywhere_in_the_cache_gives_the_same_logits() -> None:
    one = requests_of(PROMPTS[3:4])
    first = logits_of("llama", "kernel", torch.float32, ONE_SLOT, one)
    before = [request(numbers(40, 50 + row), f"before {row}", greedy(max_new_tokens=40)) for row in range(3)]
    assert first <= logits_of("llama", "kernel", torch.float32, ROOMY, [*before, *one])
