"""How fast corpora of each format are read: the same rows, cut, decoded, checked and written into a token store.

Run it with `python -m tests.bench.reading --rows 200000`, in one process, with a tokenizer whose tokens are words and
cost next to nothing: a real one makes the formats differ less. Each round reads every format once.
"""

import argparse
import bz2
import gzip
import json
import os
import random
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from statistics import median
from typing import Any

from hpc.corpus.files import Blocks, name_files
from hpc.corpus.find import find_format
from hpc.corpus.formats import rows
from hpc.corpus.store import StoreWriter
from tests.bench.engines import ROOT
from tests.corpus.formats.written import arrow_stream, delimited, parquet, zstd
from tests.fakes import ByteTokenizer
from tests.stores import make_checker

HEADS = ("format", "MB", "rows/s, decoded", "rows/s, read", "of JSONL", "peak MiB more")
WRITE_ROWS = 50_000
"""Rows of a row group; so many are in memory while the corpora are written."""
PLAIN = "c.jsonl"


def make_rows(number: int) -> Iterator[dict[str, Any]]:
    """Yield rows with a prompt of about 600 bytes and two other columns."""
    drawn = random.Random(1)
    words = ["".join(drawn.choices("etaoinshrdlué", k=drawn.randint(2, 9))) for _ in range(5000)]
    for row in range(number):
        text = " ".join(drawn.choices(words, k=88))
        yield {"id": f"r{row}", "prompt": f"{row}: {text}", "label": f"class {row % 7}", "note": text[:100]}


class WordTokenizer(ByteTokenizer):
    """A token for each word."""

    def encode(self, texts: Sequence[str], special_tokens: bool) -> list[list[int]]:
        return [[*map(len, text.split())] for text in texts]


def write_corpora(folder: Path, number: int) -> None:
    """Write the same rows in each format."""
    made = list(make_rows(number))
    lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in made).encode()
    formats: dict[str, Callable[[], bytes]] = {
        PLAIN: lambda: lines,
        "c.jsonl.gz": lambda: gzip.compress(lines, 6),
        "c.jsonl.bz2": lambda: bz2.compress(lines),
        "c.jsonl.zst": lambda: zstd.compress(lines),
        "utf16.jsonl": lambda: lines.decode().encode("utf-16"),
        "c.json": lambda: json.dumps(made, ensure_ascii=False).encode(),
        "c.csv": lambda: delimited(made),
        "c.parquet": lambda: parquet(made, row_group_size=WRITE_ROWS, compression="zstd"),
        "c.arrow": lambda: arrow_stream(made, 1000),
    }
    for name, data in formats.items():
        (folder / name).write_bytes(data())


def read(path: Path, whole: bool) -> float:
    """Return the CPU seconds that reading takes; if not `whole`, only to the decoded rows."""
    with tempfile.TemporaryDirectory() as folder:
        began = time.process_time()
        blocks = Blocks(name_files([path], [find_format(path)]))
        if whole:
            writer, checker = StoreWriter(Path(folder)), make_checker(context_tokens=None, encoder=WordTokenizer())
            for block in blocks:
                writer.append(block, checker.check_block(block))
            writer.finish({}, blocks.digests)
        else:
            for block in blocks:
                for _ in rows(block, ("id", "prompt")):
                    pass
        return time.process_time() - began


def peak_mib(path: Path) -> float:
    """Return by how much the memory of a process grows that decodes a file."""
    sys.stdout.flush()
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        before = _peak()
        read(path, whole=False)
        os.write(writing, str(_peak() - before).encode())
        os._exit(0)
    os.close(writing)
    os.waitpid(child, 0)
    with os.fdopen(reading) as said:
        return float(said.read()) / 1024


def _peak() -> int:
    [line] = [line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM")]
    return int(line.split()[1])


def main() -> None:
    """Measure each format so often, and print the medians."""
    parser = argparse.ArgumentParser("python -m tests.bench.reading", description=__doc__)
    parser.add_argument("--rows", type=int, default=200_000)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--formats", nargs="+", default=None, metavar="FILE", help="of those: c.jsonl c.jsonl.zst …")
    chosen = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        if (writer := os.fork()) == 0:  # so that its memory is not this process's peak
            write_corpora(Path(folder), chosen.rows)
            os._exit(0)
        os.waitpid(writer, 0)
        paths = sorted(Path(folder).iterdir(), key=lambda path: (path.name != PLAIN, path.name))
        paths = [path for path in paths if chosen.formats is None or path.name in (PLAIN, *chosen.formats)]
        peaks = {path: peak_mib(path) for path in paths}
        found = [{path: (read(path, False), read(path, True)) for path in paths} for _ in range(chosen.rounds)]
        plain = median(times[paths[0]][1] for times in found)
        lines = [f"| {' | '.join(HEADS)} |", "| --- |" + " ---: |" * (len(HEADS) - 1)]
        for path in paths:
            decoded, whole = (median(times[path][part] for times in found) for part in range(2))
            cells = (path.name, f"{path.stat().st_size / 1e6:.0f}", f"{chosen.rows / decoded:,.0f}",
                     f"{chosen.rows / whole:,.0f}", f"{plain / whole:.2f}", f"{peaks[path]:.0f}")  # fmt: skip
            lines.append(f"| {' | '.join(cells)} |")
    print("\n".join(lines))
    out = ROOT / "runs" / "bench" / "reading.md"
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text("\n".join(lines) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
