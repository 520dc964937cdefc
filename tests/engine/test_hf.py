"""The hf engine, with tiny random models in float32, against plain `generate` of one prompt at a time."""

import json
import random
import shutil
import time
from collections.abc import Iterator, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM

from hpc.engine.failure import is_out_of_memory
from hpc.engine.hf import HFEngine, batches
from hpc.engine.interface import begin
from hpc.engine.sequence import Sequence as Grown
from hpc.model.load import load, quiet
from hpc.request import Request, RowId
from hpc.sampling_params import SamplingParams
from tests.conftest import make_tiny_model
from tests.engine.models import plain_of, tiny, with_rope
from tests.engine.oracle import CPU, Plain, Steps, generated, grow, letters, load_engine, one_bucket, prompts, request
from tests.fakes import Behind, ListSource, Spelled

NEW = 12
ALL = 100_000
PROMPTS = prompts()
SAMPLING = [
    SamplingParams(max_new_tokens=NEW, temperature=0.9),
    SamplingParams(max_new_tokens=NEW, temperature=1.4, top_k=20),
    SamplingParams(max_new_tokens=NEW, temperature=0.7, top_p=0.8),
    SamplingParams(max_new_tokens=NEW, temperature=1.1, top_p=0.95, top_k=50, seed=5),
]


@pytest.fixture(scope="module", autouse=True)
def _quiet() -> None:
    quiet()


