"""The table: medians, ratios over paired rounds, and how many requests got the reference's tokens. Pure."""

from collections.abc import Iterable, Mapping, Sequence
from statistics import median
from typing import Any

from tests.bench.engines import Variant

Row = Mapping[str, Any]
"""A line of results.jsonl."""

BASE = "native"
DISTURBED = 0.05
"""Share of the cores' time that others may take of a window before it is marked."""

WORKLOADS = {
    "W1": "128 requests of skewed lengths",
    "W1q": "a quarter of W1",
    "W1p": "8 requests of W1",
    "W2": "64 requests with a common prefix of 300 tokens, 32 new tokens each",
    "W2q": "a quarter of W2",
    "W3": "16 prompts of 4,000 tokens, 64 new tokens each",
    "W3q": "2 requests of W3",
    "W4": "1,000 prompts of 5 to 20 tokens, 8 new tokens each",
    "W4q": "31 requests of W4",
}


def ratios(rows: Iterable[Row], label: str, base: str = BASE) -> list[float]:
    """Return how many times faster `base` was than `label`, for each round that has both."""
    walls: dict[int, dict[str, float]] = {}
    for row in rows:
        walls.setdefault(row["round"], {})[row["engine"]] = row["wall_s"]
    return [wall[label] / wall[base] for _, wall in sorted(walls.items()) if label in wall and base in wall]


def agreement(outputs: Mapping[str, Sequence[int]], reference: Mapping[str, Sequence[int]]) -> tuple[int, int]:
    """Return how many requests that both have got the same tokens, and how many both have."""
    both = outputs.keys() & reference.keys()
    return sum(list(outputs[key]) == list(reference[key]) for key in both), len(both)


def render(rows: Sequence[Row], failures: Sequence[Row], machine: Sequence[str]) -> str:
    """Return the whole report as Markdown."""
    parts = ["# Benchmark", "", *(f"- {line}" for line in machine), ""]
    sections = list(dict.fromkeys((row["workload"], row["dtype"]) for row in rows))
    for workload, dtype in sorted(sections):
        chosen = [row for row in rows if (row["workload"], row["dtype"]) == (workload, dtype)]
        parts += _section(workload, dtype, chosen)
    parts += _legend(rows)
    notes = dict.fromkeys(f"{row['engine']}, {row['dtype']}: {note}" for row in rows for note in row["notes"])
    notes |= dict.fromkeys(
        f"{row['engine']}, {row['dtype']}, {' and '.join(row['workloads'])}: {row['status']}: {row['reason']}"
        for row in failures
    )
    if notes:
        parts += ["", "## Notes", "", *(f"- {note}" for note in notes)]
    return "\n".join(parts) + "\n"


def _section(workload: str, dtype: str, rows: Sequence[Row]) -> list[str]:
    lines = [
        f"## {workload}, {dtype}: {WORKLOADS.get(workload, workload)}",
        "",
        f"{rows[0]['requests']} requests, {rows[0]['prompt_tokens']:,} prompt tokens, "
        f"{sum_of_limits(rows):,} output tokens.",
        "",
        f"| engine | output tokens/s | wall s, each run | {BASE} / it (range; rounds) | peak RSS GiB | same tokens |",
        "| --- | ---: | --- | --- | ---: | ---: |",
    ]
    labels = list(dict.fromkeys(row["engine"] for row in rows))
    speed = {label: median(_speed(row) for row in rows if row["engine"] == label) for label in labels}
    for label in sorted(labels, key=lambda name: -speed[name]):
        own = [row for row in rows if row["engine"] == label]
        walls = ", ".join(f"{row['wall_s']:.1f}{'*' if _disturbed(row) else ''}" for row in own)
        memory = median(row["peak_rss_gib"] for row in own)
        cells = (_name(label), f"{speed[label]:.0f}", walls, _ratio(rows, label), f"{memory:.2f}", _same(own))
        lines.append(f"| {' | '.join(cells)} |")
    peers = [label for label in labels if not Variant.parse(label).engine.ours]
    if peers and BASE in labels:
        fastest = max(peers, key=lambda name: speed[name])
        lines += ["", f"{BASE} / fastest peer ({fastest}): {_ratio(rows, fastest)}"]
    return [*lines, ""]


def sum_of_limits(rows: Sequence[Row]) -> int:
    """Return the output tokens that the workload asks for: what most engines gave."""
    return max(int(row["output_tokens"]) for row in rows)


def _legend(rows: Sequence[Row]) -> list[str]:
    lines = [
        f"Tokens/s and RSS are medians. `{BASE} / it`: its wall time over {BASE}'s in one round, median and range.",
        "Same tokens: requests with exactly the tokens of transformers' generate in float32, of those that it ran.",
    ]
    if any(map(_disturbed, rows)):
        lines.append(f"*: other processes took more than {DISTURBED:.0%} of the cores' time in that window.")
    return lines


def _ratio(rows: Sequence[Row], label: str) -> str:
    found = ratios(rows, label)
    if not found or label == BASE:
        return ""
    if len(found) == 1:
        return f"{found[0]:.2f} (1)"
    return f"{median(found):.2f} ({min(found):.2f}-{max(found):.2f}; {len(found)})"


def _same(rows: Sequence[Row]) -> str:
    compared = [row["same_tokens"] for row in rows if row.get("same_tokens") and row["same_tokens"][1]]
    if not compared:
        return ""
    least = min(compared, key=lambda pair: pair[0] / pair[1])
    return f"{least[0]} of {least[1]}"


def _speed(row: Row) -> float:
    return float(row["output_tokens"] / row["wall_s"])


def _disturbed(row: Row) -> bool:
    return bool(row["other_cpu_s"] + row["steal_s"] > DISTURBED * row["wall_s"] * row["threads"])


def _name(label: str) -> str:
    return f"{label}: {Variant.parse(label).engine.what}"
