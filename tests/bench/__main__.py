"""Run the benchmark; see `python -m tests.bench --help`, and the package for what the files are.

runs/bench/results.jsonl has a line for each window, as it comes; runs/bench/table.md is written anew after each group.
"""

import argparse
import datetime
import importlib.metadata
import json
import os
import shlex
import signal
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tests.bench import table, workloads
from tests.bench.engines import BENCH, ENGINES, ROOT, Outcome, Variant, Weights, prepare, run
from tests.bench.measure import Ask
from tests.bench.schedule import FLOAT, HALF, PROBE, Cell, schedule

OUT = ROOT / "runs" / "bench"
DEMO_MODEL = ROOT / "models" / "SmolLM2-135M-Instruct.Q4_1.gguf"
LEAST_S = 20.0
"""An engine is not started with less time left."""
KEPT_FOR_TABLE_S = 10.0
PROBE_LIMIT_S = 120.0


def flags(arguments: Sequence[str]) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser("python -m tests.bench", description="scattergen and its peers, measured.")
    parser.add_argument("--minutes", type=float, default=40, help="for all of it, but building environments")
    names = f"{', '.join(ENGINES)}; with settings: native:deterministic=true"
    everything = [*map(Variant.parse, ENGINES)]
    parser.add_argument("--engines", nargs="+", type=Variant.parse, default=everything, metavar="NAME", help=names)
    parser.add_argument("--workloads", nargs="+", choices=("W1", "W2", "W3", "W4"), default=["W1", "W2", "W3", "W4"])
    parser.add_argument("--dtypes", nargs="+", choices=(FLOAT, HALF), default=[FLOAT, HALF])
    parser.add_argument("--rounds", type=int, default=5, help="of W1 and W2, for the fast engines")
    parser.add_argument("--threads", type=int, default=min(2, len(os.sched_getaffinity(0))))
    parser.add_argument("--cap", type=float, default=300, help="seconds for one workload of one engine, load included")
    parser.add_argument("--quick", action="store_true", help="a few requests of each workload, one round")
    parser.add_argument("--model", type=Path, default=DEMO_MODEL, help="a GGUF file of a llama")
    return parser.parse_args(arguments)


def main(arguments: Sequence[str]) -> None:
    """Prepare what is missing, run the groups while there is time, and leave the table."""
    chosen = flags(arguments)
    signal.signal(signal.SIGTERM, lambda number, _: sys.exit(128 + number))  # not before the engines have been ended
    out = OUT / "quick" if chosen.quick else OUT
    work = BENCH / ("workloads-quick" if chosen.quick else "workloads")
    weights = make_weights(chosen.model)
    made, source = work / "W1.json", Path(workloads.__file__)
    if not made.exists() or made.stat().st_mtime < source.stat().st_mtime:
        make_workloads(weights.folder, work, chosen.quick)
    missing = {venv: prepare(venv) for venv in sorted({v.engine.venv for v in chosen.engines if v.engine.venv})}
    bench = Bench(chosen, out, work, weights, missing)
    bench.go()
    print((out / "table.md").read_text())


def make_weights(source: Path) -> Weights:
    """Write the model's weights in the two forms that engines read, unless they are there."""
    from hpc.model.find import resolve

    if not source.exists():
        sys.exit(f"{source} is missing: `make {source.relative_to(ROOT)}` fetches it")
    gguf = BENCH / f"{source.name.split('.')[0]}.F16.gguf"
    if not gguf.exists():
        from tests.bench.weights import write_unquantized

        gguf.parent.mkdir(exist_ok=True)
        write_unquantized(source, gguf)
    return Weights(resolve(str(gguf), BENCH).path, gguf)


