"""What a model needs is told from its files, in the type that it is loaded in."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from hpc.model.needs import Needs, needs


def model(folder: Path, config: dict[str, Any], **tensors: torch.Tensor) -> Path:
    (folder / "config.json").write_text(json.dumps(config))
    save_file(tensors, folder / "model.safetensors")
    return folder


@pytest.mark.parametrize(("dtype", "each"), [("float32", 4), ("bfloat16", 2), ("float16", 2), ("auto", 2)])
def test_weights_are_counted_in_the_type_that_they_are_loaded_in(tmp_path: Path, dtype: str, each: int) -> None:
    made = model(tmp_path, {"num_attention_heads": 9}, a=torch.zeros(10, 3), b=torch.zeros(5, dtype=torch.float16))
    assert needs(made, dtype) == Needs(35 * each, 9)


def test_numbers_that_are_no_floats_stay_as_they_are(tmp_path: Path) -> None:
    made = model(tmp_path, {}, a=torch.zeros(6, dtype=torch.int32), b=torch.zeros(5, dtype=torch.uint8))
    assert needs(made, "bfloat16") == Needs(29, None)


def test_quantized_weights_stay_as_they_are(tmp_path: Path) -> None:
    made = model(
        tmp_path, {"quantization_config": {}, "n_head": 8}, a=torch.zeros(6), b=torch.zeros(4, dtype=torch.int8)
    )
    assert needs(made, "bfloat16") == Needs(28, 8, quantized=True)


def test_the_heads_of_a_model_with_parts_are_those_of_its_text(tmp_path: Path) -> None:
    made = model(tmp_path, {"text_config": {"num_attention_heads": 16}}, a=torch.zeros(1))
    assert needs(made, "float32") == Needs(4, 16)


def test_what_no_devices_share_is_told_too(tmp_path: Path) -> None:
    config = {"num_attention_heads": 24, "num_key_value_heads": 8, "is_encoder_decoder": True}
    found = needs(model(tmp_path, config, a=torch.zeros(1)), "float32")
    assert found == Needs(4, 24, 8, has_encoder=True)


def test_a_folder_that_holds_no_model_tells_nothing(tmp_path: Path) -> None:
    assert needs(tmp_path, "float32") is None


def test_a_real_model_needs_what_is_loaded_of_it(tiny_model: Path) -> None:
    from hpc.model.load import weights_of

    counted, found = weights_of(tiny_model, "float32"), needs(tiny_model, "float32")
    assert counted is not None
    assert found is not None
    assert found.weight_bytes == counted[0]
