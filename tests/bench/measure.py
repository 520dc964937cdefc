"""What every run_*.py shares: load, warm up, and measure one window for each workload. Standard library alone.

A window holds the generation and nothing else: no loading, no warm-up, no tokenizing. Beside the wall time it knows how
much CPU time *other* processes took in it, without which a figure of a shared machine cannot be judged.
"""

import argparse
import json
import os
import resource
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

TICKS = os.sysconf("SC_CLK_TCK")
GIB = 1 << 30


@dataclass(frozen=True)
class Ask:
    """One request: greedy, and exactly so many tokens, whatever they are."""

    id: int
    prompt: list[int]
    max_new: int


@dataclass(frozen=True)
class Options:
    """What an engine is loaded with."""

    model: Path
    """Model directory with float32 weights."""
    gguf: Path
    """The same weights as GGUF."""
    dtype: str
    threads: int
    processes: int
    """How many share the work, this one included."""
    most_tokens: int
    """Prompts and completions of the largest workload together: what a cache must hold at most."""
    settings: dict[str, Any] = field(default_factory=dict)
    """Of this engine alone, from the command line."""
    notes: list[str] = field(default_factory=list)
    """What a reader of the table must know; the engine appends to it."""


class Unsupported(Exception):
    """The engine cannot do what was asked for; the message says why."""


Generate = Callable[[Sequence[Ask]], list[list[int]]]
Load = Callable[[Options], Generate]


def main(load: Load) -> None:
    """Measure an engine as the command line says; leave the figures in the file --result, whatever happens."""
    parser = argparse.ArgumentParser()
    parser.add_argument("workloads", nargs="+", type=Path)
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--gguf", type=Path, required=True)
    parser.add_argument("--dtype", required=True)
    parser.add_argument("--threads", type=int, required=True)
    parser.add_argument("--result", type=Path, required=True)
    parser.add_argument("--part", type=int, default=0)
    parser.add_argument("--parts", type=int, default=1)
    parser.add_argument("--set", action="append", default=[], metavar="NAME=VALUE")
    flags = parser.parse_args()
    found: dict[str, Any] = {"windows": []}
    try:
        _measure(load, flags, found)
    except Unsupported as error:
        found["unsupported"] = str(error)
    except BaseException as error:
        found["error"] = f"{type(error).__name__}: {error}".splitlines()[0][:300]
        traceback.print_exc()
    _write(flags.result, found)
    os._exit("error" in found)  # some engines hang, or print, when they are torn down


def _measure(load: Load, flags: argparse.Namespace, found: dict[str, Any]) -> None:
    from tests.bench.workloads import deal

    works = [json.loads(path.read_text()) for path in flags.workloads]
    asks = [deal([Ask(**row) for row in work["asks"]], flags.part, flags.parts) for work in works]
    most = max(sum(len(ask.prompt) + ask.max_new for ask in each) for each in asks)
    settings = dict(_setting(text) for text in flags.set)
    options = Options(flags.model, flags.gguf, flags.dtype, flags.threads, flags.parts, most, settings)
    begin = time.monotonic()
    generate = load(options)
    found |= {"load_s": time.monotonic() - begin, "notes": options.notes}
    generate([Ask(**row) for row in works[0]["warmup"]])
    for index, (work, mine) in enumerate(zip(works, asks, strict=True)):
        _forget_peak()
        _meet(flags.result, f"{index}", flags.part, flags.parts)
        window = _Window()
        tokens = generate(mine)
        found["windows"].append(
            {
                "workload": work["name"],
                "digest": work["digest"],
                "requests": len(mine),
                "prompt_tokens": sum(len(ask.prompt) for ask in mine),
                **window.close(),
                "output_tokens": sum(map(len, tokens)),
                "wrong_lengths": sum(len(ids) != ask.max_new for ask, ids in zip(mine, tokens, strict=True)),
                "outputs": {ask.id: list(map(int, ids)) for ask, ids in zip(mine, tokens, strict=True)},
            }
        )
        _write(flags.result, found)  # what was measured stands, even if the next workload takes too long


class _Window:
    """From now until `close`: the wall clock, and who took how much CPU time."""

    def __init__(self) -> None:
        self._own, (self._busy, self._steal) = _own_cpu_s(), _machine_cpu_s()
        self._begin = time.monotonic()

    def close(self) -> dict[str, float]:
        end = time.monotonic()
        busy, steal = _machine_cpu_s()
        return {
            "begin": self._begin,
            "end": end,
            "cpu_s": _own_cpu_s() - self._own,
            "busy_s": busy - self._busy,
            "steal_s": steal - self._steal,
            "peak_rss": _peak_rss(),
        }


def merge(parts: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Make one window of those of processes that shared a workload."""
    own = sum(part["cpu_s"] for part in parts)
    outputs: dict[str, list[int]] = {}
    for part in parts:
        outputs |= part["outputs"]
    return {
        "workload": parts[0]["workload"],
        "digest": parts[0]["digest"],
        "wall_s": max(part["end"] for part in parts) - min(part["begin"] for part in parts),
        "peak_rss_gib": sum(part["peak_rss"] for part in parts) / GIB,
        "cpu_s": own,
        "other_cpu_s": max(0.0, max(part["busy_s"] for part in parts) - own),
        "steal_s": max(part["steal_s"] for part in parts),
        **{
            name: sum(part[name] for part in parts)
            for name in ("requests", "prompt_tokens", "output_tokens", "wrong_lengths")
        },
        "outputs": outputs,
    }


def _setting(text: str) -> tuple[str, Any]:
    name, _, value = text.partition("=")
    try:
        return name, json.loads(value)
    except json.JSONDecodeError:
        return name, value


def _meet(result: Path, name: str, part: int, parts: int) -> None:
    """Wait until all processes that share a workload are here."""
    if parts == 1:
        return
    result.with_suffix(f".ready-{name}").touch()
    others = [result.with_name(f"part{other}.ready-{name}") for other in range(parts)]
    assert result.with_suffix(f".ready-{name}") == others[part]
    while not all(other.exists() for other in others):
        time.sleep(0.002)


def _write(path: Path, found: dict[str, Any]) -> None:
    aside = path.with_suffix(".aside")
    aside.write_text(json.dumps(found))
    aside.replace(path)


def _machine_cpu_s() -> tuple[float, float]:
    """Return the CPU seconds that all processes have used so far, and those that the hypervisor took away."""
    user, nice, system, _, _, irq, softirq, steal = map(int, Path("/proc/stat").read_text().split()[1:9])
    return (user + nice + system + irq + softirq) / TICKS, steal / TICKS


def _own_cpu_s() -> float:
    usage = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(each.ru_utime + each.ru_stime for each in usage) + sum(_process_cpu_s(pid) for pid in _children())


def _process_cpu_s(pid: int) -> float:
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return 0.0
    return (int(fields[11]) + int(fields[12])) / TICKS


def _children() -> list[int]:
    """Return the processes that this one has started, and those that they have started."""
    parents: dict[int, int] = {}
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            parents[int(path.parent.name)] = int(path.read_text().rpartition(")")[2].split()[1])
        except OSError:
            continue
    found = [os.getpid()]
    for pid in found:
        found += [child for child, parent in parents.items() if parent == pid]
    return found[1:]


def _forget_peak() -> None:
    """Let the kernel's peak begin again at what is held now."""
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return


def _peak_rss() -> int:
    return sum(_process_peak(pid) for pid in (os.getpid(), *_children()))


def _process_peak(pid: int) -> int:
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except OSError:
        return 0
    return next((int(line.split()[1]) << 10 for line in lines if line.startswith("VmHWM")), 0)
