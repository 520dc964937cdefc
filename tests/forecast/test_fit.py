"""A plan says whether GPUs hold a model, and how many do."""

import pytest

from hpc.forecast.fit import Fit, fit
from hpc.model.needs import Needs

GIB = 2**30


def found(weights_gib: float, gpu_gib: float | None, gpus: int = 1, node: int | None = None, heads: int = 64) -> Fit:
    return fit(Needs(int(weights_gib * GIB), heads), None if gpu_gib is None else int(gpu_gib * GIB), gpus, node)


@pytest.mark.parametrize(
    ("weights_gib", "gpu_gib", "needed"), [(14, 80, 1), (64, 80, 1), (65, 80, 2), (140, 80, 4), (330, 80, 8)]
)
def test_the_fewest_gpus_that_hold_a_model_leave_a_fifth_of_each(
    weights_gib: float, gpu_gib: float, needed: int
) -> None:
    assert found(weights_gib, gpu_gib).needed == needed


@pytest.mark.parametrize(
    ("heads", "node", "needed"), [(64, None, 4), (9, None, 3), (40, None, 4), (64, 6, 2), (7, 6, 1), (12, 6, 6)]
)
def test_they_divide_the_heads_and_the_gpus_of_a_node(heads: int, node: int | None, needed: int) -> None:
    weights = {1: 40, 2: 100, 3: 140, 4: 140, 6: 200}[needed]
    assert found(weights, 80, heads=heads, node=node).needed == needed


@pytest.mark.parametrize(("heads", "kv_heads", "needed"), [(24, 8, 4), (28, 4, 4), (28, 14, 7), (24, 1, 3), (9, 3, 3)])
def test_they_share_the_heads_of_keys_and_values_evenly_too(heads: int, kv_heads: int, needed: int) -> None:
    weights = {3: 140, 4: 140, 7: 400}[needed]
    assert fit(Needs(weights * GIB, heads, kv_heads), 80 * GIB, 1, None).needed == needed


def test_an_encoder_decoder_stays_on_one_gpu() -> None:
    said = str(fit(Needs(140 * GIB, 64, has_encoder=True), 80 * GIB, 1, 8))
    assert "an encoder-decoder stays on one GPU" in said
    assert "--replica-gpus" not in said


def test_what_does_not_fit_is_said_with_the_number_that_does() -> None:
    said = str(found(140, 80))
    assert "140.0 GiB of them do not fit a GPU of 80.0 GiB" in said
    assert "--engine vllm --replica-gpus 4 (35.0 GiB on each)" in said


def test_what_fits_on_the_gpus_of_a_rank_is_said() -> None:
    assert str(found(140, 80, gpus=4)) == "weights: 140.0 GiB, 35.0 GiB of them on a GPU of 80.0 GiB"


def test_that_fewer_would_do_is_said() -> None:
    assert "; 1 would do (--replica-gpus)" in str(found(14, 80, gpus=4))


def test_a_model_that_no_node_holds_is_said_to_be_too_large() -> None:
    assert "no number of GPUs of a node does" in str(found(700, 80, node=8))


def test_where_nothing_says_the_memory_of_a_gpu_the_flag_is_named() -> None:
    assert str(found(140, None)).endswith("say its memory with --gpu-gib")
