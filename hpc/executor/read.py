"""Read: rank 0 cuts the corpus into blocks, all ranks check and tokenize them, rank 0 writes the token store."""

import contextlib
import functools
import logging
import time
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from hpc.corpus.chat_date import tells_date
from hpc.corpus.columns import Columns
from hpc.corpus.files import Blocks, name_files
from hpc.corpus.find import check_columns, find_formats
from hpc.corpus.formats import Block, CorpusFile
from hpc.corpus.notes import Notes
from hpc.corpus.store import Arrays, StoreError, StoreWriter, TokenStore
from hpc.corpus.tokenize import Checker
from hpc.engine.registry import asked_context
from hpc.executor.bound import CorpusBinding, real_paths
from hpc.executor.crew import Crew
from hpc.exit import Refusal
from hpc.job import Job
from hpc.model.find import Model
from hpc.model.loader import Loader
from hpc.mpi.binding import use_threads
from hpc.mpi.comm import LONGEST_SLEEP_S, Buffer, Comm, Message, Tag, pack, unpack
from hpc.mpi.signals import Stop
from hpc.output.journal import JournalIndex
from hpc.rundir.directory import RunDirectory
from hpc.rundir.lock import alone

LOGGER = logging.getLogger(__name__)

AHEAD = 2
"""Blocks that a rank has before it: one to work on, one to go on with."""

CheckBlock = Callable[[Block], Arrays]


def read_blocks(
    comm: Comm,
    blocks: Iterable[Block],
    check_block: CheckBlock,
    append: Callable[[Block, Arrays], None],
    stop: Stop,
    on_message: Callable[[Message], None],
) -> None:
    """Have all blocks checked, and `append` them in their order; return early when told to stop.

    `on_message` gets what is not about rows. The blocks in hand are bounded, however slow one rank is.
    """
    source = iter(blocks)
    given: dict[int, Block] = {}
    answers: dict[int, Arrays] = {}
    waiting = [0] * comm.size
    next_given = next_written = 0
    drained = False

    def take() -> Block | None:
        nonlocal next_given, drained
        if drained or len(given) >= 2 * AHEAD * comm.size:
            return None
        block = next(source, None)
        if block is None:
            drained = True
            return None
        given[next_given] = block
        next_given += 1
        return block

    def advance() -> bool:
        """Do what can be done now; say whether that was anything."""
        nonlocal next_written
        before = (next_given, next_written)
        for message in comm.poll():
            if message.tag == Tag.ROWS:
                values, rows = unpack(message.array)
                answers[values["number"]] = rows
                waiting[message.source] -= 1
            else:
                on_message(message)
        for rank in range(1, comm.size):
            while waiting[rank] < AHEAD and (block := take()) is not None:
                comm.send(rank, Tag.BLOCK, _pack_block(next_given - 1, block))
                waiting[rank] += 1
        if (block := take()) is not None:
            number = next_given - 1
            answers[number] = check_block(block)
        while next_written in answers:
            append(given.pop(next_written), answers.pop(next_written))
            next_written += 1
        return (next_given, next_written) != before

    while not (stop.reason or (drained and not given)):
        if not advance():
            time.sleep(LONGEST_SLEEP_S / 4)


def answer_block(comm: Comm, message: Message, check_block: CheckBlock) -> None:
    """Check the block that rank 0 has sent, and send back its rows."""
    values, arrays = unpack(message.array)
    number = values.pop("number")
    rows = check_block(Block(**values, data=arrays["data"].tobytes()))
    comm.send(0, Tag.ROWS, pack({"number": number}, **rows))


def _pack_block(number: int, block: Block) -> Buffer:
    values = asdict(block)
    data = values.pop("data")
    return pack({"number": number, **values}, data=np.frombuffer(data, dtype=np.uint8))


