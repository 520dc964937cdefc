"""What the configuration of an encoder-decoder says of its two sides."""

import json
from pathlib import Path
from typing import Any

import pytest
import transformers as hf

from hpc.exit import Refusal
from hpc.model.description import Description, describe

_START: dict[str, Any] = {"decoder_start_token_id": 2}


def described(folder: Path, config: Any, generation: dict[str, Any] | None = None, **asked: Any) -> Description:
    """Describe a model that has a config.json and, if given, a generation_config.json."""
    config.save_pretrained(folder)
    if generation is not None:
        (folder / "generation_config.json").write_text(json.dumps(generation))
    return describe(folder, **asked)


@pytest.mark.parametrize(
    ("config", "source", "output"),
    [
        (hf.T5Config(), None, None),
        (hf.BartConfig(max_position_embeddings=77), 77, 77),
        (hf.MarianConfig(max_position_embeddings=77), 77, 77),
        (hf.LEDConfig(max_encoder_position_embeddings=99, max_decoder_position_embeddings=33), 99, 33),
    ],
    ids=lambda value: getattr(value, "model_type", None),
)
def test_each_side_has_its_own_limit(tmp_path: Path, config: Any, source: int | None, output: int | None) -> None:
    found = described(tmp_path, config, _START)
    assert (found.context_tokens, found.output_tokens) == (source, output)


def test_each_side_has_its_own_vocabulary(tmp_path: Path) -> None:
    config = hf.MarianConfig(
        vocab_size=77, decoder_vocab_size=55, pad_token_id=1, share_encoder_decoder_embeddings=False
    )
    found = described(tmp_path, config, _START)
    assert (found.vocab_size, found.output_vocab_size) == (77, 55)


def test_a_causal_model_has_no_rules_of_a_decoder(tiny_model: Path) -> None:
    assert describe(tiny_model).decoder_rules is None


def test_the_first_token_of_an_older_model_stands_in_its_config(tmp_path: Path) -> None:
    hf.BartConfig().save_pretrained(tmp_path)
    path = tmp_path / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "decoder_start_token_id": 9, "forced_bos_token_id": 8}))
    rules = describe(tmp_path).decoder_rules
    assert rules is not None
    assert (rules.start, rules.forced_bos) == (9, 8)


def test_an_encoder_decoder_that_does_not_say_how_its_output_begins_is_refused(tmp_path: Path) -> None:
    with pytest.raises(Refusal, match='no "decoder_start_token_id"'):
        described(tmp_path, hf.T5Config(), {})


def test_how_tokens_are_chosen_is_not_heeded_and_is_named(tmp_path: Path) -> None:
    asked = {**_START, "num_beams": 4, "max_length": 142, "bad_words_ids": [[1], [2, 3]]}
    assert described(tmp_path, hf.T5Config(), asked).unheeded == (
        "num_beams 4",
        "max_length 142",
        "bad_words_ids of several tokens",
    )


def test_what_changes_nothing_is_not_named(tmp_path: Path) -> None:
    values = {**_START, "num_beams": 1, "length_penalty": 1.0, "forced_eos_token_id": 1}
    assert described(tmp_path, hf.T5Config(), values).unheeded == ()


def test_context_tokens_bound_the_source(tmp_path: Path) -> None:
    found = described(tmp_path, hf.T5Config(), _START, context_tokens=50)
    assert (found.context_tokens, found.output_tokens) == (50, None)


def test_more_context_tokens_than_a_table_of_positions_has_are_refused(tmp_path: Path) -> None:
    with pytest.raises(Refusal, match=r'"context_tokens" is 78; .* must be at most 77'):
        described(tmp_path, hf.BartConfig(max_position_embeddings=77), _START, context_tokens=78)
