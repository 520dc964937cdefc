"""What `plan` predicts and what runs take: five workloads, on one rank with all cores and on a rank for each of two.

Calibrated first, as a user would; then each workload is planned and run in turn. Loading, the tail and merging are
part of both times; reading the corpus is not, for `plan` has done it.
"""

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from statistics import median
from typing import Any

from tests.bench.engines import ROOT

HEADS = ("ranks x threads", "workload", "predicted s", "10-90 %", "took s", "took / predicted")
PILOT = 64
QUESTIONS = (
    "What is {}?", "Explain {} to a child.", "Write two sentences about {}.", "Name three facts about {}.",
    "Why does {} matter?", "Tell a short story about {}.",
)  # fmt: skip
THINGS = (
    "rain", "the moon", "bread", "a bridge", "copper", "the sea", "a clock", "glass", "a violin", "paper", "salt",
    "a volcano", "wool", "a lighthouse", "honey", "ice", "a compass", "maps", "a windmill", "coal", "the wind",
    "chess", "a telescope", "rust", "silk", "a garden", "thunder", "a candle", "ink", "sand", "bees", "a harbour",
)  # fmt: skip


def corpora(work: Path) -> dict[str, tuple[list[dict[str, Any]], list[str]]]:
    """Return rows and flags of each workload; `work` holds those of the benchmark of engines."""
    found: dict[str, tuple[list[dict[str, Any]], list[str]]] = {}
    exact = ["--sampling.ignore-eos"]
    for name, title, count in (
        ("W1", "skewed lengths, 128 rows", 128), ("W2", "shared prefix, 64 rows", 64),
        ("W3", "4,000-token prompts, 4 rows", 4), ("W4", "short prompts and outputs, 1,000 rows", 1000),
    ):  # fmt: skip
        asks = json.loads((work / f"{name}.json").read_text())["asks"][:count]
        rows = [{"prompt_token_ids": ask["prompt"], "sampling": {"max_new_tokens": ask["max_new"]}} for ask in asks]
        found[title] = rows, exact
    chats = [q.format(thing) for thing in THINGS for q in QUESTIONS]
    found["chat that ends by itself, 192 rows, 64 of them a pilot"] = (
        [{"messages": [{"role": "user", "content": chat}]} for chat in chats],
        ["--sampling.max-new-tokens", "160"],
    )
    return found


def table(model: Path, work: Path) -> str:
    """Calibrate, plan and run; return the table as Markdown."""
    cores = len(os.sched_getaffinity(0))
    rows, ratios = [], []
    for ranks, threads in ((1, min(2, cores)), (2, 1)):
        with tempfile.TemporaryDirectory() as folder:
            own = Runs(Path(folder), model, ranks, threads)
            own.call("calibrate", ["--model", str(model), "--dtype", "float32"], ranks)
            for title, (lines, flags) in corpora(work).items():
                predicted, took = own.compare(title, lines, flags)
                ratios.append(took / predicted["seconds"])
                cells = (
                    f"{ranks} x {threads}", title, f"{predicted['seconds']:.1f}",
                    f"{predicted['low_s']:.1f} - {predicted['high_s']:.1f}", f"{took:.1f}", f"{ratios[-1]:.2f}",
                )  # fmt: skip
                rows.append(cells)
                print(*cells, sep=" | ", flush=True)
    off = median(abs(ratio - 1) for ratio in ratios)
    lines = ["## What `plan` predicted, and what it took", "", f"| {' | '.join(HEADS)} |"]
    lines += ["| --- | --- |" + " ---: |" * (len(HEADS) - 2), *(f"| {' | '.join(cells)} |" for cells in rows)]
    return "\n".join([*lines, "", f"Median of |took / predicted - 1|: {off:.1%}"]) + "\n"


class Runs:
    """Runs on so many ranks, with a user's cache of their own but for what the model was built to."""

    def __init__(self, folder: Path, model: Path, ranks: int, threads: int) -> None:
        self._folder, self._model, self._ranks = folder, model, ranks
        self._environment = {**os.environ, "OMP_NUM_THREADS": str(threads), "XDG_CACHE_HOME": str(folder / "cache")}

    def call(self, verb: str, flags: Sequence[str], ranks: int = 1) -> str:
        """Call the command line; return what it printed."""
        mpirun = [str(Path(sys.executable).with_name("mpirun")), "-n", str(ranks)] if ranks > 1 else []
        command = [*mpirun, sys.executable, "-m", "hpc", verb, *flags]
        environment = {**self._environment, "PYTHONPATH": str(ROOT)}
        ended = subprocess.run(command, cwd=self._folder, env=environment, capture_output=True, text=True)
        if ended.returncode:
            sys.exit(f"{command}: {ended.returncode}\n{ended.stdout}{ended.stderr}")
        return ended.stdout

    def compare(self, title: str, rows: Sequence[dict[str, Any]], extra: Sequence[str]) -> tuple[dict[str, Any], float]:
        """Plan and run a corpus; return the prediction, and the seconds that it took."""
        name = f"{abs(hash(title))}"
        (self._folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        flags = [
            "--model",
            str(self._model),
            "--corpus",
            f"{name}.jsonl",
            "--runs",
            "runs",
            "--dtype",
            "float32",
            *extra,
        ]
        if "pilot" in title:
            self.call("run", [*flags, "--limit", str(PILOT)], self._ranks)
        planned = json.loads(self.call("plan", [*flags, "--json", "--ranks-on-node", str(self._ranks)]))
        [predicted] = [p for p in planned["predictions"] if p["ranks"] == self._ranks]
        self.call("run", flags, self._ranks)
        seconds = json.loads((self._folder / "runs" / name / "summary.json").read_text())["seconds"]
        return predicted, seconds["total"] - seconds["tokenize"]
