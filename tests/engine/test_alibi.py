"""What positions add to scores: transformers' own slopes, as far as anybody asks."""

import pytest
import torch
from transformers.models.bloom.modeling_bloom import build_alibi_tensor
from transformers.models.falcon.modeling_falcon import build_alibi_tensor as falcons
from transformers.models.mpt.modeling_mpt import build_mpt_alibi_tensor

from hpc.engine.alibi import Alibi, slopes
from tests.engine.oracle import CPU

HEADS = [1, 2, 3, 12, 16, 71, 112]
ALL = torch.ones(1, 2000, dtype=torch.int64)


@pytest.mark.parametrize("heads", HEADS)
def test_scores_are_blooms(heads: int) -> None:
    own = build_alibi_tensor(ALL, heads, torch.float32)[:, 0]
    assert torch.allclose(Alibi(heads, CPU).scores(2000)[:, :2000], own, rtol=1e-6)


@pytest.mark.parametrize("heads", HEADS)
def test_slopes_are_mpts(heads: int) -> None:
    assert torch.allclose(-build_mpt_alibi_tensor(heads, 2)[:, 0, 0], slopes(heads), rtol=1e-6)


@pytest.mark.parametrize("heads", HEADS)
def test_scores_that_are_rounded_are_falcons_to_the_last_bit(heads: int) -> None:
    own = falcons(ALL, heads, torch.float32)[:, 0]
    assert torch.equal(Alibi(heads, CPU, in_bfloat16=True).scores(2000)[:, :2000], own)


def test_scores_are_there_as_far_as_anybody_asks() -> None:
    alibi = Alibi(4, CPU)
    short = alibi.scores(5).clone()
    assert alibi.scores(5000).shape[1] >= 5000
    assert torch.equal(alibi.scores(5000)[:, : short.shape[1]], short)
