"""The keywords of a Python call are those of a job that are about model, prompts and engine."""

import numpy as np
import pytest

from hpc.api.parameters import TAKEN, make_job
from hpc.cli.flags import GROUPS
from hpc.sampling_params import SamplingParams

OF_RANKS = ("tail",)


@pytest.mark.parametrize("group", ["model", "prompts", "engine", "native engine", "hf engine", "vllm engine"])
def test_every_knob_of_model_and_engine_is_a_keyword(group: str) -> None:
    assert [name for name in GROUPS[group] if name not in (*TAKEN, *OF_RANKS, "model")] == []


def test_keywords_are_told_apart() -> None:
    job = make_job("m", {"dtype": "float32", "temperature": 0.5, "stop": "x", "logprobs": None})
    assert (job.dtype, job.sampling) == ("float32", SamplingParams(temperature=0.5, stop=("x",)))


def test_keywords_go_before_a_whole_set_of_parameters() -> None:
    whole = SamplingParams(max_new_tokens=9, temperature=1)
    assert make_job("m", {"sampling": whole, "max_new_tokens": 3}).sampling == SamplingParams(3, 1.0)


def test_a_whole_set_of_parameters_may_be_a_mapping() -> None:
    assert make_job("m", {"sampling": {"max_new_tokens": 3}}).sampling == SamplingParams(3)


def test_none_counts_as_not_given() -> None:
    assert make_job("m", {"dtype": None, "temperature": None}) == make_job("m", {})


def test_a_number_of_numpy_is_a_number() -> None:
    given = {"max_new_tokens": np.int64(3), "temperature": np.float32(0.5), "stop_token_ids": np.array([1, 2])}
    assert make_job("m", given).sampling == SamplingParams(3, 0.5, stop_token_ids=(1, 2))
