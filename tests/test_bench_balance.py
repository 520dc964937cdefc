"""The balance benchmark measures what it says: static pieces, LPT and a tail, on corpora with the shapes they name."""

import json
from pathlib import Path

import numpy as np
import pytest

from hpc.request import Request
from hpc.sampling_params import SamplingParams
from tests.bench import balance, scale
from tests.bench.paced import PacedEngine
from tests.fakes import ListSource


def idle(cells: str) -> float:
    return float(cells.split("%")[0])


def corpus(name: str, rows: int = 1600) -> balance.Corpus:
    return next(corpus for corpus in balance.corpora(rows, 10_000) if corpus.name == name)


def test_even_rows_are_balanced_by_any_strategy() -> None:
    *_, static, lpt, tail = balance.simulated_row(corpus("even"), 8)
    assert max(map(idle, (static, lpt, tail))) < 1


def test_a_static_cut_leaves_ranks_idle_where_lengths_are_skewed_and_a_tail_does_not() -> None:
    *_, static, _, tail = balance.simulated_row(corpus("lognormal"), 8)
    assert idle(static) > 2 * idle(tail)


def test_a_slow_rank_is_waited_for_with_lpt_and_not_with_a_tail() -> None:
    *_, lpt, tail = balance.simulated_row(corpus("even, a rank at half speed"), 8)
    assert idle(lpt) > 30 > 10 > idle(tail)


def test_one_row_in_a_hundred_of_a_heavy_tail_is_twenty_times_as_long() -> None:
    new = corpus("heavy tail").new
    assert sorted(set(new.tolist())) == [32, 640]
    assert np.count_nonzero(new == 640) == 16


def test_idle_is_what_ranks_wait_of_the_last_ones_time() -> None:
    assert balance.cell([5.0, 10.0]) == "25.0%, 1.333"


def test_a_row_says_its_length_in_its_first_token_and_in_its_limit_what_a_plan_knows(tmp_path: Path) -> None:
    made = corpus("lognormal, lengths unknown")
    balance.write_corpus(made, tmp_path / "c.jsonl", np.arange(5, 10))
    rows = [json.loads(line) for line in (tmp_path / "c.jsonl").read_text().splitlines()]
    assert [row["prompt_token_ids"][0] for row in rows] == made.new[5:10].tolist()
    assert {row["sampling"]["max_new_tokens"] for row in rows} == {int(made.new.max())}


def test_a_paced_engine_generates_as_many_tokens_as_the_first_says() -> None:
    prompts = [np.array([count, 7, 7], dtype=np.int32) for count in (1, 3, 9)]
    requests = [Request(row, row, p, SamplingParams(max_new_tokens=5), bytes(16), 3) for row, p in enumerate(prompts)]
    found = {s.request.row: len(s.token_ids) for ended in PacedEngine(0.0).generate(ListSource(requests), lambda: False)
             for s in ended}  # fmt: skip
    assert found == {0: 1, 1: 3, 2: 5}


@pytest.mark.slow
def test_real_ranks_are_measured(tmp_path: Path) -> None:
    few = corpus("even", 16)
    *_, static, lpt, tail = balance.real(few, 2, True, tmp_path, ("--model", "paced"))
    assert all(0 <= idle(cells) < 100 for cells in (static, lpt, tail))


def test_a_run_of_the_echo_engine_is_measured(tmp_path: Path) -> None:
    cells = dict(zip(scale.HEADS, scale.measure(200, 2, tmp_path), strict=True))
    assert cells["rows"] == "200"
    assert float(cells["rank 0 GiB"]) > 0
    assert int(cells["messages"]) > 4