@pytest.fixture(scope="module")
def tiny_bloom(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A BLOOM whose layers weigh more: as made, its tied embeddings repeat the last token whatever stood before."""
    folder = make_tiny_model(tmp_path_factory.mktemp("tiny-bloom"), "bloom")
    model: Any = AutoModelForCausalLM.from_pretrained(folder)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() > 1 and "embed" not in name:
                parameter.mul_(4)
    model.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def near_ties(tmp_path_factory: pytest.TempPathFactory, tiny_model: Path) -> Path:
    """A llama in which each token has a twin with all but the same logit: rounding chooses between them."""
    folder = tmp_path_factory.mktemp("near-ties")
    model: Any = AutoModelForCausalLM.from_pretrained(tiny_model)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        head = model.lm_head.weight
        head[129:] = head[:129] * (1 + 3e-7 * torch.randn(129, 64, generator=generator))
    model.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def rounding(near_ties: Path) -> HFEngine:
    """An engine of the near ties, whose logits are a little different in each batch of more than one row.

    So they are by rounding, on some machines more than on others; here always, by up to a millionth.
    """
    model = load(near_ties, CPU, "float32", threads=1)
    numbers = torch.Generator().manual_seed(0)

    def disturb(_: Any, args: Any, logits: torch.Tensor) -> torch.Tensor:
        if len(logits) == 1:
            return logits
        return logits + 1e-6 * logits.abs().amax() * (2 * torch.rand(logits.shape, generator=numbers) - 1)

    model.lm_head.register_forward_hook(disturb)
    return HFEngine(model, (), letters, ALL)


@pytest.fixture(scope="module", params=["tiny_model", "tiny_bloom"])
def path(request: pytest.FixtureRequest) -> Path:
    """A model directory of each kind."""
    folder: Path = request.getfixturevalue(request.param)
    return folder


@pytest.fixture(scope="module")
def expected(path: Path) -> list[list[int]]:
    """The greedy completion of each prompt, by plain `generate`."""
    plain = Plain(path)
    return [plain.generate(prompt, NEW) for prompt in PROMPTS]


@pytest.fixture(scope="module")
def llama_greedy(tiny_model: Path) -> list[list[int]]:
    """The greedy completion of each prompt by the llama, by plain `generate`."""
    plain = Plain(tiny_model)
    return [plain.generate(prompt, NEW) for prompt in PROMPTS]


def greedy(**values: Any) -> SamplingParams:
    return SamplingParams(**{"max_new_tokens": NEW, **values})


def first_at(tokens: Sequence[int], least: int) -> int:
    """Return the first index, from `least` on, of a token that stands nowhere before it."""
    return next(index for index in range(least, len(tokens)) if tokens[index] not in tokens[:index])


def by_row(found: dict[RowId, list[int]]) -> list[list[int]]:
    return [found[row] for row in range(len(found))]


# Greedy: what plain generate gives.


@pytest.mark.parametrize("batch_tokens", [1, 700, 2000, ALL])
def test_greedy_output_of_batches_of_any_size_equals_plain_generate(
    path: Path, expected: list[list[int]], batch_tokens: int
) -> None:
    found = generated(load_engine(path, batch_tokens), one_bucket(PROMPTS, greedy()))
    assert by_row(found) == expected


@pytest.mark.parametrize("seed", range(4))
def test_greedy_output_of_any_selection_in_any_order_equals_plain_generate(
    path: Path, expected: list[list[int]], seed: int
) -> None:
    order = random.Random(seed).sample(range(len(PROMPTS)), 2 + seed)
    requests = one_bucket(PROMPTS, greedy())
    found = generated(load_engine(path), [requests[row] for row in order])
    assert found == {row: expected[row] for row in order}


def test_greedy_output_of_one_prompt_many_times_is_that_of_plain_generate(
    path: Path, expected: list[list[int]]
) -> None:
    found = generated(load_engine(path), one_bucket([PROMPTS[5]] * 7, greedy()))
    assert by_row(found) == [expected[5]] * 7


def test_greedy_output_beside_sampled_rows_equals_plain_generate(path: Path, expected: list[list[int]]) -> None:
    bucket = len(PROMPTS[-1])
    requests = [
        request(prompt, row, SAMPLING[1] if row % 2 else greedy(), bucket) for row, prompt in enumerate(PROMPTS)
    ]
    found = generated(load_engine(path), requests)
    assert by_row(found)[::2] == expected[::2]


@pytest.mark.parametrize("rows", [2, 5, 10])
def test_greedy_choices_that_rounding_changes_are_those_of_plain_generate(
    near_ties: Path, rounding: HFEngine, rows: int
) -> None:
    plain = Plain(near_ties)
    found = generated(rounding, one_bucket(PROMPTS[:rows], greedy()))
    assert by_row(found) == [plain.generate(prompt, NEW) for prompt in PROMPTS[:rows]]


# Sampled: a request is the same wherever it runs.


@pytest.fixture(scope="module")
def sampled_requests() -> list[Request]:
    """Each prompt with each way of sampling, all in one bucket."""
    bucket = len(PROMPTS[-1])
    pairs = [(prompt, sampling) for prompt in PROMPTS[::3] for sampling in SAMPLING]
    return [request(prompt, row, sampling, bucket) for row, (prompt, sampling) in enumerate(pairs)]


@pytest.fixture(scope="module")
def sampled_alone(path: Path, sampled_requests: list[Request]) -> list[list[int]]:
    """The completion of each sampled request, each in a run of its own."""
    engine = load_engine(path)
    return [generated(engine, [one])[one.id] for one in sampled_requests]


@pytest.mark.parametrize("batch_tokens", [1000, 3000, ALL])
def test_sampled_output_in_batches_of_any_size_is_that_of_the_request_alone(
    path: Path, sampled_requests: list[Request], sampled_alone: list[list[int]], batch_tokens: int
) -> None:
    found = generated(load_engine(path, batch_tokens), sampled_requests)
    assert by_row(found) == sampled_alone


@pytest.mark.parametrize("seed", range(3))
def test_sampled_output_in_any_order_is_that_of_the_request_alone(
    path: Path, sampled_requests: list[Request], sampled_alone: list[list[int]], seed: int
) -> None:
    shuffled = random.Random(seed).sample(sampled_requests, len(sampled_requests))
    assert by_row(generated(load_engine(path, 3000), shuffled)) == sampled_alone


@pytest.mark.parametrize("seed", range(2))
def test_sampled_choices_that_rounding_changes_are_those_of_the_request_alone(rounding: HFEngine, seed: int) -> None:
    cold = greedy(temperature=1e-4, seed=seed)  # cold: rounding is large beside the temperature
    requests = one_bucket(prompts([20] * 24), cold)
    alone = [generated(rounding, [one])[one.id] for one in requests]
    assert by_row(generated(rounding, requests)) == alone


@pytest.mark.parametrize("other", [{"identity": "1"}, {"identity": 2}, {"seed": 1}], ids=str)
def test_another_id_or_seed_gives_another_sampled_output(tiny_model: Path, other: dict[str, Any]) -> None:
    engine, hot = load_engine(tiny_model), {"max_new_tokens": NEW, "temperature": 1.5}
    one = generated(engine, [request(PROMPTS[4], 1, SamplingParams(**hot))])
    identity, seed = other.get("identity", 1), other.get("seed", 0)
    another = generated(engine, [request(PROMPTS[4], identity, SamplingParams(**hot, seed=seed))])
    assert one[1] != another[identity]


def test_top_k_1_is_greedy(tiny_model: Path, llama_greedy: list[list[int]]) -> None:
    found = generated(load_engine(tiny_model), one_bucket(PROMPTS, greedy(temperature=2.0, top_k=1)))
    assert by_row(found) == llama_greedy


# Samples.


def samples_of(engine: HFEngine, requests: Sequence[Request]) -> dict[tuple[RowId, int], list[int]]:
    """Return the tokens of each sample, by id and index; fail if one was twice or had an error."""
    grown = list(grow(engine, ListSource(requests)))
    found = {(sequence.request.id, sequence.sample): sequence.token_ids for sequence in grown}
    assert len(found) == len(grown)
    assert [sequence.error for sequence in grown if sequence.error] == []
    return found


def hot(n: int, **values: Any) -> SamplingParams:
    return greedy(temperature=1.3, n=n, **values)


def test_every_sample_of_every_request_is_yielded_once(tiny_model: Path) -> None:
    requests = [request(PROMPTS[row], row, hot(row + 1), 200) for row in range(4)]
    found = samples_of(load_engine(tiny_model), requests)
    assert sorted(found, key=str) == [(row, sample) for row in range(4) for sample in range(row + 1)]


def test_the_samples_of_a_request_differ(tiny_model: Path) -> None:
    found = samples_of(load_engine(tiny_model), [request(PROMPTS[4], 0, hot(6))])
    assert len({tuple(tokens) for tokens in found.values()}) == 6


def test_a_sample_is_the_same_however_many_there_are(path: Path) -> None:
    few, many = (samples_of(load_engine(path), [request(PROMPTS[4], 0, hot(n))]) for n in (2, 6))
    assert {key: many[key] for key in few} == few


def test_the_first_sample_is_that_of_a_request_for_one(path: Path) -> None:
    engine = load_engine(path)
    assert (
        samples_of(engine, [request(PROMPTS[4], 0, hot(3))])[0, 0]
        == generated(engine, [request(PROMPTS[4], 0, hot(1))])[0]
    )


@pytest.mark.parametrize("batch_tokens", [1, 400, ALL])
def test_samples_in_batches_of_any_size_are_the_same(path: Path, batch_tokens: int) -> None:
    requests = [request(prompt, row, hot(3), len(PROMPTS[-1])) for row, prompt in enumerate(PROMPTS[::4])]
    found = samples_of(load_engine(path, batch_tokens), requests)
    assert found == {key: tokens for one in requests for key, tokens in samples_of(load_engine(path), [one]).items()}


def test_samples_that_rounding_changes_are_those_that_a_row_alone_gives(rounding: HFEngine) -> None:
    cold = greedy(temperature=1e-4, n=5)  # cold: rounding is large beside the temperature
    alone = [generated(rounding, [one]) for one in one_bucket(prompts([20] * 6), greedy(temperature=1e-4))]
    found = samples_of(rounding, one_bucket(prompts([20] * 6), cold))
    assert [found[row, 0] for row in range(6)] == [alone[row][row] for row in range(6)]


def test_the_samples_of_a_request_are_not_all_held_in_memory_at_once(tiny_model: Path) -> None:
    one = request(PROMPTS[4], 0, hot(7))
    memory = SmallMemory(tiny_model, 2, batch_tokens=2 * one.sample_tokens)
    assert (len(samples_of(memory.engine, [one])), memory.refused) == (7, [])


def test_a_request_counts_all_its_samples_where_a_source_bounds_them() -> None:
    assert request([1] * 5, 0, hot(4), 8).max_tokens == 4 * (8 + NEW)


# Penalties, least tokens and log probabilities.

FLAVOURS: list[dict[str, Any]] = [
    {"temperature": 1.1, "min_p": 0.05},
    {"repetition_penalty": 1.4},
    {"presence_penalty": 1.5, "frequency_penalty": 0.5},
    {"temperature": 0.9, "top_p": 0.9, "repetition_penalty": 0.8, "frequency_penalty": -0.5},
]


def test_the_repetition_penalty_is_that_of_plain_generate(path: Path) -> None:
    found = generated(load_engine(path), one_bucket(PROMPTS, greedy(repetition_penalty=1.3)))
    plain = Plain(path)
    assert by_row(found) == [plain.generate(prompt, NEW, repetition_penalty=1.3) for prompt in PROMPTS]


def test_min_new_tokens_is_that_of_plain_generate(tiny_model: Path, llama_greedy: list[list[int]]) -> None:
    eos = sorted({tokens[2] for tokens in llama_greedy})
    found = generated(load_engine(tiny_model, eos=eos), one_bucket(PROMPTS, greedy(min_new_tokens=6)))
    plain = Plain(tiny_model)
    assert by_row(found) == [
        plain.generate(prompt, NEW, min_new_tokens=6, eos_token_id=eos, pad_token_id=0) for prompt in PROMPTS
    ]


@pytest.mark.parametrize("flavour", FLAVOURS, ids=str)
@pytest.mark.parametrize("batch_tokens", [1000, ALL])
def test_with_other_parameters_output_in_any_batch_is_that_of_the_request_alone(
    path: Path, flavour: dict[str, Any], batch_tokens: int
) -> None:
    requests = one_bucket(PROMPTS, greedy(**flavour))
    alone = [generated(load_engine(path), [one])[one.id] for one in requests]
    assert by_row(generated(load_engine(path, batch_tokens), requests)) == alone


@pytest.mark.parametrize("flavour", FLAVOURS, ids=str)
def test_choices_with_other_parameters_that_rounding_changes_are_those_of_the_request_alone(
    rounding: HFEngine, flavour: dict[str, Any]
) -> None:
    requests = one_bucket(PROMPTS, greedy(**flavour))
    alone = [generated(rounding, [one])[one.id] for one in requests]
    assert by_row(generated(rounding, requests)) == alone


def test_a_stop_string_before_min_new_tokens_ends_nothing(tiny_model: Path, llama_greedy: list[list[int]]) -> None:
    at = first_at(llama_greedy[8], 2)
    stop, steps = letters(llama_greedy[8])[at], Steps()
    sampling = greedy(stop=(stop,), min_new_tokens=at + 2)
    generated(load_engine(tiny_model), [request(PROMPTS[8], 0, sampling)], steps)
    again = letters(llama_greedy[8]).find(stop, at + 1)
    assert steps.count == (NEW if again < 0 else again + 1)


@pytest.mark.parametrize("rows", [1, 6])
def test_log_probabilities_are_those_of_the_model(tiny_model: Path, rows: int) -> None:
    sampling = greedy(temperature=1.5, top_k=20, logprobs=3)
    grown = list(grow(load_engine(tiny_model), ListSource(one_bucket(PROMPTS[:rows], sampling))))
    model = AutoModelForCausalLM.from_pretrained(tiny_model)
    for sequence in grown:
        prompt = PROMPTS[sequence.request.row]
        with torch.no_grad():
            logits = model(torch.tensor([prompt + sequence.token_ids])).logits[0, len(prompt) - 1 : -1]
        exact = logits.double().log_softmax(dim=-1)
        chosen = exact.gather(1, torch.tensor(sequence.token_ids)[:, None])[:, 0]
        assert [chosen for chosen, _ in sequence.logprobs] == pytest.approx(chosen.tolist(), abs=1e-4)
        assert [[token for token, _ in top] for _, top in sequence.logprobs] == exact.topk(3).indices.tolist()
    assert len(grown) == rows


def test_rows_that_ask_for_no_log_probabilities_have_none(tiny_model: Path) -> None:
    sampling = [greedy(), greedy(logprobs=0)]
    requests = [request(PROMPTS[4], row, params) for row, params in enumerate(sampling)]
    grown = {g.request.row: len(g.logprobs) for g in grow(load_engine(tiny_model), ListSource(requests))}
    assert grown == {0: 0, 1: NEW}


# Where a row ends.


def test_each_row_ends_at_its_own_max_new_tokens(tiny_model: Path, llama_greedy: list[list[int]]) -> None:
    most = [1 + row % 4 for row in range(len(PROMPTS))]
    bucket = len(PROMPTS[-1])
    requests = [request(prompt, row, greedy(max_new_tokens=most[row]), bucket) for row, prompt in enumerate(PROMPTS)]
    found = generated(load_engine(tiny_model), requests)
    assert by_row(found) == [tokens[:n] for tokens, n in zip(llama_greedy, most, strict=True)]


def test_an_end_of_sequence_token_ends_its_row_and_no_other(tiny_model: Path, llama_greedy: list[list[int]]) -> None:
    at = first_at(llama_greedy[8], 2)
    eos = llama_greedy[8][at]
    found = generated(load_engine(tiny_model, eos=(eos,)), one_bucket(PROMPTS, greedy()))
    assert by_row(found) == [tokens[: tokens.index(eos) + 1] if eos in tokens else tokens for tokens in llama_greedy]


def test_each_of_several_end_of_sequence_tokens_ends_a_row(tiny_model: Path, llama_greedy: list[list[int]]) -> None:
    eos = [llama_greedy[row][first_at(llama_greedy[row], 2)] for row in (4, 8)]
    found = generated(load_engine(tiny_model, eos=eos), one_bucket([PROMPTS[4], PROMPTS[8]], greedy()))
    assert [found[0][-1], found[1][-1]] == eos


def test_a_row_that_ignores_end_of_sequence_goes_on(tiny_model: Path, llama_greedy: list[list[int]]) -> None:
    eos = llama_greedy[8][2]
    found = generated(load_engine(tiny_model, eos=(eos,)), one_bucket(PROMPTS, greedy(ignore_eos=True)))
    assert by_row(found) == llama_greedy


def test_a_row_that_ignores_end_of_sequence_stands_beside_one_that_does_not(
    tiny_model: Path, llama_greedy: list[list[int]]
) -> None:
    at = first_at(llama_greedy[8], 2)
    both = [request(PROMPTS[8], "goes on", greedy(ignore_eos=True)), request(PROMPTS[8], "ends", greedy())]
    found = generated(load_engine(tiny_model, eos=(llama_greedy[8][at],)), both)
    assert found == {"goes on": llama_greedy[8], "ends": llama_greedy[8][: at + 1]}


@pytest.mark.parametrize("ignore_eos", [False, True])
def test_a_stop_token_ends_a_row(tiny_model: Path, llama_greedy: list[list[int]], ignore_eos: bool) -> None:
    at = first_at(llama_greedy[8], 2)
    sampling = greedy(stop_token_ids=(llama_greedy[8][at],), ignore_eos=ignore_eos)
    found = generated(load_engine(tiny_model), [request(PROMPTS[8], 0, sampling)])
    assert found[0] == llama_greedy[8][: at + 1]


def test_generation_ends_when_all_rows_have(tiny_model: Path, llama_greedy: list[list[int]]) -> None:
    at = first_at(llama_greedy[8], 2)
    steps = Steps()
    sampling = greedy(stop_token_ids=(llama_greedy[8][at],))
    generated(load_engine(tiny_model), one_bucket([PROMPTS[8]] * 3, sampling), steps)
    assert steps.count == at + 1


@pytest.mark.parametrize("span", [1, 2, 3])
@pytest.mark.parametrize("row", [4, 6, 8])
def test_a_stop_string_of_some_tokens_ends_generation(
    tiny_model: Path, llama_greedy: list[list[int]], row: int, span: int
) -> None:
    text = letters(llama_greedy[row])
    stop = text[first_at(llama_greedy[row], 3) :][:span]
    steps = Steps()
    generated(load_engine(tiny_model), [request(PROMPTS[row], 0, greedy(stop=(stop,)))], steps)
    assert steps.count == text.index(stop) + span < NEW


def test_a_stop_string_that_ends_inside_a_token_ends_generation(
    tiny_model: Path, llama_greedy: list[list[int]]
) -> None:
    at, tokens = first_at(llama_greedy[8], 3), llama_greedy[8]
    engine = load_engine(tiny_model, decode=Spelled(lambda token: b"<%d>" % token))
    steps = Steps()
    stop = f"{tokens[at - 1]}><{tokens[at]}"  # without the ">" of its last token
    generated(engine, [request(PROMPTS[8], 0, greedy(stop=(stop,)))], steps)
    assert steps.count == at + 1


def test_a_stop_string_of_one_character_in_two_tokens_ends_generation(
    tiny_model: Path, llama_greedy: list[list[int]]
) -> None:
    at, tokens = first_at(llama_greedy[8], 3), llama_greedy[8]
    assert tokens[at - 1] != tokens[at]
    halves = {tokens[at - 1]: b"\xc3", tokens[at]: b"\xa9"}  # é
    engine = load_engine(tiny_model, decode=Spelled(lambda token: halves.get(token, b"x")))
    steps = Steps()
    generated(engine, [request(PROMPTS[8], 0, greedy(stop=("é",)))], steps)
    assert steps.count == at + 1


def test_any_of_several_stop_strings_ends_generation(tiny_model: Path, llama_greedy: list[list[int]]) -> None:
    text, at = letters(llama_greedy[8]), first_at(llama_greedy[8], 3)
    steps = Steps()
    generated(load_engine(tiny_model), [request(PROMPTS[8], 0, greedy(stop=("no", text[at])))], steps)
    assert steps.count == at + 1


def test_a_stop_string_is_looked_for_in_the_text_behind_the_prompt(
    tiny_model: Path, llama_greedy: list[list[int]]
) -> None:
    steps, sampling = Steps(), greedy(stop=(letters(llama_greedy[8])[0],))
    generated(load_engine(tiny_model, decode=Behind()), [request(PROMPTS[8], 0, sampling)], steps)
    assert steps.count == 1


def test_a_stop_string_ends_no_row_that_does_not_ask_for_it(tiny_model: Path, llama_greedy: list[list[int]]) -> None:
    stop = letters(llama_greedy[8])[3]
    requests = [request(PROMPTS[8], "stops", greedy(stop=(stop,))), request(PROMPTS[8], "goes on", greedy())]
    assert generated(load_engine(tiny_model), requests)["goes on"] == llama_greedy[8]


# Steps, and being told to stop.


@pytest.mark.parametrize("rows", [1, 4])
def test_on_step_is_called_at_every_token(tiny_model: Path, rows: int) -> None:
    steps = Steps()
    generated(load_engine(tiny_model), one_bucket(PROMPTS[:rows], greedy()), steps)
    assert steps.count == NEW


def stoppable(count: int) -> list[Request]:
    """Requests that end after 1, 2, … tokens, in one bucket."""
    return [request(PROMPTS[row], row, greedy(max_new_tokens=row + 1), 200) for row in range(count)]


@pytest.mark.parametrize("stop_at", [1, 3, 6])
def test_when_told_to_stop_only_the_finished_rows_are_yielded(tiny_model: Path, stop_at: int) -> None:
    found = generated(load_engine(tiny_model), stoppable(8), Steps(stop_at))
    assert sorted(found, key=str) == list(range(stop_at))


def test_when_told_to_stop_the_finished_rows_are_complete(tiny_model: Path, llama_greedy: list[list[int]]) -> None:
    found = generated(load_engine(tiny_model), stoppable(8), Steps(4))
    assert by_row(found) == [llama_greedy[row][: row + 1] for row in range(4)]


def test_when_told_to_stop_no_further_step_is_made(tiny_model: Path) -> None:
    steps = Steps(3)
    generated(load_engine(tiny_model), stoppable(8), steps)
    assert steps.count == 3


@pytest.mark.parametrize("batch_tokens", [1, ALL])
def test_when_told_to_stop_no_further_batch_is_begun(tiny_model: Path, batch_tokens: int) -> None:
    # At 1 token a batch the next would have to be pulled; at many it is of the same pull, in another bucket.
    requests = [request(PROMPTS[row], row, greedy(max_new_tokens=1), 50 + row) for row in range(4)]
    found = generated(load_engine(tiny_model, batch_tokens), requests, Steps(2))
    assert list(found) == [0, 1]


def test_when_told_to_stop_no_close_choice_is_generated_again(near_ties: Path) -> None:
    model = load(near_ties, CPU, "float32", threads=1)
    passes: list[int] = []
    model.register_forward_pre_hook(lambda _, args, given: passes.append(len(given["input_ids"])), with_kwargs=True)
    list(grow(HFEngine(model, (), letters, ALL), ListSource(one_bucket(PROMPTS, greedy())), Steps(1)))
    assert passes == [len(PROMPTS)]


class SlowLayer:
    """An engine of a model whose first layer takes long; counts how often the second is reached."""

    LONG_S = 0.1

    def __init__(self, path: Path) -> None:
        self.model = load(path, CPU, "float32", threads=1)
        first, second = self.model.model.layers
        first.register_forward_hook(lambda *_: time.sleep(2 * self.LONG_S))
        second.register_forward_hook(self._reached)
        self.engine = HFEngine(self.model, (), letters, ALL, self.LONG_S)
        self.reached = 0

    def _reached(self, *_: Any) -> None:
        self.reached += 1


def test_when_told_to_stop_a_step_that_takes_long_is_left_between_its_layers(tiny_model: Path) -> None:
    slow = SlowLayer(tiny_model)
    list(grow(slow.engine, ListSource(one_bucket(PROMPTS[:2], greedy())), Steps(1)))
    assert slow.reached == 0


def test_when_told_to_stop_inside_a_step_only_the_finished_rows_are_yielded(tiny_model: Path) -> None:
    # Asked in the first step before its second layer, and after it; then in the second step.
    assert list(generated(SlowLayer(tiny_model).engine, stoppable(3), Steps(3))) == [0]


def test_a_step_that_takes_long_changes_no_token(tiny_model: Path, llama_greedy: list[list[int]]) -> None:
    found = generated(SlowLayer(tiny_model).engine, one_bucket(PROMPTS[:2], greedy(max_new_tokens=2)))
    assert by_row(found) == [tokens[:2] for tokens in llama_greedy[:2]]


def test_an_engine_that_has_ended_is_asked_nothing_more_by_its_model(tiny_model: Path) -> None:
    slow, steps = SlowLayer(tiny_model), Steps()
    generated(slow.engine, [request(PROMPTS[0], 0, greedy(max_new_tokens=1))], steps)
    asked = steps.count
    slow.model(torch.tensor([PROMPTS[0]]))
    assert steps.count == asked


def test_an_engine_that_was_told_to_stop_can_be_used_again(tiny_model: Path, llama_greedy: list[list[int]]) -> None:
    engine = load_engine(tiny_model)
    generated(engine, one_bucket(PROMPTS, greedy()), Steps(3))
    assert by_row(generated(engine, one_bucket(PROMPTS, greedy()))) == llama_greedy


def test_an_engine_that_was_closed_can_be_used_again(tiny_model: Path, llama_greedy: list[list[int]]) -> None:
    engine = load_engine(tiny_model, batch_tokens=1)
    running = engine.generate(ListSource(one_bucket(PROMPTS, greedy())), Steps())
    next(iter(running))
    running.close()  # type: ignore[attr-defined]
    assert by_row(generated(engine, one_bucket(PROMPTS, greedy()))) == llama_greedy


class LateSource(ListSource):
    """A source whose requests come only when it is looked at for the third time."""

    def __init__(self, requests: Sequence[Request], looks: int = 3) -> None:
        super().__init__(requests)
        self.looks = looks

    def pull(self, num_tokens: int) -> list[Request]:
        self.looks -= 1
        return [] if self.looks > 0 else super().pull(num_tokens)


def test_an_engine_waits_for_requests_that_come_late(tiny_model: Path) -> None:
    source = LateSource(one_bucket(PROMPTS[:2], greedy()))
    assert [grown.request.id for grown in grow(load_engine(tiny_model), source)] == [0, 1]


def test_an_engine_that_waits_for_requests_is_told_to_stop(tiny_model: Path) -> None:
    source = LateSource(one_bucket(PROMPTS[:2], greedy()), looks=20)
    list(grow(load_engine(tiny_model), source, Steps(2)))
    assert source.looks > 0


def test_an_exhausted_source_ends_the_engine_at_once(tiny_model: Path) -> None:
    steps = Steps()
    assert (list(grow(load_engine(tiny_model), ListSource([]), steps)), steps.count) == ([], 0)


def test_a_close_choice_costs_steps_of_its_own_row_alone(near_ties: Path) -> None:
    together, alone = Steps(), Steps()
    engine = load_engine(near_ties)
    generated(engine, one_bucket(PROMPTS[:3], greedy()), together)
    generated(engine, one_bucket(PROMPTS[:1], greedy()), alone)
    assert (alone.count, together.count > NEW) == (NEW, True)


def test_in_bfloat16_nothing_is_generated_twice(near_ties: Path) -> None:
    engine = HFEngine(load(near_ties, CPU, "bfloat16", threads=1), (), letters, ALL)
    steps = Steps()
    generated(engine, one_bucket(PROMPTS, greedy()), steps)
    assert steps.count == NEW


# Sampling comes from the request only.


@pytest.mark.parametrize(
    "own",
    [
        {"repetition_penalty": 5.0},
        {"no_repeat_ngram_size": 1},
        {"do_sample": True, "temperature": 5.0, "top_k": 7},
        {"num_beams": 3},
        {"suppress_tokens": list(range(128))},
        {"begin_suppress_tokens": list(range(128))},
        {"max_new_tokens": 3},
        {"eos_token_id": list(range(258))},
        {"forced_eos_token_id": 7},
        {"stop_strings": ["a"]},
        {"guidance_scale": 3.0},
        {"num_return_sequences": 2, "do_sample": True},
    ],
    ids=lambda own: next(iter(own)),
)
def test_what_the_model_directory_says_of_generation_has_no_influence(
    tiny_model: Path, tmp_path: Path, llama_greedy: list[list[int]], own: dict[str, Any]
) -> None:
    folder = tmp_path / "model"
    shutil.copytree(tiny_model, folder)
    (folder / "generation_config.json").write_text(json.dumps(own))
    found = generated(load_engine(folder), one_bucket(PROMPTS, greedy()))
    assert by_row(found) == llama_greedy


# Batches.


@st.composite
def cut_sequences(draw: st.DrawFn) -> list[Grown]:
    """Sequences of few buckets, not always sorted by them, some of one request."""
    shape = st.tuples(st.sampled_from([1, 2, 5, 8]), st.integers(0, 8), st.integers(1, 9), st.sampled_from([1, 1, 4]))
    shapes = draw(st.lists(shape, max_size=30))
    if draw(st.booleans()):
        shapes.sort()
    return begin(
        request([1] * max(1, bucket - short), row, greedy(max_new_tokens=new, temperature=1, n=n), bucket)
        for row, (bucket, short, new, n) in enumerate(shapes)
    )


def held(batch: Sequence[Grown]) -> int:
    """Return how many tokens a batch holds when it ends, padding included."""
    return len(batch) * max(one.request.sample_tokens for one in batch)


ANY_BUDGET = st.integers(1, 80)


@settings(deadline=None)
@given(cut_sequences(), ANY_BUDGET)
def test_cutting_loses_no_sequence_and_keeps_the_order(sequences: list[Grown], batch_tokens: int) -> None:
    assert [one for batch in batches(sequences, batch_tokens) for one in batch] == sequences


@settings(deadline=None)
@given(cut_sequences(), ANY_BUDGET)
def test_a_batch_is_of_one_bucket(sequences: list[Grown], batch_tokens: int) -> None:
    assert all(len({one.request.bucket for one in batch}) == 1 for batch in batches(sequences, batch_tokens))


@settings(deadline=None)
@given(cut_sequences(), ANY_BUDGET)
def test_a_batch_of_more_than_one_sequence_keeps_to_the_budget(sequences: list[Grown], batch_tokens: int) -> None:
    assert all(len(batch) == 1 or held(batch) <= batch_tokens for batch in batches(sequences, batch_tokens))


@settings(deadline=None)
@given(cut_sequences(), ANY_BUDGET)
def test_a_batch_ends_only_where_the_next_sequence_does_not_go_with_it(
    sequences: list[Grown], batch_tokens: int
) -> None:
    cut = list(batches(sequences, batch_tokens))
    for batch, following in pairwise(cut):
        assert following[0].request.bucket != batch[0].request.bucket or held([*batch, following[0]]) > batch_tokens


# Failures.


def real_out_of_memory() -> Exception:
    """Return what torch raises where the CPU has not so much memory: 4 PB are beyond its address space."""
    with pytest.raises(RuntimeError) as caught:
        torch.empty(10**15)
    return caught.value


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (torch.cuda.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."), True),
        (MemoryError(), True),
        (RuntimeError("[enforce fail at alloc_cpu.cpp:117] DefaultCPUAllocator: not enough memory: you tried"), True),
        (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"), True),
        (RuntimeError("CUDA error: out of memory\nCUDA kernel errors might be reported asynchronously"), True),
        (RuntimeError("CUDA error: an illegal memory access was encountered"), False),
        (RuntimeError("shape mismatch"), False),
        (RuntimeError(), False),
        (ValueError("not enough memory"), False),
        (IndexError("index out of range in self"), False),
    ],
    ids=repr,
)
def test_what_is_out_of_memory(error: Exception, expected: bool) -> None:
    assert is_out_of_memory(error) == expected


def test_what_the_cpu_allocator_raises_is_out_of_memory() -> None:
    assert is_out_of_memory(real_out_of_memory())


@pytest.fixture
def poisoned(tiny_model: Path) -> Iterator[tuple[HFEngine, Any]]:
    """An engine with the embeddings of its model, to be poisoned."""
    model = load(tiny_model, CPU, "float32", threads=1)
    with torch.no_grad():
        yield HFEngine(model, (), letters, ALL), model.get_input_embeddings().weight


def poison_token(all_prompts: Sequence[Sequence[int]], row: int) -> int:
    """Return a token that stands in this prompt alone."""
    others = {token for index, prompt in enumerate(all_prompts) if index != row for token in prompt}
    return next(token for token in all_prompts[row] if token not in others)


def errors_of(engine: HFEngine, requests: Sequence[Request]) -> dict[RowId, str | None]:
    return {grown.request.id: grown.error for grown in grow(engine, ListSource(requests))}


@pytest.mark.parametrize("bad", [0, 3, 5])
@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_a_row_whose_logits_are_no_numbers_is_the_only_error(
    poisoned: tuple[HFEngine, Any], bad: int, value: float
) -> None:
    engine, embeddings = poisoned
    embeddings[poison_token(PROMPTS[:6], bad)] = value
    errors = errors_of(engine, one_bucket(PROMPTS[:6], greedy()))
    assert [row for row in range(6) if errors[row] is not None] == [bad]


def test_a_row_whose_logits_are_no_numbers_says_what_to_try(poisoned: tuple[HFEngine, Any]) -> None:
    engine, embeddings = poisoned
    embeddings[PROMPTS[4][0]] = torch.nan
    assert "try another dtype" in (errors_of(engine, [request(PROMPTS[4])])[0] or "")


@pytest.mark.parametrize("token", [0, 256, 257])
def test_a_token_that_stands_in_no_prompt_makes_no_row_an_error(poisoned: tuple[HFEngine, Any], token: int) -> None:
    engine, embeddings = poisoned
    embeddings[token] = torch.nan  # were it the padding, shorter rows would have it behind their mask
    errors = errors_of(engine, one_bucket([[5, 6], [7, 8, 9, 10, 11]], greedy(max_new_tokens=1)))
    assert errors == {0: None, 1: None}


def test_rows_beside_one_whose_logits_are_no_numbers_are_what_they_were(
    poisoned: tuple[HFEngine, Any], llama_greedy: list[list[int]]
) -> None:
    engine, embeddings = poisoned
    token = poison_token(PROMPTS[:6], 3)
    embeddings[token] = torch.nan
    grown = list(grow(engine, ListSource(one_bucket(PROMPTS[:6], greedy()))))
    safe = [row for row in range(6) if row != 3 and token not in llama_greedy[row]]
    assert {g.request.id: g.token_ids for g in grown if g.request.id in safe} == {r: llama_greedy[r] for r in safe}


def test_logits_that_become_no_numbers_in_the_middle_are_an_error(
    poisoned: tuple[HFEngine, Any], llama_greedy: list[list[int]]
) -> None:
    engine, embeddings = poisoned
    at = first_at(llama_greedy[4], 3)
    assert llama_greedy[4][at] not in PROMPTS[4]
    embeddings[llama_greedy[4][at]] = torch.nan
    [grown] = grow(engine, ListSource([request(PROMPTS[4], 0, greedy())]))
    assert grown.error is not None
    assert grown.token_ids[: at + 1] == llama_greedy[4][: at + 1]


def test_logits_that_are_no_numbers_after_the_end_of_a_row_are_no_error(
    poisoned: tuple[HFEngine, Any], llama_greedy: list[list[int]]
) -> None:
    engine, embeddings = poisoned
    at = first_at(llama_greedy[4], 3)
    last = llama_greedy[4][at]
    assert last not in PROMPTS[4] + PROMPTS[5] + llama_greedy[5]
    embeddings[last] = torch.nan
    ends = request(PROMPTS[4], "ends", greedy(max_new_tokens=at + 1), 50)
    assert errors_of(engine, [ends, request(PROMPTS[5], "goes on", greedy(), 50)]) == {"ends": None, "goes on": None}


def test_a_row_with_a_close_choice_and_then_no_numbers_is_yielded_once(tiny_model: Path) -> None:
    model = load(tiny_model, CPU, "float32", threads=1)
    engine = HFEngine(model, (), letters, ALL)
    first = generated(engine, [request(PROMPTS[4], 0, greedy())])[0][0]
    with torch.no_grad():
        model.lm_head.weight[257] = model.lm_head.weight[first]  # a twin makes the first choice close
        model.get_input_embeddings().weight[first] = torch.nan
    grown = list(grow(engine, ListSource(one_bucket(PROMPTS[4:6], greedy()))))
    assert sorted([g.request.id for g in grown], key=str) == [0, 1]


class RecordingSource(ListSource):
    """A source that hands out a few requests at a time and remembers how many tokens were asked for."""

    def __init__(self, requests: Sequence[Request], most: int) -> None:
        super().__init__(requests)
        self.asked: list[int] = []
        self._most = most

    def pull(self, num_tokens: int) -> list[Request]:
        self.asked.append(num_tokens)
        taken, self.requests = self.requests[: self._most], self.requests[self._most :]
        return taken


class SmallMemory:
    """A hook before the forward pass of a model: more than `most` rows do not fit."""

    def __init__(self, path: Path, most: int, error: type[Exception] = RuntimeError, batch_tokens: int = ALL) -> None:
        model = load(path, CPU, "float32", threads=1)
        model.register_forward_pre_hook(self._before, with_kwargs=True)
        self.engine = HFEngine(model, (), letters, batch_tokens)
        self.refused: list[int] = []
        self._most = most
        self._error = error

    def _before(self, _: Any, args: Any, kwargs: dict[str, Any]) -> None:
        rows = len(kwargs["input_ids"])
        if rows > self._most:
            self.refused.append(rows)
            raise self._error("DefaultCPUAllocator: not enough memory: you tried to allocate 8 bytes.")


@pytest.mark.parametrize(
    ("most", "error"),
    [(1, RuntimeError), (2, RuntimeError), (3, RuntimeError), (3, MemoryError), (3, torch.cuda.OutOfMemoryError)],
)
def test_when_memory_is_short_all_rows_still_complete(
    tiny_model: Path, llama_greedy: list[list[int]], most: int, error: type[Exception]
) -> None:
    memory = SmallMemory(tiny_model, most, error)
    assert by_row(generated(memory.engine, one_bucket(PROMPTS[:7], greedy()))) == llama_greedy[:7]


def test_when_memory_is_short_later_pulls_ask_for_fewer_tokens(tiny_model: Path) -> None:
    source = RecordingSource(one_bucket(PROMPTS, greedy()), most=4)
    list(grow(SmallMemory(tiny_model, 2).engine, source))
    assert source.asked[1] < source.asked[0]


def test_when_memory_is_not_short_all_pulls_ask_for_the_same(tiny_model: Path) -> None:
    source = RecordingSource(one_bucket(PROMPTS, greedy()), most=4)
    list(grow(SmallMemory(tiny_model, 4).engine, source))
    assert set(source.asked) == {ALL}


def test_once_the_budget_has_shrunk_no_more_batches_fail(tiny_model: Path) -> None:
    requests = one_bucket([PROMPTS[4]] * 24, greedy())
    memory = SmallMemory(tiny_model, 4, batch_tokens=8 * requests[0].max_tokens)
    generated(memory.engine, requests)
    assert memory.refused == [8]


def test_the_budget_shrinks_to_no_less_than_half_of_what_fits(tiny_model: Path) -> None:
    requests = one_bucket([PROMPTS[4]] * 32, greedy())
    most = requests[0].max_tokens
    source = RecordingSource(requests, most=16)
    list(grow(SmallMemory(tiny_model, 2, batch_tokens=16 * most).engine, source))
    assert source.asked[1] >= most


def test_a_row_that_does_not_fit_in_memory_alone_is_an_error(tiny_model: Path) -> None:
    errors = errors_of(SmallMemory(tiny_model, 0).engine, one_bucket(PROMPTS[:3], greedy()))
    assert errors == dict.fromkeys(range(3), "it does not fit in memory, even alone")


def test_a_row_that_the_model_refuses_is_the_only_error(tiny_model: Path, llama_greedy: list[list[int]]) -> None:
    all_prompts = [*PROMPTS[:5], [999], *PROMPTS[5:]]  # no such token: the embedding raises
    grown = list(grow(load_engine(tiny_model), ListSource(one_bucket(all_prompts, greedy()))))
    assert [g.request.id for g in grown if g.error] == [5]


def test_rows_beside_one_that_the_model_refuses_are_what_they_were(
    tiny_model: Path, llama_greedy: list[list[int]]
) -> None:
    all_prompts = [*PROMPTS, [999]]
    grown: list[Grown] = list(grow(load_engine(tiny_model), ListSource(one_bucket(all_prompts, greedy()))))
    assert by_row({g.request.id: g.token_ids for g in grown if not g.error}) == llama_greedy


@pytest.mark.parametrize(("most", "expected"), [(None, [2]), (49, [2]), (48, [1, 1])])
def test_only_sequences_that_stay_short_enough_are_together(most: int | None, expected: list[int]) -> None:
    both = begin([request([5] * length, length, SamplingParams(max_new_tokens=9), bucket=40) for length in (20, 40)])
    assert [len(batch) for batch in batches(both, 1000, most)] == expected


@pytest.mark.parametrize("rope", ["dynamic", "longrope"])
def test_positions_whose_frequencies_change_with_length_are_those_of_a_prompt_alone(rope: str) -> None:
    both, sampling = prompts((40, 70)), SamplingParams(max_new_tokens=8)
    found = generated(HFEngine(tiny(with_rope(rope)), (), letters, 100_000), one_bucket(both, sampling))
    assert [found[0], found[1]] == plain_of(tiny(with_rope(rope)), both, 8)
