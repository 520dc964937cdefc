"""A model that stays loaded between calls, in one process and without a run directory.

The parts are the pipeline's: rows are checked and tokenized into a token store, planned for one rank, and generated
by the engine that a job would choose. The store is a temporary folder, and completions go to the caller.
"""

import contextlib
import logging
import signal
import sys
import tempfile
import threading
import weakref
from collections.abc import Callable, Iterator
from collections.abc import Generator as Generating
from dataclasses import replace
from datetime import datetime
from pathlib import Path
from types import TracebackType
from typing import Any

from hpc.api.completion import Completion, completed, refused
from hpc.api.parameters import make_job, override
from hpc.api.rows import Chats, Prompts, corpus_rows, json_line
from hpc.corpus.formats import Block
from hpc.corpus.notes import Notes
from hpc.corpus.store import StoreWriter, TokenStore
from hpc.corpus.tokenize import Checker
from hpc.executor.crew import Crew
from hpc.executor.generate import complete, completion_maker
from hpc.executor.scatter import Backlog, make_dispatcher
from hpc.exit import Refusal
from hpc.job import Job
from hpc.model.loader import Loader, Replica
from hpc.model.verbosity import keeping_verbosity
from hpc.mpi.comm import Single
from hpc.mpi.signals import Stop
from hpc.mpi.world import launched_size
from hpc.output.journal import JournalIndex
from hpc.plan.pending import find_pending
from hpc.report.display import open_bar
from hpc.rundir.progress import Progress
from hpc.sampling_params import SamplingParams

LOGGER = logging.getLogger(__name__)

BLOCK_ROWS = 1024
"""Rows that are tokenized together: enough for the tokenizer's threads, and Ctrl-C is heard in between."""

PLACE = "prompts"
"""What messages call the rows of a call: "prompts row 3" has the index 3."""


class Generator:
    """A model that stays loaded between calls: a context manager that frees its memory at the end.

    >>> with hpc.Generator(model="MODEL", max_new_tokens=8) as generator:
    ...     first = generator.generate(["Once upon a time"])
    ...     again = generator.generate(["Once upon a time"], temperature=0.7, n=2, seed=1)
    >>> len(first), len(again[0].texts)
    (1, 2)

    `model` is a model directory, a .gguf file or a hub id. Keywords are the fields of `hpc.Job` that are about model
    and engine (`engine`, `device`, `dtype`, `context_tokens`, …), and those of `hpc.SamplingParams`, which are the
    defaults of the calls. Weights are loaded with the first row that needs them. One call at a time.

    Raises `hpc.Refusal` where a job would be refused, and where MPI or Slurm started several processes; `TypeError` for
    a keyword that is none, `ValueError` for a value that breaks its rule.
    """

    def __init__(self, model: str | Path, *, loader: Loader | None = None, **parameters: Any) -> None:
        job = make_job(str(model), parameters)
        _refuse_ranks(job.model)
        self._loader = loader or Loader()
        self._lock = threading.Lock()
        self._latest: Callable[[], Completions | None] = lambda: None
        """The last stream, if anybody still holds it."""
        self._replica: Replica | None = None
        self._closed = False
        with keeping_verbosity():
            [self._place] = Crew(Single(), Stop()).place_ranks(job)
            found = self._loader.resolve(job.model)
            if job.dtype == "auto":
                resolved: Any = self._loader.dtype(job)
                job = replace(job, dtype=resolved)
            self._job = replace(job, chat_date=job.chat_date or datetime.now().isoformat(timespec="seconds"))
            self._path = found.path
            self._loader.check(self._job, self._path, self._place)
            self._loader.examine(self._job, self._path)
            self._checker = self._loader.checker(self._job, self._path)
        self._chosen: Job | None = None

    def generate(
        self, prompts: Prompts | None = None, *, messages: Chats | None = None, **sampling: Any
    ) -> list[Completion]:
        """Return a completion for each prompt or chat, in their order; see `hpc.generate`.

        Raises `KeyboardInterrupt` after Ctrl-C; `stream` has then yielded what had ended.
        """
        with self._alone():
            completions = self._begin(prompts, messages, sampling)
            with contextlib.closing(completions):
                return sorted(completions, key=lambda completion: completion.index)

    def stream(
        self, prompts: Prompts | None = None, *, messages: Chats | None = None, **sampling: Any
    ) -> "Completions":
        """Return an iterator of completions as they end, each with the `index` of its row.

        The next call ends an iterator that has not been read to its end.
        """
        with self._alone():
            completions = Completions(self, self._begin(prompts, messages, sampling))
            self._latest = weakref.ref(completions)
            return completions

    def close(self) -> None:
        """Free the model's memory; nothing can be generated afterwards."""
        with self._alone():
            self._closed = True
            self._forget()

    def __enter__(self) -> "Generator":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    @contextlib.contextmanager
    def working(self) -> Iterator[None]:
        """Keep other threads away; raise `RuntimeError` where one is at work."""
        if not self._lock.acquire(blocking=False):
            raise RuntimeError("another thread is generating with this Generator; it takes one call at a time")
        try:
            yield
        finally:
            self._lock.release()

    @contextlib.contextmanager
    def _alone(self) -> Iterator[None]:
        """Begin a call: end what an earlier one has left under way."""
        with self.working():
            if (latest := self._latest()) is not None:
                latest.end("a later call of its Generator has ended this stream; read it to its end before")
            yield

    def _begin(
        self, prompts: Prompts | None, messages: Chats | None, parameters: dict[str, Any]
    ) -> Generating[Completion, None, None]:
        """Check what a call is given, at once, and return what generates, when it is read."""
        if self._closed:
            raise RuntimeError("this Generator is closed; make another one")
        return self._completions(corpus_rows(prompts, messages), override(self._job.sampling, parameters))

    def _completions(self, rows: list[dict[str, Any]], sampling: SamplingParams) -> Generating[Completion, None, None]:
        """Yield the completions of rows as they end, those of refused rows first."""
        with contextlib.ExitStack() as stack:
            folder = stack.enter_context(tempfile.TemporaryDirectory(prefix="scattergen-"))
            stack.enter_context(keeping_verbosity())
            tokens = _read(rows, replace(self._checker, defaults=sampling), Path(folder))
            for row, error in tokens.errors():
                yield refused(row, tokens.id(row), error)
            found = find_pending(tokens, JournalIndex(()))
            if not found.work.requests:
                return
            replica, job = self._load()
            dispatcher = make_dispatcher(replace(job, sampling=sampling), tokens, found, 1, bool(self._place.gpus))
            backlog = Backlog(sampling, lambda: backlog.add(dispatcher.next_piece(0)))
            stop, progress, display = Stop(), Progress(), stack.enter_context(contextlib.closing(open_bar()))

            def on_step() -> bool:
                display.update(found.work, {0: progress}, None)
                return bool(stop.reason)

            finish = completion_maker(replica.eos_token_ids, replica.decode, replica.goes_on)
            steps = complete(replica.engine, backlog, progress, on_step, finish)
            stack.enter_context(contextlib.closing(steps))
            lengths = tokens.prompt_tokens
            while True:
                try:
                    with stop.listening(signal.SIGINT):
                        answers = next(steps, None)
                except BaseException:  # the engine may be in the middle of anything: load it again
                    self._replica = None
                    raise
                for generated, answered in answers or ():
                    for row in answered:
                        yield completed(row, tokens.id(row), int(lengths[row]), generated)
                if stop.reason:
                    raise KeyboardInterrupt
                if answers is None:
                    on_step()  # the last rows are seen too
                    return

    def _load(self) -> tuple[Replica, Job]:
        """Return the loaded model, and the job with the engine that was chosen."""
        if self._chosen is None:
            choice = self._loader.choose_engine(self._job, self._path, self._place)
            if choice.reason:
                LOGGER.log(logging.WARNING if choice.fell_back else logging.INFO, "%s", choice.reason)
            engine: Any = choice.engine
            self._chosen = replace(self._job, engine=engine)
        if self._replica is None:
            self._replica = self._loader.load(self._chosen, self._path, self._place)
        return self._replica, self._chosen

    def _forget(self) -> None:
        if self._replica is not None:
            self._replica = None
            if "torch" in sys.modules:
                from hpc.engine import memory

                memory.free()


