"""Run with `python -m tests.bench.balance`: how evenly ranks end, and how near `plan` comes to what runs take.

Static scatter, LPT, and LPT with a tail, on real ranks and simulated ones. Static is what people do by hand: the
corpus cut into as many pieces of as many rows, a process each. LPT is `--tail 0`, LPT + tail the default. All three
are the code that runs, not a model of it: the simulator is `hpc.forecast.simulate` with `hpc.plan.shard`, and real
ranks are `mpirun`.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import numpy.typing as npt

from hpc.engine.cost import CostModel
from hpc.forecast.simulate import Workload, simulate
from hpc.plan.shard import Deal, deal
from hpc.report.read_events import read
from tests.bench.engines import ROOT
from tests.bench.paced import BOUNDS, COSTS

Ints = npt.NDArray[np.int64]

STRATEGIES = ("static", "LPT", "LPT + tail")
TAIL = 0.5
SLOW = 1
"""The slow rank, at half speed."""
SIMULATED = (8, 64, 256, 1024)
ROWS_PER_RANK, PACED_ROWS = 400, 800
HEADS = ("ranks", "corpus", "longest row alone", *(f"{s}: idle, max/mean" for s in STRATEGIES))


@dataclass(frozen=True)
class Corpus:
    """Rows of a corpus; arrays of shape [rows], in tokens."""

    name: str
    prompts: Ints
    new: Ints
    """What is generated."""
    limits: Ints
    """What a plan knows of it."""
    slow: bool = False
    """Whether a rank is slow."""


def corpora(rows: int, longest: int, scale: float = 1.0) -> list[Corpus]:
    """Make the corpora; `scale` shortens all lengths."""
    random = np.random.default_rng(20261123)

    def lengths(values: npt.NDArray[np.float64], most: int) -> Ints:
        return np.clip(values * scale, 4, most).astype(np.int64)

    even = lengths(np.full(rows, 64.0), longest)
    prompts = lengths(random.lognormal(np.log(60), 1.1, rows), 1000)
    skewed = lengths(random.lognormal(np.log(48), 0.8, rows), min(longest, 256))
    heavy = even // 2
    tail = random.choice(rows, max(1, rows // 100), replace=False)
    heavy[tail] *= 20
    heavy = np.minimum(heavy, longest)
    same = np.full(rows, max(4, int(64 * scale)), dtype=np.int64)
    return [
        Corpus("even", same, even, even),
        Corpus("lognormal", prompts, skewed, skewed),
        Corpus("lognormal, lengths unknown", prompts, skewed, np.full(rows, skewed.max())),
        Corpus("heavy tail", same, heavy, heavy),
        Corpus("heavy tail, lengths unknown", same, heavy, np.full(rows, heavy.max())),
        Corpus("even, a rank at half speed", same, even, even, slow=True),
    ]


def simulated_row(corpus: Corpus, ranks: int) -> tuple[str, ...]:
    """Return the cells of a row of the table."""
    count = len(corpus.prompts)
    none, one = np.zeros(count, dtype=np.int64), np.ones(count, dtype=np.int64)
    work = Workload(corpus.prompts, none, none - 1, corpus.new, one)
    dear = CostModel().requests(corpus.prompts, corpus.limits)
    slow = {SLOW: 2.0} if corpus.slow else {}
    longest = np.argmax(CostModel().requests(corpus.prompts, corpus.new))
    alone = Workload(*(values[[longest]] for values in (work.prompts, none, none - 1, work.new, one)))
    [least] = simulate(COSTS, BOUNDS, alone, Deal((np.array([0]),), none[:0]), dear[[longest]])
    cells, best = [], np.inf
    for strategy in STRATEGIES:
        plan = deal(dear, none, ranks, TAIL if strategy == "LPT + tail" else 0.0)
        if strategy == "static":
            plan = Deal(tuple(np.array_split(np.arange(count), ranks)), none[:0])
        ends = simulate(COSTS, BOUNDS, work, plan, dear, slow)
        best = min(best, max(ends))
        cells.append(cell(ends))
    return (f"{ranks:,}", corpus.name, f"{least / best:.0%} of the best run", *cells)


def cell(ends: Sequence[float]) -> str:
    """Return how much of the run ranks are idle at its end, and the last end over the mean."""
    return f"{max(0.0, 1 - np.mean(ends) / max(ends)):.1%}, {max(ends) / np.mean(ends):.3f}"


def real(corpus: Corpus, ranks: int, paced: bool, folder: Path, flags: Sequence[str]) -> tuple[str, ...]:
    """Run a corpus with each strategy; return the cells of a row of the table."""
    cells, walls = [], []
    for number, strategy in enumerate(STRATEGIES):
        own = folder / f"{number}"
        own.mkdir(parents=True)
        ends = run_static(corpus, ranks, paced, own, flags) if strategy == "static" else run_mpi(
            corpus, ranks, paced, own, (*flags, "--tail", "0" if strategy == "LPT" else str(TAIL))
        )  # fmt: skip
        walls.append(max(ends))
        cells.append(cell(ends))
    return (f"{ranks}", corpus.name, " / ".join(f"{wall:.1f}" for wall in walls) + " s", *cells)


def write_corpus(corpus: Corpus, path: Path, rows: Ints) -> None:
    """Write some rows of a corpus; the first token of a prompt says how many are generated."""
    random = np.random.default_rng(7)
    with open(path, "w", encoding="utf-8") as file:
        for row in rows.tolist():
            prompt = [int(corpus.new[row]), *random.integers(100, 40_000, corpus.prompts[row] - 1).tolist()]
            sampling = {
                "max_new_tokens": int(corpus.limits[row]),
                "ignore_eos": bool(corpus.new[row] == corpus.limits[row]),
            }
            file.write(json.dumps({"id": row, "prompt_token_ids": prompt, "sampling": sampling}) + "\n")


def run_mpi(corpus: Corpus, ranks: int, paced: bool, folder: Path, flags: Sequence[str]) -> list[float]:
    """Run with mpirun; return when each rank ended, in seconds from when the first began."""
    write_corpus(corpus, folder / "c.jsonl", np.arange(len(corpus.prompts)))
    mpirun = str(Path(sys.executable).with_name("mpirun"))
    with burdened(corpus.slow and not paced):
        finish(
            [
                start(
                    [mpirun, "-n", str(ranks)],
                    folder,
                    "c",
                    paced,
                    {"BALANCE_SLOW": str(SLOW)} if corpus.slow else {},
                    flags,
                )
            ]
        )
    progress = [rank.progress for rank in read(folder / "runs" / "c").attempts[0].ranks]
    began = min(p.began for p in progress if p.began)
    return [max(0.0, p.ended - began) for p in progress]


def run_static(corpus: Corpus, ranks: int, paced: bool, folder: Path, flags: Sequence[str]) -> list[float]:
    """Run a process for each piece of the corpus, all at once; return how long each generated."""
    processes = []
    with burdened(corpus.slow and not paced):
        for rank, rows in enumerate(np.array_split(np.arange(len(corpus.prompts)), ranks)):
            write_corpus(corpus, folder / f"c{rank}.jsonl", rows)
            slow = {"BALANCE_SLOW": "0"} if corpus.slow and rank == SLOW else {}
            processes.append(start([], folder, f"c{rank}", paced, {**slow, "BALANCE_PIN": str(rank)}, flags))
        finish(processes)
    found = []
    for rank in range(ranks):
        [only] = read(folder / "runs" / f"c{rank}").attempts[0].ranks
        found.append(only.progress.ended - only.progress.began)
    return found


def start(
    launcher: Sequence[str], folder: Path, name: str, paced: bool, variables: dict[str, str], flags: Sequence[str]
) -> subprocess.Popen[bytes]:
    """Start a run of the corpus with a name."""
    job = str(ROOT / "tests" / "bench" / "balance_job.py")
    command = [*launcher, sys.executable, job, "run", "--corpus", f"{name}.jsonl", "--runs", "runs", *flags]
    chosen = {"BALANCE_PACED": "1"} if paced else {"BALANCE_PIN": "0"}
    variables = {**chosen, **variables}
    if paced:
        variables.pop("BALANCE_PIN", None)
    environment = {**os.environ, "OMP_NUM_THREADS": "1", **variables}
    with open(folder / f"{name}.log", "wb") as log:  # the process keeps its own
        return subprocess.Popen(command, cwd=folder, env=environment, stdout=log, stderr=log)


def finish(processes: Sequence[subprocess.Popen[bytes]]) -> None:
    """Wait for processes, all of which must end well."""
    if any(process.wait() for process in processes):
        sys.exit(f"a run failed: {processes[0].args!r}")


class burdened:  # noqa: N801  (reads as a statement)
    """While this lasts, another process wants the core of the slow rank."""

    def __init__(self, really: bool) -> None:
        self._really = really

    def __enter__(self) -> None:
        if self._really:
            core = sorted(os.sched_getaffinity(0))[SLOW]
            code = f"import os\nos.sched_setaffinity(0, {{{core}}})\nwhile True: pass"
            self._process = subprocess.Popen([sys.executable, "-c", code])

    def __exit__(self, *exception: object) -> None:
        if self._really:
            self._process.kill()
            self._process.wait()


def table(title: str, heads: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Return a table as Markdown."""
    lines = [f"## {title}", "", f"| {' | '.join(heads)} |", "| ---: | --- |" + " ---: |" * (len(heads) - 2)]
    return "\n".join([*lines, *(f"| {' | '.join(cells)} |" for cells in rows)]) + "\n"