@dataclass(frozen=True)
class Inputs:
    """All that a token store depends on."""

    job: Job
    files: tuple[Path, ...]
    model: Model

    @functools.cached_property
    def corpus(self) -> tuple[CorpusFile, ...]:
        """The corpus files, and how they are read."""
        return name_files(self.files, find_formats(self.files, self.job))

    def as_json(self) -> dict[str, Any]:
        """Return it as the token store keeps it. A file is known by its size and time, as in make."""
        job, model = self.job, self.model
        stats = [(str(file), file.stat()) for file in self.files]
        sampling = {name: list(v) if isinstance(v, tuple) else v for name, v in asdict(job.sampling).items()}
        return {
            "format": 2,
            "files": [[name, stat.st_size, stat.st_mtime_ns] for name, stat in stats],
            "paths": real_paths(self.files),
            "limit": job.limit,
            "sampling": sampling,
            "truncate_prompts": job.truncate_prompts,
            "context_tokens": job.context_tokens,
            "chat_date": job.chat_date if tells_date(model.path, job.chat_template) else "",
            "model": [model.revision, model.tokenizer, model.template],
            **({"wording": wording} if any(wording := [job.source_lang, job.target_lang, job.instruction]) else {}),
            **({"formats": formats} if set(formats := [file.format for file in self.corpus]) != {"jsonl"} else {}),
            **({"prompts": prompts} if (prompts := job.prompt_values()) else {}),
            **({"context": context} if (context := asked_context(job)) is not None else {}),
        }


def make_checker(loader: Loader, inputs: Inputs, threads: int) -> Checker:
    """Return what checks and tokenizes blocks here, on so many threads; raise `Refusal` for a model that cannot."""
    use_threads(threads)
    loader.examine(inputs.job, inputs.model.path)
    return loader.checker(inputs.job, inputs.model.path)


def read_corpus(
    inputs: Inputs,
    directory: RunDirectory,
    earlier: JournalIndex,
    crew: Crew,
    checker: Callable[[], Checker],
    attempt: int = 0,
) -> TokenStore | None:
    """Return the token store of the corpus, read now or, if nothing has changed, before; None when told to stop.

    Another corpus than that of `earlier` attempts is refused, see `hpc.executor.bound`, and the token store of the
    last one stays. `checker` is asked for this rank's when there is anything to read.
    """
    with contextlib.ExitStack() as stack:
        if directory.share:  # the first of the jobs reads for all of them
            stack.enter_context(alone(directory.path, "store", lambda: bool(crew.stop.reason)))
        if crew.stop.reason:
            return None
        known, before = inputs.as_json(), None
        with contextlib.suppress(StoreError, OSError, ValueError):  # there is none, or it is damaged: read again
            before = TokenStore(directory.path)
        if before is not None and before.inputs == known:
            return before
        binding = CorpusBinding(directory, earlier, before)
        return _read_anew(inputs, known, directory.path, binding, crew, checker().check_block, attempt)


def _read_anew(
    inputs: Inputs,
    known: dict[str, Any],
    folder: Path,
    binding: CorpusBinding,
    crew: Crew,
    check_block: CheckBlock,
    attempt: int,
) -> TokenStore | None:
    """Read the corpus and return its token store, which keeps what is `known` of the inputs; None when told to stop."""
    job, files = inputs.job, inputs.files
    check_columns(inputs.corpus, Columns.of(job))
    blocks, writer, notes = Blocks(inputs.corpus, limit=job.limit), StoreWriter(folder), Notes()

    def append(block: Block, rows: Arrays) -> None:
        writer.append(block, rows)
        notes.add(rows["notes"].tobytes())

    try:
        read_blocks(crew.world, blocks, check_block, append, crew.stop, crew.on_message)
        if crew.stop.reason:
            return None
        if not writer.num_rows:
            raise Refusal(f"the corpus {', '.join(job.corpus)} has no rows")
        store = writer.finish(
            known,
            blocks.digests,
            lambda keys, ids: binding.check(files, keys, ids, job.force, attempt),
        )
        for note in notes:
            LOGGER.warning("%s", note)
        return store
    except OSError as error:
        raise RuntimeError(f"cannot write the token store in {folder}: {error}; make room and run again") from error
    finally:
        writer.close()
