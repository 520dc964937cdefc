"""What the CUDA kernel is told of a step; tests/gpu shows what it makes of it."""

import numpy as np
import pytest
import torch

from hpc.engine.alibi import Alibi
from hpc.engine.form import AttentionSpec, KVShape
from hpc.engine.layers.attention import Flash, Span, flash_spans, lacks_flash
from tests.engine.oracle import CPU

SPANS = [Span(0, 1, 40, 128, 0, 0), Span(1, 3, 0, 0, 0, 0), Span(4, 2, 20, 64, 0, 0)]


def described() -> Flash:
    return flash_spans(np.array(SPANS, dtype=np.int64), torch.device("cpu"))


def test_each_token_is_stored_at_its_position_in_its_extent() -> None:
    assert described().stored.tolist() == [168, 0, 1, 2, 84, 85]


def test_the_queries_of_spans_follow_each_other() -> None:
    assert described().query_starts.tolist() == [0, 1, 4, 6]


def test_the_keys_of_a_span_are_its_sequence_up_to_its_last_token() -> None:
    flash = described()
    assert (flash.key_starts.tolist()[:3], flash.key_counts.tolist()) == ([128, 0, 64], [41, 3, 22])


def test_the_end_of_the_keys_is_behind_all_of_them() -> None:
    assert described().key_starts.tolist()[3] >= 128 + 41


def test_the_max_queries_and_keys_of_a_span_are_told() -> None:
    flash = described()
    assert (flash.max_queries, flash.max_keys) == (3, 41)


@pytest.mark.parametrize(
    ("form", "lack"),
    [
        (AttentionSpec(KVShape((2, 64), (2, 64)), 0.125, window=9), ""),
        (AttentionSpec(KVShape((2, 64), (2, 64)), 0.125, alibi=Alibi(4, CPU)), "scores by position"),
        (AttentionSpec(KVShape((2, 64), (2, 64)), 0.125, softcap=30.0), "capped scores"),
        (AttentionSpec(KVShape((2, 64), (2, 64)), 0.125, sinks=torch.zeros(4)), "sinks"),
        (AttentionSpec(KVShape((2, 64), (2, 32)), 0.125), "values of another size than keys (64 and 32)"),
    ],
)
def test_what_flash_attention_does_not_have_torchs_own_functions_compute(form: AttentionSpec, lack: str) -> None:
    assert lacks_flash(form) == lack


BEHIND = [
    Span(0, 1, 40, 128, 0, 0), Span(1, 3, 30, 0, 256, 20), Span(4, 1, 25, 64, 256, 20), Span(5, 2, 12, 192, 320, 10),
]  # fmt: skip


def test_behind_a_prefix_the_own_keys_of_a_span_begin_where_that_ends() -> None:
    flash = flash_spans(np.array(BEHIND, dtype=np.int64), torch.device("cpu"))
    assert flash.stored.tolist() == [168, 10, 11, 12, 69, 194, 195]
    assert (flash.key_starts.tolist()[:4], flash.key_counts.tolist()) == ([128, 0, 64, 192], [41, 13, 6, 4])


def test_neighbouring_spans_behind_one_prefix_are_one_run_of_queries() -> None:
    behind = flash_spans(np.array(BEHIND, dtype=np.int64), torch.device("cpu")).behind
    assert behind is not None
    assert behind.query_starts.tolist() == [0, 1, 5, 7]
    assert (behind.key_starts.tolist()[1:3], behind.key_counts.tolist()) == ([256, 320], [0, 20, 10])
    assert behind.tokens.tolist() == [False, *[True] * 6]
