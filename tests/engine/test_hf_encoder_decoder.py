"""The hf engine with tiny random encoder-decoders in float32, against plain `generate` of one source at a time."""

import functools
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch

from hpc.engine.decoder import DecoderRules
from hpc.engine.hf import HFEngine
from hpc.engine.sequence import Sequence as Grown
from hpc.request import Request
from hpc.sampling_params import SamplingParams
from tests.engine.models import CONFIGS, ENCODER_DECODERS, tiny
from tests.engine.oracle import Steps, generated, grow, letters, one_bucket, plain_output, prompts, request
from tests.fakes import Behind, ListSource

NEW = 10
ALL = 100_000
KINDS = sorted(ENCODER_DECODERS)
SOURCES = [[3 + token for token in source] for source in prompts((3, 20, 40, 41, 90))]
"""Above what a model may take for padding."""


@functools.cache
def made(kind: str) -> Any:
    """Return a model of a kind, which must not be changed."""
    return tiny(ENCODER_DECODERS[kind])


def rules_of_kind(kind: str, **values: Any) -> DecoderRules:
    return DecoderRules(ENCODER_DECODERS[kind].decoder_start_token_id or 0, **values)


def engine_of(
    kind: str, batch_tokens: int = ALL, eos: Sequence[int] = (), decode: Any = letters, **rules: Any
) -> HFEngine:
    return HFEngine(made(kind), eos, decode, batch_tokens, rules=rules_of_kind(kind, **rules))


def plain(kind: str, source: Sequence[int], new: int = NEW, **values: Any) -> list[int]:
    """Return what `generate` writes for one source."""
    return plain_output(made(kind), rules_of_kind(kind).start, source, new, **values)


@functools.cache
def t5_greedy() -> list[list[int]]:
    """Return the greedy output of the T5 for each source, by plain `generate`."""
    return [plain("t5", source) for source in SOURCES]


def greedy(**values: Any) -> SamplingParams:
    return SamplingParams(**{"max_new_tokens": NEW, **values})


def batched(engine: HFEngine, sampling: SamplingParams) -> list[list[int]]:
    found = generated(engine, one_bucket(SOURCES, sampling))
    return [found[row] for row in range(len(SOURCES))]


def grown_of(engine: HFEngine, requests: Sequence[Request]) -> dict[Any, Grown]:
    return {(sequence.request.id, sequence.sample): sequence for sequence in grow(engine, ListSource(requests))}


# The batch changes nothing.


@pytest.mark.parametrize("kind", KINDS)
def test_greedy_output_of_a_padded_batch_equals_plain_generate(kind: str) -> None:
    expected = [plain(kind, source) for source in SOURCES]
    assert len({tuple(tokens) for tokens in expected}) > 2  # the source tells in the output
    assert batched(engine_of(kind), greedy()) == expected


@pytest.mark.parametrize("kind", KINDS)
def test_sampled_output_of_a_padded_batch_is_that_of_the_source_alone(kind: str) -> None:
    sampling = greedy(temperature=0.9, top_p=0.9)
    alone = [generated(engine_of(kind), [one])[one.id] for one in one_bucket(SOURCES, sampling)]
    assert batched(engine_of(kind), sampling) == alone


def test_every_sample_is_the_same_however_many_there_are() -> None:
    hot = greedy(temperature=1.3)
    few, many = (
        {key: one.token_ids for key, one in grown_of(engine_of("t5"), one_bucket(SOURCES, replace(hot, n=n))).items()}
        for n in (1, 3)
    )
    assert len(many) == 3 * len(SOURCES)
    assert {key: many[key] for key in few} == few


# What ends a row.


def test_each_row_ends_at_its_own_max_new_tokens() -> None:
    requests = [request(source, row, greedy(max_new_tokens=1 + row), 90) for row, source in enumerate(SOURCES)]
    found = generated(engine_of("t5"), requests)
    assert [found[row] for row in range(5)] == [tokens[: 1 + row] for row, tokens in enumerate(t5_greedy())]


def test_an_end_of_sequence_token_ends_its_row_and_no_other() -> None:
    eos = t5_greedy()[2][1]
    expected = [tokens[: tokens.index(eos) + 1] if eos in tokens else tokens for tokens in t5_greedy()]
    assert batched(engine_of("t5", eos=(eos,)), greedy()) == expected


def test_a_stop_string_ends_generation() -> None:
    steps, stop = Steps(), letters(t5_greedy()[2])[1]
    generated(engine_of("t5"), [request(SOURCES[2], 0, greedy(stop=(stop,)))], steps)
    assert steps.count == 1 + letters(t5_greedy()[2]).index(stop)


