"""What rank 0 can do: runs of many short rows with the echo engine, whose generating costs next to nothing.

Run it with `python -m tests.bench.scale --rows 100000 1000000`; ten million rows take about 20 minutes on two cores,
and 5 GB of disk. Memory is that which is rank 0's own: of the token store, which it maps, the kernel keeps what fits.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

from tests.bench.engines import ROOT

HEADS = ("rows", "total s", "read s", "plan, scatter, generate s", "merge s", "rows/s", "rank 0 GiB", "mapped too GiB",
         "messages", "GB sent")  # fmt: skip
SLOTS = 1024
SAMPLE_S = 0.2


@dataclass
class Peak:
    """The most memory that a process had, in bytes."""

    own: int = 0
    mapped: int = 0
    """With the files that it maps."""

    def look(self, pid: int) -> None:
        """Take in what it has now."""
        try:
            lines = dict(line.split(":", 1) for line in Path(f"/proc/{pid}/status").read_text().splitlines())
        except OSError:
            return
        if "RssAnon" in lines:
            self.own = max(self.own, int(lines["RssAnon"].split()[0]) << 10)
            self.mapped = max(self.mapped, int(lines["VmHWM"].split()[0]) << 10)


def write_corpus(path: Path, rows: int) -> None:
    """Write rows of about 25 bytes of prompt, 16 kinds of sampling among them."""
    with open(path, "w", encoding="utf-8") as file:
        for row in range(rows):
            text = f"row {row}: {'x' * (row * 7919 % 24)}"
            value = {"id": f"r{row}", "prompt": text, "sampling": {"max_new_tokens": 1 + row * 31 % 16}}
            file.write(json.dumps(value) + "\n")


def measure(rows: int, ranks: int, folder: Path) -> tuple[str, ...]:
    """Run once; return the cells of a row of the table."""
    corpus, runs = folder / f"{rows}.jsonl", folder / "runs"
    write_corpus(corpus, rows)
    program = [sys.executable, str(ROOT / "tests" / "echo_job.py"), "--corpus", str(corpus), "--runs", str(runs)]
    mpirun = str(Path(sys.executable).with_name("mpirun"))
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "ECHO_SLOTS": str(SLOTS)}
    began, peak = time.monotonic(), Peak()
    with (
        open(folder / "log", "w", encoding="utf-8") as log,
        subprocess.Popen([mpirun, "-n", str(ranks), *program], stdout=log, stderr=log, env=environment) as process,
    ):
        while process.poll() is None:
            for pid in rank_0():
                peak.look(pid)
            time.sleep(SAMPLE_S)
    took = time.monotonic() - began
    if process.returncode:
        sys.exit((folder / "log").read_text())
    summary = json.loads((runs / str(rows) / "summary.json").read_text())
    seconds = summary["seconds"]
    middle = took - seconds["tokenize"] - seconds["gather"] - seconds["merge"]
    return (
        f"{rows:,}", f"{took:.0f}", f"{seconds['tokenize']:.1f}", f"{middle:.1f}",
        f"{seconds['gather'] + seconds['merge']:.1f}", f"{rows / took:,.0f}", f"{peak.own / 2**30:.2f}",
        f"{peak.mapped / 2**30:.2f}", f"{summary['messages']:,}", f"{summary['message_bytes'] / 1e9:.2f}",
    )  # fmt: skip


def rank_0() -> list[int]:
    """Return the process that MPI calls rank 0 of the echo job."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            if b"echo_job.py" in (folder / "cmdline").read_bytes():
                variables = (folder / "environ").read_bytes().split(b"\0")
                found += [int(folder.name)] if b"PMI_RANK=0" in variables else []
        except OSError:
            continue
    return found


def table(rows: list[tuple[str, ...]], ranks: int) -> str:
    """Return the table as Markdown."""
    lines = [f"## Rank 0's own work: short rows, the echo engine, {ranks} ranks on {os.cpu_count()} cores", ""]
    lines += [f"| {' | '.join(HEADS)} |", "|" + " ---: |" * len(HEADS)]
    lines += [f"| {' | '.join(cells)} |" for cells in rows]
    return "\n".join(lines) + "\n"


def main() -> None:
    """Measure each size once."""
    parser = argparse.ArgumentParser("python -m tests.bench.scale", description=__doc__)
    parser.add_argument("--rows", type=int, nargs="+", default=[100_000, 1_000_000])
    parser.add_argument("--ranks", type=int, default=4)
    chosen = parser.parse_args()
    found = []
    for rows in chosen.rows:
        with tempfile.TemporaryDirectory() as folder:
            found.append(measure(rows, chosen.ranks, Path(folder)))
        print(table(found, chosen.ranks), flush=True)
    out = ROOT / "runs" / "bench" / "scale.md"
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(table(found, chosen.ranks), encoding="utf-8")


if __name__ == "__main__":
    main()
