"""Check an allocation on all of its ranks before a run spends hours in it.

Every rank gathers its facts (`look`), rank 0 collects them (`Examination`), and `hpc.doctor.diagnose` judges them. A
call that may hang, as on a dead file system, runs in a thread of rank 0, or on a rank that rank 0 then names.
"""

import contextlib
import os
import shutil
import socket
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from hpc.corpus.errors import CorpusError
from hpc.corpus.files import find_files
from hpc.doctor.diagnose import Facts, Findings, diagnose, may_use_gpus
from hpc.doctor.probes import ASK_TORCH, SHARED_S, ask, ask_vllm, clock_offset, leave_file, read_ends, try_cache
from hpc.engine.registry import AUTO, ENGINES
from hpc.engine.vllm import installed
from hpc.exit import Refusal
from hpc.job import Job
from hpc.model.loader import Loader
from hpc.mpi.ask import Inquiry, answer
from hpc.mpi.binding import host_info
from hpc.mpi.comm import Buffer, Comm, pack, unpack, wait_for
from hpc.mpi.world import mpi_library
from hpc.rundir.directory import run_path
from hpc.rundir.lock import RunLock, is_held
from hpc.slurm.queue import has_slurm

PREPARE_S, LIMIT_S = 7.0, 20.0
"""Seconds from the start until rank 0 asks the other ranks, with the facts that it has by then, and until it gives up
on ranks that have not answered: the whole is to take less than half a minute."""


def examine(job: Job, world: Comm, loader: Loader) -> int:
    """Check the allocation and print the lines on rank 0; return the exit code, 1 on rank 0 if a line says FIX.

    Ranks that do not answer within `LIMIT_S` are named; `world.abort` then ends all ranks.
    """
    return answer_doctor(job, world) if world.rank else Examination(job, world).lead(loader)


@dataclass
class Examination:
    """Rank 0's side."""

    job: Job
    world: Comm
    prepare_s: float = PREPARE_S
    limit_s: float = LIMIT_S
    hellos: dict[int, Buffer] = field(default_factory=dict)
    facts: dict[int, Facts] = field(default_factory=dict)
    _inquiry: Inquiry = field(init=False)
    _stack: contextlib.ExitStack = field(default_factory=contextlib.ExitStack)
    # Never in a `with`, which would wait for a thread that hangs; `abort` does not.
    _pool: ThreadPoolExecutor = field(default_factory=lambda: ThreadPoolExecutor(8))
    _tasks: dict[str, Future[Any]] = field(default_factory=dict)
    _asked: float = 0.0

    def __post_init__(self) -> None:
        self._inquiry = Inquiry(self.world)

    def lead(self, loader: Loader) -> int:
        """Prepare, ask every rank, print the lines, dismiss the ranks; return the exit code."""
        began, size = time.monotonic(), self.world.size
        self._begin("hello", host_info)
        self._begin("allocation", has_slurm)
        self._begin("model", lambda: resolve(self.job, loader))
        self._begin("trial", lambda: self._stack.enter_context(trial(self.job)))
        self._wait(lambda: self._idle() and len(self.hellos) == size, began + self.prepare_s)
        tried, model = self._result("trial"), self._result("model")
        folder = tried["folder"] if tried else None
        self._ask({"folder": folder, "model": model["path"] if model else None})
        self._wait(lambda: self._idle() and len(self.facts) == size, began + self.limit_s)
        facts = {rank: {**self.facts[rank], "seen": self._sees(folder, rank)} for rank in sorted(self.facts)}
        model, allocation = self._result("model"), self._result("allocation")
        found = Findings(self.job, size, os.environ, self.hellos, facts, tried, model, allocation, time.time())
        lines = diagnose(found)
        print(*lines, sep="\n", flush=True)
        self._end()
        return int(not all(line.ok for line in lines))

    def _begin(self, name: str, task: Callable[[], Any]) -> None:
        self._tasks[name] = self._pool.submit(task)

    def _result(self, name: str) -> Any:
        return self._tasks[name].result() if name in self._tasks and self._tasks[name].done() else None

    def _idle(self) -> bool:
        return all(task.done() for task in self._tasks.values())

    def _ask(self, question: Facts) -> None:
        self._asked = time.time()
        self._inquiry.ask(lambda _: question)
        gpus = 0 in self.hellos and may_use_gpus(self.job, self.hellos[0])
        self._begin("look", lambda: look(0, question, gpus, os.environ, wants_vllm(self.job, gpus)))

    def _wait(self, condition: Callable[[], bool], until: float) -> None:
        """Receive messages until the condition is true, or the monotonic clock reaches `until`."""

        def ended() -> bool:
            for message in self._inquiry.receive():
                values = unpack(message.array)[0]
                clock = clock_offset(self._asked, values["received"], values["sent"], time.time())
                self.facts[message.source] = {**values, "clock": clock}
            self.hellos.update(self._inquiry.hellos)
            if (hello := self._result("hello")) is not None:
                self.hellos[0] = hello
            if (facts := self._result("look")) is not None:
                self.facts[0] = {**facts, "clock": (0.0, 0.0)}
            return condition() or time.monotonic() > until

        wait_for(ended)

    def _sees(self, folder: str | None, rank: int) -> bool:
        """Return whether rank 0 sees a rank's file; False, untried, if its own look at the folder hangs."""
        return folder is not None and 0 in self.facts and Path(folder, str(rank)).exists()

    def _end(self) -> None:
        """Restore the run directory and dismiss the other ranks; abort if a rank or a thread has not answered."""
        if self._tasks["trial"].done():
            self._begin("end", self._stack.close)
        self._wait(self._idle, time.monotonic() + SHARED_S)
        if len(self.facts) < self.world.size or not self._idle():
            self.world.abort("scattergen: ended without waiting for what did not answer in time")
        self._inquiry.dismiss()
        self.world.close()