def test_a_stop_string_is_looked_for_in_an_output_that_begins_anew() -> None:
    """The decoder leaves out what stands at the beginning, and a first token has no text before it."""
    first = Behind()(t5_greedy()[2][:1], SOURCES[2])
    steps = Steps()
    generated(engine_of("t5", decode=Behind()), [request(SOURCES[2], 0, greedy(stop=(first,)))], steps)
    assert steps.count > 1


# What the parameters say.


def test_the_repetition_penalty_counts_what_the_decoder_wrote_alone() -> None:
    expected = [plain("t5", source, repetition_penalty=1.5) for source in SOURCES]
    assert expected != t5_greedy()
    assert batched(engine_of("t5"), greedy(repetition_penalty=1.5)) == expected


def test_min_new_tokens_is_that_of_plain_generate() -> None:
    eos = sorted({tokens[1] for tokens in t5_greedy()})
    expected = [plain("t5", source, min_new_tokens=6, eos_token_id=eos) for source in SOURCES]
    assert batched(engine_of("t5", eos=eos), greedy(min_new_tokens=6)) == expected


def test_log_probabilities_are_those_of_the_decoder() -> None:
    found = grown_of(engine_of("t5"), one_bucket(SOURCES, greedy(logprobs=2)))
    for row, source in enumerate(SOURCES):
        tokens = found[row, 0].token_ids
        with torch.no_grad():
            written = torch.tensor([[0, *tokens[:-1]]])
            logits = made("t5")(input_ids=torch.tensor([source]), decoder_input_ids=written).logits[0]
        exact = logits.double().log_softmax(dim=-1)
        chosen = exact.gather(1, torch.tensor(tokens)[:, None])[:, 0].tolist()
        assert [value for value, _ in found[row, 0].logprobs] == pytest.approx(chosen, abs=1e-3)  # many tokens at once


# The rules of the decoder.


def test_the_first_token_that_the_model_forces_is_that_of_plain_generate() -> None:
    expected = [plain("t5", source, forced_bos_token_id=77) for source in SOURCES]
    assert expected != t5_greedy()
    assert batched(engine_of("t5", forced_bos=77), greedy()) == expected


def test_a_rows_first_token_goes_before_the_models() -> None:
    requests = [
        request(SOURCES[1], "own", greedy(forced_bos_token_id=78), 40),
        request(SOURCES[2], "the model's", greedy(), 40),
    ]
    found = generated(engine_of("t5", forced_bos=77), requests)
    assert found == {
        "own": plain("t5", SOURCES[1], forced_bos_token_id=78),
        "the model's": plain("t5", SOURCES[2], forced_bos_token_id=77),
    }


def test_a_forced_token_has_the_log_probability_0() -> None:
    [grown] = grown_of(engine_of("t5", forced_bos=77), [request(SOURCES[1], 0, greedy(logprobs=1))]).values()
    assert grown.logprobs[0] == (0.0, ((77, 0.0),))


def test_the_last_token_that_the_model_forces_stands_at_each_rows_limit() -> None:
    requests = [request(source, row, greedy(max_new_tokens=3 + row), 90) for row, source in enumerate(SOURCES)]
    found = generated(engine_of("t5", eos=(511,), forced_eos=511), requests)
    expected = [plain("t5", source, 3 + row, forced_eos_token_id=511) for row, source in enumerate(SOURCES)]
    assert [found[row] for row in range(5)] == expected
    assert {tokens[-1] for tokens in expected} == {511}


def test_a_row_that_a_forced_token_ends_is_marked_as_cut() -> None:
    eos = t5_greedy()[2][1]
    rows = [request(SOURCES[2], "ends", greedy(), 40), request(SOURCES[2], "cut", greedy(max_new_tokens=1), 40)]
    found = grown_of(engine_of("t5", eos=(eos,), forced_eos=eos), rows)
    assert [found["ends", 0].cut, found["cut", 0].cut] == [False, True]


@pytest.mark.parametrize("values", [{"ignore_eos": True}, {"min_new_tokens": NEW}], ids=str)
def test_no_ending_token_is_forced_where_a_row_may_not_end(values: dict[str, Any]) -> None:
    assert batched(engine_of("t5", eos=(511,), forced_eos=511), greedy(**values)) == t5_greedy()


def test_a_banned_token_is_never_generated() -> None:
    banned = t5_greedy()[2][1]
    expected = [plain("t5", source, bad_words_ids=[[banned]]) for source in SOURCES]
    assert expected != t5_greedy()
    assert batched(engine_of("t5", banned=(banned,)), greedy()) == expected


def test_a_model_and_rules_of_two_kinds_are_refused() -> None:
    with pytest.raises(ValueError, match="decoder rules"):
        HFEngine(made("t5"), (), letters, ALL)
    with pytest.raises(ValueError, match="decoder rules"):
        HFEngine(tiny(CONFIGS["llama"]), (), letters, ALL, rules=DecoderRules(0))
