"""A plan pads nothing and shares prefixes for the native engine; for hf it pads within buckets."""

from itertools import pairwise
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hpc.corpus.store import Prompts
from hpc.engine import bucket
from hpc.engine.cost import CostModel
from hpc.engine.registry import ENGINES
from hpc.job import Job
from hpc.plan.arrange import Plan, make_plan
from hpc.plan.shard import deal

ANY = settings(deadline=None, max_examples=40)


def job(**values: Any) -> Job:
    return Job(**{"model": "model", "corpus": ("corpus",), **values})


def prompts_of(texts: list[list[int]], new: list[int] | None = None, samples: list[int] | None = None) -> Prompts:
    lengths = np.array([len(text) for text in texts], dtype=np.int64)
    return Prompts(
        np.array([token for text in texts for token in text], dtype=np.int32),
        np.cumsum(lengths) - lengths,
        lengths,
        np.array(new or [16] * len(texts), dtype=np.int64),
        np.array(samples or [1] * len(texts), dtype=np.int64),
    )


def everything(prompts: Prompts) -> Any:
    return np.arange(len(prompts.lengths))


def planned(arrangement: Plan) -> list[int]:
    return [int(row) for row in np.concatenate([*arrangement.shards.shards, arrangement.shards.tail])]


@st.composite
def corpora(draw: st.DrawFn) -> Prompts:
    """Prompts of three families and of none."""
    texts, new, samples = [], [], []
    for row in range(draw(st.integers(0, 30))):
        family = draw(st.integers(0, 3))
        texts.append([family] * (40 * bool(family)) + [10 + row] * draw(st.integers(1, 60)))
        new.append(draw(st.integers(1, 100)))
        samples.append(draw(st.sampled_from([1, 1, 4])))
    return prompts_of(texts, new, samples)


@ANY
@given(corpora(), st.integers(1, 4), st.sampled_from(["native", "hf"]), st.sampled_from([0.0, 0.15, 1.0]))
def test_every_pending_request_is_planned_exactly_once(prompts: Prompts, size: int, engine: str, tail: float) -> None:
    pending = everything(prompts)[::2]
    made = make_plan(prompts, pending, job(engine=engine, tail=tail), size, at_once=2)
    assert sorted(planned(made)) == list(range(len(pending)))


@pytest.mark.parametrize(("at_once", "kept"), [(1, 20), (5, 20), (8, 8), (10, 0), (128, 0)])
def test_what_all_ranks_can_begin_with_at_once_is_not_kept_back(at_once: int, kept: int) -> None:
    prompts = prompts_of([[number] for number in range(40)])
    made = make_plan(prompts, everything(prompts), job(tail=0.5), 4, at_once=at_once)
    assert len(made.shards.tail) == kept


@ANY
@given(corpora(), st.integers(1, 4))
def test_native_pads_nothing(prompts: Prompts, size: int) -> None:
    pending = everything(prompts)[1:]
    assert make_plan(prompts, pending, job(engine="native"), size).buckets.tolist() == prompts.lengths[pending].tolist()


@ANY
@given(corpora(), st.integers(1, 4))
def test_a_native_prefix_is_shorter_than_its_prompt(prompts: Prompts, size: int) -> None:
    made = make_plan(prompts, everything(prompts), job(engine="native"), size)
    assert (made.prefixes < prompts.lengths).all()


