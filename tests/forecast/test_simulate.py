"""A predicted run is what summing the steps of the engine's scheduler gives, on one rank or many."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hpc.engine.bounds import Bounds
from hpc.engine.extents import Extents
from hpc.engine.native.scheduler import Scheduler
from hpc.forecast.simulate import Workload, simulate
from hpc.forecast.step_costs import StepCosts
from hpc.plan.shard import Deal, deal
from hpc.request import Request
from hpc.sampling_params import SamplingParams
from tests.bench.paced import end, shape_of
from tests.fakes import ListSource

COSTS = StepCosts((1, 8, 64, 512), (1e-2, 1.2e-2, 3e-2, 0.2), 1e-5, 1e-7, 1e-8)
WIDE = Bounds(128, 512, 1 << 20)


def workload(prompts: list[int], new: list[int], **values: list[int]) -> Workload:
    count = len(prompts)
    whole = {"prefixes": [0] * count, "groups": [-1] * count, "samples": [1] * count, **values}
    arrays = {name: np.array(value, dtype=np.int64) for name, value in whole.items()}
    return Workload(prompts=np.array(prompts, dtype=np.int64), new=np.array(new, dtype=np.int64), **arrays)


def seconds(work: Workload, bounds: Bounds = WIDE, size: int = 1, tail: float = 0.0) -> list[float]:
    dear = (work.prompts + 4 * work.new * work.samples).astype(np.float64)
    plan = deal(dear, -dear.astype(np.int64), size, tail)
    return simulate(COSTS, bounds, work, plan, dear)


def scheduled(work: Workload, bounds: Bounds, order: list[int]) -> float:
    """The same, step by step as the engine's own scheduler plans them, for requests in the order of one rank."""
    requests = []
    for index in order:
        prompt = np.full(work.prompts[index], 1000 + index, dtype=np.int32)
        prompt[: work.prefixes[index]] = 2000 + work.groups[index]
        sampling = SamplingParams(max_new_tokens=int(work.new[index]))
        requests.append(Request(index, index, prompt, sampling, bytes(16), len(prompt), int(work.prefixes[index])))
    source = ListSource(requests)
    extents = Extents(bounds.cache_tokens)
    scheduler = Scheduler(extents, bounds.max_seqs, bounds.step_tokens, share=True, refill=bounds.refill)
    clock = 0.0
    while scheduler.admit(source) or scheduler.rows:
        plan = scheduler.next()
        clock += COSTS.step(*shape_of(plan))
        list(end(scheduler, plan))
    return clock


SIZES = st.lists(st.tuples(st.integers(1, 900), st.integers(1, 60)), min_size=1, max_size=30)


@settings(deadline=None)
@given(
    sizes=SIZES,
    slots=st.integers(1, 12),
    prefixes=st.lists(st.sampled_from([0, 0, 20, 600]), min_size=30),
    refill=st.sampled_from([0.0, 1 / 8, 1 / 2]),
)
def test_jumping_from_event_to_event_equals_the_steps_of_the_engines_scheduler(
    sizes: list[tuple[int, int]], slots: int, prefixes: list[int], refill: float
) -> None:
    bounds = Bounds(slots, 512, 1 << 20, refill=refill)
    cuts = [cut if cut < prompt else 0 for cut, (prompt, _) in zip(prefixes, sizes, strict=False)]
    work = workload(
        [prompt for prompt, _ in sizes], [new for _, new in sizes],
        prefixes=cuts, groups=[cut or -1 for cut in cuts],
    )  # fmt: skip
    dear = (work.prompts + 4 * work.new).astype(np.float64)
    order = deal(dear, -dear.astype(np.int64), 1, 0.0).shards[0].tolist()
    found = simulate(COSTS, bounds, work, Deal((np.array(order),), np.empty(0, np.int64)), dear)
    assert found == pytest.approx([scheduled(work, bounds, order)])


def test_a_request_alone_costs_its_prompt_and_a_step_a_token() -> None:
    expected = COSTS.step(100, 1, 5000.0, 0) + sum(COSTS.step(1, 1, 0.0, 100 + i) for i in range(1, 10))
    assert seconds(workload([100], [10])) == pytest.approx([expected])


@pytest.mark.parametrize("refill", [0.0, 1 / 2])
def test_a_full_cache_makes_requests_wait(refill: float) -> None:
    work = workload([100] * 8, [50] * 8)
    assert seconds(work, Bounds(128, 512, 320, refill=refill))[0] > 2 * seconds(work)[0]


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
    plan = deal(dear, -work.new, size, tail)
    assert sum(simulate(free, WIDE, work, plan, dear)) == pytest.approx(float(work.new.sum()))


def test_more_ranks_take_less_time() -> None:
    random = np.random.default_rng(0)
    work = workload(random.integers(10, 400, 600).tolist(), random.integers(5, 100, 600).tolist())
    times = [max(seconds(work, size=size, tail=0.15)) for size in (1, 2, 4)]
    assert times[0] > times[1] > times[2]