def answer_doctor(job: Job, world: Comm, patience_s: float = LIMIT_S + 10) -> int:
    """Answer rank 0 until it says goodbye; end all ranks if that takes longer than `patience_s`."""
    hello = host_info()
    gpus = may_use_gpus(job, hello)

    def reply(question: Facts) -> Buffer:
        received = time.time()
        facts = look(world.rank, question, gpus, os.environ, wants_vllm(job, gpus))
        return pack({**facts, "received": received, "sent": time.time()})

    if not answer(world, hello, reply, patience_s):
        world.abort(f"scattergen: rank {world.rank} on {socket.gethostname()}: no word of rank 0 in {patience_s:g} s")
    world.close()
    return 0


def wants_vllm(job: Job, gpus: bool) -> bool:
    """Return whether to probe vLLM: the job needs it, or `auto` may choose it because it is installed."""
    if job.engine == AUTO and job.replica_devices == 1:
        return gpus and installed.version() is not None
    return job.engine == AUTO or ENGINES[job.engine].optional


def resolve(job: Job, loader: Loader) -> Facts:
    """Return the model's path, or the error in finding it."""
    try:
        return {"path": str(loader.find(job.model).absolute()), "error": ""}
    except Exception as error:  # files can be broken in any way
        return {"path": None, "error": str(error) if isinstance(error, Refusal) else f"{type(error).__name__}: {error}"}


@contextlib.contextmanager
def trial(job: Job) -> Iterator[Facts]:
    """Make a folder with a nonce and a held lock in the run directory, or tell the obstacle; remove it at the end."""
    values: dict[str, Any] = {"folder": None, "corpus": "", "error": "", "lock": ""}
    made: list[Path] = []
    with contextlib.ExitStack() as undo:
        try:
            files = find_files(job.corpus)
        except (CorpusError, OSError) as error:
            values["corpus"], files = str(error), (Path(job.corpus[0]),)
        run = run_path(job, files)
        values |= {"run": str(run), "files": len(files)}
        try:
            made = [path for path in (run, *run.parents) if not path.exists()]
            run.mkdir(parents=True, exist_ok=True)
            folder = Path(tempfile.mkdtemp(prefix="doctor-", dir=run))
            undo.callback(shutil.rmtree, folder, ignore_errors=True)
            (folder / "nonce").write_text(folder.name)
            values |= {"busy": is_held(run), "free": shutil.disk_usage(run).free}
            values["folder"] = str(folder)
            lock = RunLock(folder)
            undo.callback(lock.release)
            lock.acquire()
        except Refusal as refusal:
            values["lock"] = str(refusal)
        except OSError as error:
            values["error"] = f"{error.strerror} ({error.filename})"
        try:
            yield values
        finally:
            undo.close()
            for path in made:
                with contextlib.suppress(OSError):  # not made, or somebody else has put something into it
                    path.rmdir()


def look(rank: int, question: Facts, gpus: bool, environment: Mapping[str, str], vllm: bool = False) -> Facts:
    """Return the facts of a rank, given rank 0's question: the folder of its trial and the path of the model."""
    temp = environment.get("TMPDIR") or "/tmp"
    caches = [(name, environment.get(name)) for name in ("TRITON_CACHE_DIR", "TORCHINDUCTOR_CACHE_DIR")]
    folder = question["folder"]
    unshared = leave_file(Path(folder), rank) if folder else None
    return {
        "host": socket.gethostname(),
        "library": mpi_library(),
        "cuda": ask(ASK_TORCH) if gpus else None,
        "vllm": {"version": installed.version(), "error": ask_vllm()} if vllm else None,
        "unshared": unshared,
        "locked": is_held(Path(folder)) if unshared == "" else None,
        "caches": [try_cache(name, path) for name, path in [*caches, ("TMPDIR", temp)] if path],
        "model": read_ends(Path(question["model"])) if question["model"] else None,
        "temp": temp,
        "temp_free": shutil.disk_usage(temp).free if Path(temp).exists() else 0,
    }
