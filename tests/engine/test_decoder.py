"""The rules of a decoder, as a generation config of transformers says them."""

from typing import Any

import pytest
from transformers import GenerationConfig

from hpc.engine.decoder import DecoderRules, rules_of
from hpc.sampling_params import SamplingParams


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ({"decoder_start_token_id": 2}, DecoderRules(2)),
        ({"decoder_start_token_id": 2, "bos_token_id": 0}, DecoderRules(2)),
        ({"bos_token_id": 5}, DecoderRules(5)),
        ({"decoder_start_token_id": 0, "forced_bos_token_id": 7}, DecoderRules(0, forced_bos=7)),
        ({"decoder_start_token_id": 0, "forced_eos_token_id": [3, 4]}, DecoderRules(0, forced_eos=3)),
        ({"decoder_start_token_id": 0, "bad_words_ids": [[9], [1, 2]]}, DecoderRules(0, banned=(9,))),
        ({"decoder_start_token_id": 0, "suppress_tokens": [8], "bad_words_ids": [[9]]}, DecoderRules(0, banned=(8, 9))),
    ],
)
def test_the_rules_are_those_of_the_generation_config(values: dict[str, Any], expected: DecoderRules) -> None:
    assert rules_of(GenerationConfig(**values)) == expected


def test_a_config_that_names_no_first_token_has_no_rules() -> None:
    assert rules_of(GenerationConfig(eos_token_id=2)) is None


def test_a_row_of_one_token_begins_with_the_forced_one() -> None:
    assert DecoderRules(0, forced_bos=7, forced_eos=2).forced(SamplingParams(max_new_tokens=1), 0, {2}) == 7
