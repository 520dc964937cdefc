"""A predicted run is what summing its steps one by one gives, on one rank or many."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hpc import shard
from hpc.cost import StepCosts
from hpc.predict import Bounds, Workload, run

COSTS = StepCosts((1, 8, 64, 512), (1e-2, 1.2e-2, 3e-2, 0.2), 1e-5, 1e-7, 1e-8)
WIDE = Bounds(128, 512, 1 << 20)


def workload(prompts: list[int], new: list[int], **values: list[int]) -> Workload:
    count = len(prompts)
    whole = {"prefixes": [0] * count, "groups": [-1] * count, "samples": [1] * count, **values}
    arrays = {name: np.array(value, dtype=np.int64) for name, value in whole.items()}
    return Workload(prompts=np.array(prompts, dtype=np.int64), new=np.array(new, dtype=np.int64), **arrays)


def seconds(work: Workload, bounds: Bounds = WIDE, size: int = 1, tail: float = 0.0) -> list[float]:
    dear = (work.prompts + 4 * work.new * work.samples).astype(np.float64)
    plan = shard.plan(dear, -dear.astype(np.int64), size, tail)
    return run(COSTS, bounds, work, plan, dear)


def one_by_one(prompts: list[int], new: list[int], bounds: Bounds) -> float:
    """The same, step by step, for prompts in the order in which one rank takes them."""
    waiting = list(zip(prompts, new, strict=True))
    prefill: list[list[int]] = []
    live: list[list[int]] = []
    clock = 0.0
    while waiting or prefill or live:
        pending = sum(entry[0] - entry[2] for entry in prefill)
        while waiting and pending < bounds.step_tokens and len(live) + len(prefill) < bounds.max_seqs:
            prompt, tokens = waiting.pop(0)
            prefill.append([prompt, tokens, 0])
            pending += prompt
        kv = sum(entry[0] + 1 for entry in live)
        for entry in live:
            entry[0] += 1
            entry[1] -= 1
        room, count, pairs, chosen = bounds.step_tokens, 0, 0.0, len(live)
        for entry in prefill:
            part = min(room, entry[0] - entry[2])
            pairs += part * (entry[2] + part / 2)
            entry[2] += part
            room, count = room - part, count + part
        chosen += sum(entry[2] == entry[0] for entry in prefill)
        clock += COSTS.step(count + len(live), chosen, pairs, kv)
        live = [entry for entry in live if entry[1]]
        live += [[entry[0], entry[1] - 1] for entry in prefill if entry[2] == entry[0] and entry[1] > 1]
        prefill = [entry for entry in prefill if entry[2] < entry[0]]
    return clock


SIZES = st.lists(st.tuples(st.integers(1, 900), st.integers(1, 60)), min_size=1, max_size=30)


@settings(deadline=None)
@given(sizes=SIZES, slots=st.integers(1, 12))
def test_jumping_from_event_to_event_equals_going_step_by_step(sizes: list[tuple[int, int]], slots: int) -> None:
    bounds = Bounds(slots, 512, 1 << 20)
    work = workload([prompt for prompt, _ in sizes], [new for _, new in sizes])
    dear = (work.prompts + 4 * work.new).astype(np.float64)
    order = shard.plan(dear, -dear.astype(np.int64), 1, 0.0).shards[0].tolist()
    expected = one_by_one([sizes[i][0] for i in order], [sizes[i][1] for i in order], bounds)
    assert run(COSTS, bounds, work, shard.Plan((np.array(order),), np.empty(0, np.int64)), dear) == pytest.approx(
        [expected]
    )


def test_a_request_alone_costs_its_prompt_and_a_step_a_token() -> None:
    expected = COSTS.step(100, 1, 5000.0, 0) + sum(COSTS.step(1, 1, 0.0, 100 + i) for i in range(1, 10))
    assert seconds(workload([100], [10])) == pytest.approx([expected])


def test_a_full_cache_makes_requests_wait() -> None:
    work = workload([100] * 8, [50] * 8)
    assert seconds(work, Bounds(128, 512, 320))[0] > 2 * seconds(work)[0]


def test_a_request_that_the_cache_cannot_hold_is_predicted_all_the_same() -> None:
    assert seconds(workload([1000], [10]), Bounds(128, 512, 100))[0] > 0


def test_a_shared_prefix_is_computed_once() -> None:
    apart = workload([300] * 10, [1] * 10)
    together = workload([300] * 10, [1] * 10, prefixes=[290] * 10, groups=[0] * 10)
    assert seconds(together)[0] < 0.2 * seconds(apart)[0]


def test_samples_of_a_request_are_sequences_of_their_own() -> None:
    assert seconds(workload([50], [20], samples=[4])) == pytest.approx(seconds(workload([50] * 4, [20] * 4)))


@settings(deadline=None)
@given(sizes=SIZES, size=st.integers(1, 5), tail=st.sampled_from([0.0, 0.3, 1.0]))
def test_all_ranks_together_do_all_of_the_work(sizes: list[tuple[int, int]], size: int, tail: float) -> None:
    # A fixed price for each chosen token and nothing else: the clocks add up to it whoever chooses them.
    free = StepCosts((1,), (0.0,), 1.0, 0.0, 0.0)
    work = workload([prompt for prompt, _ in sizes], [new for _, new in sizes])
    dear = work.new.astype(np.float64)
    plan = shard.plan(dear, -work.new, size, tail)
    assert sum(run(free, WIDE, work, plan, dear)) == pytest.approx(float(work.new.sum()))


def test_more_ranks_take_less_time() -> None:
    random = np.random.default_rng(0)
    work = workload(random.integers(10, 400, 600).tolist(), random.integers(5, 100, 600).tolist())
    times = [max(seconds(work, size=size, tail=0.15)) for size in (1, 2, 4)]
    assert times[0] > times[1] > times[2]