def make_workloads(model: Path, folder: Path, quick: bool) -> None:
    """Tokenize the corpus and cut the workloads."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(model)
    workloads.write(folder, tokenizer(workloads.corpus(), add_special_tokens=False, verbose=False)["input_ids"], quick)


@dataclass
class Bench:
    """A run of the benchmark: what was chosen, and what has been found so far."""

    chosen: argparse.Namespace
    out: Path
    work: Path
    weights: Weights
    missing: dict[str, str | None]
    """For each environment why it is not there; None if it is."""
    rows: list[dict[str, Any]] = field(default_factory=list)
    failures: list[dict[str, Any]] = field(default_factory=list)
    seen: dict[tuple[str, str, tuple[str, ...]], float] = field(default_factory=dict)
    reference: dict[str, dict[str, list[int]]] = field(default_factory=dict)
    """By the name of a whole workload, the tokens of `generate` in float32."""
    outputs: list[dict[str, list[int]]] = field(default_factory=list)
    """Of each row."""

    def __post_init__(self) -> None:
        self.began = datetime.datetime.now().replace(microsecond=0)
        self.deadline = time.monotonic() + self.chosen.minutes * 60
        self.out.mkdir(parents=True, exist_ok=True)
        self.has_half = has_half()

    def go(self) -> None:
        """Run group after group while there is time."""
        rounds = 1 if self.chosen.quick else self.chosen.rounds
        groups = schedule(self.chosen.engines, self.chosen.workloads, self.chosen.dtypes, rounds, self.has_half)
        for number, group in enumerate(groups, 1):
            expected = group.seconds(self.seen)
            if self.left_s() < max(LEAST_S, expected):
                for cell in group.cells:
                    text = f"round {cell.round} left out: {self.left_s():.0f} s were left, it takes {expected:.0f} s"
                    self.fail(cell, "no time", text)
                continue
            for cell in group.cells:
                self.run(cell, f"{number}/{len(groups)}")
            self.write_table()
        self.write_table()

    def left_s(self) -> float:
        return float(self.deadline - time.monotonic() - KEPT_FOR_TABLE_S)

    def run(self, cell: Cell, where: str) -> None:
        """Run one cell and keep what it found."""
        label, names = cell.variant.label, " ".join(cell.workloads)
        why_not = self.missing.get(cell.variant.engine.venv or "") or self.predicted(cell)
        if why_not:
            self.fail(cell, "left out", why_not)
            return
        if self.left_s() < LEAST_S:
            self.fail(cell, "no time", f"round {cell.round} cut by the limit of {self.chosen.minutes:.0f} minutes")
            return
        limit_s = PROBE_LIMIT_S if cell.workloads == (PROBE,) else self.chosen.cap * len(cell.workloads)
        limit_s = min(limit_s, self.left_s())
        folder = self.out / self.began.strftime("%Y%m%d-%H%M%S") / f"{len(self.seen):02}-{time.monotonic_ns()}"
        begin = time.monotonic()
        paths = [self.work / f"{name}.json" for name in cell.workloads]
        outcome = run(cell.variant, cell.dtype, paths, self.chosen.threads, self.weights, folder, limit_s)
        self.seen[cell.kind] = time.monotonic() - begin
        self.keep(cell, outcome, folder)
        walls = ", ".join(f"{window['workload']} {window['wall_s']:.1f} s" for window in outcome.windows)
        reason = "" if outcome.status == "ok" else f"{outcome.status}: {outcome.reason}"
        took = f"{self.seen[cell.kind]:.0f} s in all, {self.left_s() / 60:.1f} min left"
        print(f"[{where}] {label} {cell.dtype} {names} round {cell.round}: {walls} {reason} ({took})", flush=True)

    def predicted(self, cell: Cell) -> str | None:
        """Return why a cell would take too long, judged by the few requests that were timed first."""
        if cell.dtype != HALF or self.has_half or cell.workloads == (PROBE,):
            return None
        probes = [r for r in self.rows if (r["engine"], r["dtype"], r["workload"]) == (cell.variant.label, HALF, PROBE)]
        if not probes:
            refused = [f for f in self.failures if (f["engine"], f["dtype"]) == (cell.variant.label, HALF)]
            return "this CPU has no bfloat16 arithmetic; see above" if refused else None
        wall = probes[-1]["wall_s"] * sum(map(self.cost, cell.workloads)) / self.cost(PROBE)
        if wall <= min(self.chosen.cap, self.left_s()):
            return None
        return f"this CPU has no bfloat16 arithmetic: predicted {wall:.0f} s from {probes[-1]['requests']} requests"

    def cost(self, workload: str) -> float:
        asks = json.loads((self.work / f"{workload}.json").read_text())["asks"]
        return sum(workloads.cost(Ask(**ask)) for ask in asks)

    def keep(self, cell: Cell, outcome: Outcome, folder: Path) -> None:
        """Append a line for each window, and remember the tokens."""
        for window in outcome.windows:
            outputs = window.pop("outputs")
            whole = window["workload"][:2]
            if cell.variant.label == "generate" and cell.dtype == FLOAT:
                self.reference.setdefault(whole, {}).update(outputs)
            row = {**self.common(cell), **window, "load_s": outcome.load_s, "notes": list(outcome.notes)}
            if row.pop("wrong_lengths"):
                row["notes"].append(f"{row['workload']}: some requests got another number of tokens than asked for")
            self.rows.append(row)
            self.outputs.append(outputs)
            self.append({**row, "tokens": str(folder.relative_to(self.out))})
        if outcome.status != "ok":
            self.fail(cell, outcome.status, outcome.reason)

    def fail(self, cell: Cell, status: str, reason: str) -> None:
        row = {**self.common(cell), "workloads": list(cell.workloads), "status": status, "reason": reason}
        self.failures.append(row)
        self.append(row)
        print(f"{cell.variant.label} {cell.dtype} {' '.join(cell.workloads)}: {status}: {reason}", flush=True)

    def common(self, cell: Cell) -> dict[str, Any]:
        return {
            "run": str(self.began),
            "time": time.strftime("%H:%M:%S"),
            "engine": cell.variant.label,
            "dtype": cell.dtype,
            "round": cell.round,
            "threads": self.chosen.threads,
        }

    def append(self, row: dict[str, Any]) -> None:
        with open(self.out / "results.jsonl", "a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")

    def write_table(self) -> None:
        """Write the table of this run, with what the reference now says of the tokens."""
        for row, outputs in zip(self.rows, self.outputs, strict=True):
            row["same_tokens"] = table.agreement(outputs, self.reference.get(row["workload"][:2], {}))
        text = table.render(self.rows, self.failures, self.machine())
        (self.out / "table.md").write_text(text, encoding="utf-8")

    def machine(self) -> list[str]:
        """Return what a reader must know of the machine and the run."""
        cpu, cores = cpu_info()
        memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / (1 << 30)
        half = "bfloat16 in hardware" if self.has_half else "no bfloat16 arithmetic"
        versions = ", ".join(f"{name} {importlib.metadata.version(name)}" for name in ("torch", "transformers"))
        python = ".".join(map(str, sys.version_info[:3]))
        command = shlex.join(["python", "-m", "tests.bench", *sys.argv[1:]])
        quick = (
            ["QUICK: a few short requests of each workload; these figures mean nothing"] if self.chosen.quick else []
        )
        return [
            *quick,
            f"{cpu}, {cores} cores, {half}, {memory:.0f} GiB of memory; {self.chosen.threads} threads for each engine",
            f"Python {python}, {versions}; {self.chosen.model.name}, dequantized to float16",
            f"`{command}` on {self.began:%Y-%m-%d %H:%M}, greedy, end-of-sequence tokens ignored",
        ]


def cpu_info() -> tuple[str, int]:
    """Return the name of the CPU, with its widest vectors, and the cores that may be used."""
    info = _cpuinfo()
    name = info.get("model name", "unknown CPU")
    vectors = next((v for f, v in (("avx512f", "AVX-512"), ("avx2", "AVX2")) if f in info.get("flags", "").split()), "")
    family = f"family {info.get('cpu family', '?')} model {info.get('model', '?')}"
    return f"{name} ({', '.join(filter(None, (family, vectors)))})", len(os.sched_getaffinity(0))


def has_half() -> bool:
    """Tell whether the CPU multiplies bfloat16 in hardware."""
    return bool({"avx512_bf16", "amx_bf16"} & set(_cpuinfo().get("flags", "").split()))


def _cpuinfo() -> dict[str, str]:
    pairs = (line.partition(":") for line in Path("/proc/cpuinfo").read_text().split("\n\n")[0].splitlines())
    return {name.strip(): value.strip() for name, _, value in pairs}


if __name__ == "__main__":
    main(sys.argv[1:])