def simulated() -> str:
    """Simulate all corpora on all numbers of ranks."""
    cases = [(corpus, ranks) for ranks in SIMULATED for corpus in corpora(ROWS_PER_RANK * ranks, 10_000)]
    with ProcessPoolExecutor() as pool:
        rows = list(pool.map(simulate, *zip(*cases, strict=True)))
    return table(f"Simulated ranks, {ROWS_PER_RANK} rows each", HEADS, rows)


def paced() -> str:
    """Run all corpora on four real ranks, whose engine takes its time and computes nothing."""
    with tempfile.TemporaryDirectory() as folder:
        rows = [
            real(corpus, 4, True, Path(folder, str(number)), ("--model", "paced"))
            for number, corpus in enumerate(corpora(PACED_ROWS * 4, 10_000))
        ]
    heads = (*HEADS[:2], "time of each", *HEADS[3:])
    return table("Four real ranks, an engine that waits instead of computing", heads, rows)


def model(path: Path) -> str:
    """Run the corpora on two real ranks with a model."""
    flags = ("--model", str(path), "--dtype", "float32", "--sampling.ignore-eos", "--max-num-seqs", "16")
    chosen = [corpus for corpus in corpora(128, 400, 0.5) if "unknown" not in corpus.name]
    chosen = [replace(corpus, limits=corpus.new) for corpus in chosen]
    with tempfile.TemporaryDirectory() as folder:
        rows = [real(corpus, 2, False, Path(folder, str(number)), flags) for number, corpus in enumerate(chosen)]
    heads = (*HEADS[:2], "time of each", *HEADS[3:])
    return table("Two real ranks, a core each, SmolLM2-135M in float32, 16 rows at once", heads, rows)


def main() -> None:
    """Measure, and write the tables to runs/bench/balance.md."""
    from tests.bench import accuracy
    from tests.bench.__main__ import BENCH, DEMO_MODEL, cpu_info, make_weights, make_workloads

    parts = {"simulated": simulated, "paced": paced, "model": lambda: model(weights), "accuracy": lambda: foreseen}
    parser = argparse.ArgumentParser("python -m tests.bench.balance", description=__doc__)
    parser.add_argument("--parts", nargs="+", choices=parts, default=list(parts))
    chosen = parser.parse_args().parts
    weights, work = make_weights(DEMO_MODEL).folder, BENCH / "workloads"
    if not (work / "W1.json").exists():
        make_workloads(weights, work, quick=False)
    foreseen = accuracy.table(weights, work) if "accuracy" in chosen else ""  # first, while nothing else runs
    name, cores = cpu_info()
    text = f"# Balance and prediction\n\n{name}, {cores} cores\n"
    out = ROOT / "runs" / "bench" / "balance.md"
    out.parent.mkdir(parents=True, exist_ok=True)
    for part in chosen:
        found = parts[part]()
        text += f"\n{found}"
        out.write_text(text, encoding="utf-8")
        print(found, flush=True)


if __name__ == "__main__":
    main()