@ANY
@given(corpora(), st.integers(1, 4), st.randoms(use_true_random=False))
def test_a_native_prefix_does_not_depend_on_what_is_pending(prompts: Prompts, size: int, numbers: Any) -> None:
    whole = make_plan(prompts, everything(prompts), job(engine="native"), size).prefixes
    pending = np.array(sorted(numbers.sample(range(len(whole)), len(whole) // 2)), dtype=np.int64)
    assert make_plan(prompts, pending, job(engine="native"), size).prefixes.tolist() == whole[pending].tolist()


@ANY
@given(corpora(), st.integers(1, 4), st.sampled_from([0.0, 0.15]))
def test_a_native_shard_takes_the_longest_predicted_first_but_for_its_groups(
    prompts: Prompts, size: int, tail: float
) -> None:
    made = make_plan(prompts, everything(prompts), job(engine="native", tail=tail), size, at_once=2)
    for part in [*made.shards.shards, made.shards.tail]:
        lone = made.costs[[row for row in part.tolist() if made.prefixes[row] == 0]]
        assert (np.diff(lone) <= 1e-12).all()


@ANY
@given(corpora(), st.integers(1, 4))
def test_the_requests_of_a_prefix_stand_together_in_a_native_shard(prompts: Prompts, size: int) -> None:
    made = make_plan(prompts, everything(prompts), job(engine="native", tail=0.0), size)
    for part in made.shards.shards:
        beginnings = [
            prompts.tokens[prompts.starts[row] : prompts.starts[row] + made.prefixes[row]].tobytes() or bytes([row])
            for row in part.tolist()
        ]
        changes = sum(first != second for first, second in pairwise(beginnings))
        assert changes == max(0, len(set(beginnings)) - 1)


@ANY
@given(corpora(), st.integers(1, 4))
def test_no_native_rank_has_more_than_the_mean_and_a_part_of_a_group(prompts: Prompts, size: int) -> None:
    costs = (made := make_plan(prompts, everything(prompts), job(engine="native", tail=0.0), size)).costs
    loads = [costs[part].sum() for part in made.shards.shards]
    assert max(loads) <= costs.sum() / size * (1 + 1 / 8) + costs.max(initial=0) + 1e-9


def test_what_is_shared_costs_a_native_request_nothing() -> None:
    alone = make_plan(prompts_of([[1] * 10]), np.arange(1), job(engine="native"), 1)
    behind = make_plan(prompts_of([[1] * 300 + [row] * 10 for row in (2, 3)]), np.arange(2), job(engine="native"), 1)
    assert behind.costs.tolist() == [alone.costs[0]] * 2


@pytest.mark.parametrize("engine", ["native", "hf"])
def test_more_samples_cost_more(engine: str) -> None:
    prompts = prompts_of([[1] * 10, [2] * 10], samples=[1, 5])
    few, many = make_plan(prompts, np.arange(2), job(engine=engine), 1).costs
    assert many > 2 * few


@pytest.mark.parametrize("engine", ["native", "hf"])
def test_of_nothing_the_plan_is_nothing(engine: str) -> None:
    prompts = prompts_of([[1, 2], [3, 4]])
    made = make_plan(prompts, np.zeros(0, dtype=np.int64), job(engine=engine), 3)
    assert (planned(made), made.prefixes.tolist(), made.buckets.tolist()) == ([], [], [])


@ANY
@given(corpora().filter(lambda prompts: len(prompts.lengths)), st.integers(1, 4))
def test_hf_pads_to_the_chosen_buckets_and_shares_nothing(prompts: Prompts, size: int) -> None:
    one, cost = job(engine="hf"), CostModel()
    made = make_plan(prompts, everything(prompts), one, size)
    chosen = bucket.choose(
        prompts.lengths, prompts.new_tokens, one.buckets, size, one.batch_tokens, cost.prefill_token, cost.step
    )
    assert made.buckets.tolist() == bucket.assign(prompts.lengths, chosen).tolist()
    assert not made.prefixes.any()


@ANY
@given(corpora().filter(lambda prompts: len(prompts.lengths)), st.integers(1, 4))
def test_an_hf_plan_is_that_of_its_buckets(prompts: Prompts, size: int) -> None:
    made = make_plan(prompts, everything(prompts), job(engine="hf"), size)
    plain = deal(made.costs, made.buckets, size, ENGINES["hf"].max_tail, made.least)
    assert [part.tolist() for part in made.shards.shards] == [part.tolist() for part in plain.shards]


def test_a_native_piece_may_be_as_small_as_one_request_and_one_of_hf_is_a_batch() -> None:
    prompts = prompts_of([[1, 2], [3, 4]])
    least = [make_plan(prompts, np.arange(2), job(engine=engine), 2).least for engine in ("native", "hf")]
    assert (least[0], least[1] > 0) == (0.0, True)