class Completions(Iterator[Completion]):
    """Completions of a stream, as they end."""

    def __init__(self, generator: Generator, completions: Generating[Completion, None, None]) -> None:
        self._generator, self._completions = generator, completions
        self._why_ended = ""
        self._over = False

    def __next__(self) -> Completion:
        with self._generator.working():
            if self._why_ended:
                raise RuntimeError(self._why_ended)
            try:
                return next(self._completions)
            except BaseException:
                self._over = True
                raise

    def end(self, reason: str) -> None:
        """Generate nothing more; whoever reads on, though there was more, is told the reason."""
        self._completions.close()
        self._why_ended = "" if self._over else reason


def _read(rows: list[dict[str, Any]], checker: Checker, folder: Path) -> TokenStore:
    """Check and tokenize rows; return their token store."""
    writer, notes = StoreWriter(folder), Notes()
    try:
        for begin in range(0, len(rows), BLOCK_ROWS):
            lines = [json_line(row) for row in rows[begin : begin + BLOCK_ROWS]]
            block = Block(0, PLACE, "jsonl", begin, begin, len(lines), b"\n".join(lines), in_lines=False)
            arrays = checker.check_block(block)
            writer.append(block, arrays)
            notes.add(arrays["notes"].tobytes())
        for note in notes:
            LOGGER.warning("%s", note)
        return writer.finish({}, ())
    finally:
        writer.close()


def _refuse_ranks(model: str) -> None:
    size = launched_size()
    if size > 1:
        raise Refusal(
            f"{size} processes were started, and each would generate all of it: generate and Generator are for one. "
            f"For all of them write the rows as JSONL: mpirun -n {size} scattergen run --model {model} --corpus "
            "rows.jsonl (under Slurm srun in the place of mpirun), or hpc.run(hpc.Job(…)) in each of them"
        )
