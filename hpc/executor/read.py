"""Read: rank 0 cuts the corpus into blocks, all ranks check and tokenize them, rank 0 writes the token store."""

import contextlib
import time
from collections.abc import Callable, Iterable
from dataclasses import asdict
from typing import Any

import numpy as np

from hpc.corpus.chat_date import tells_date
from hpc.corpus.files import BLOCK_BYTES, Block, Blocks
from hpc.corpus.store import Arrays, StoreError, StoreWriter, TokenStore
from hpc.engine.registry import asked_context
from hpc.executor.attempt import Attempt
from hpc.executor.bound import CorpusBinding, real_paths
from hpc.exit import Refusal
from hpc.mpi.binding import use_threads
from hpc.mpi.comm import LONGEST_SLEEP_S, Buffer, Comm, Message, Tag, pack, unpack
from hpc.mpi.signals import Stop
from hpc.output.journal import JournalIndex

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


def read_corpus(attempt: Attempt, earlier: JournalIndex) -> TokenStore | None:
    """Return the token store of the corpus, read now or, if nothing has changed, before; None when told to stop.

    Another corpus than that of earlier attempts is refused, see `hpc.executor.bound`, and the token store of the
    last one stays.
    """
    began = time.monotonic()
    with contextlib.ExitStack() as stack:
        if attempt.directory.share:  # the first of the jobs reads for all of them
            stack.enter_context(attempt.directory.alone("store", lambda: bool(attempt.leader.stop.reason)))
        tokens = read_or_reuse(attempt, earlier) if not attempt.leader.stop.reason else None
    attempt.seconds["tokenize"] = time.monotonic() - began
    return tokens


def read_or_reuse(attempt: Attempt, earlier: JournalIndex) -> TokenStore | None:
    """Return the token store of the corpus; see `read_corpus`."""
    job, folder = attempt.job, attempt.directory.path
    inputs = store_inputs(attempt)
    tokens: TokenStore | None = None
    with contextlib.suppress(StoreError, OSError, ValueError):  # there is none, or it is damaged: read again
        tokens = TokenStore(folder)
    if tokens is None or tokens.inputs != inputs:
        binding = CorpusBinding(attempt.directory, earlier, tokens)
        attempt.events.write("read", {})
        use_threads(attempt.place.threads)
        began = time.monotonic()
        attempt.loader.examine(job, attempt.model.path)
        checker = attempt.loader.checker(job, attempt.model.path, attempt.file_names)
        attempt.imports_s = time.monotonic() - began
        attempt.events.spent([("import", time.time() - attempt.imports_s, time.time())])
        blocks = Blocks(attempt.files, BLOCK_BYTES, job.limit)
        writer = StoreWriter(folder)
        try:
            leader = attempt.leader
            read_blocks(leader.world, blocks, checker.check_block, writer.append, leader.stop, leader.on_message)
            if leader.stop.reason:
                return None
            if not writer.num_rows:
                raise Refusal(f"the corpus {', '.join(job.corpus)} has no rows")
            tokens = writer.finish(
                attempt.file_names,
                inputs,
                blocks.digests,
                lambda keys, ids: binding.check(attempt.files, keys, ids, job.force, attempt.number),
            )
        except OSError as error:
            raise RuntimeError(f"cannot write the token store in {folder}: {error}; make room and run again") from error
        finally:
            writer.close()
    return tokens


def store_inputs(attempt: Attempt) -> dict[str, Any]:
    """Return all that a token store depends on, as JSON has it. A file is known by its size and time, as in make."""
    stats = [(str(file), file.stat()) for file in attempt.files]
    sampling = {name: list(v) if isinstance(v, tuple) else v for name, v in asdict(attempt.job.sampling).items()}
    return {
        "format": 2,
        "files": [[name, stat.st_size, stat.st_mtime_ns] for name, stat in stats],
        "paths": real_paths(attempt.files),
        "limit": attempt.job.limit,
        "sampling": sampling,
        "truncate_prompts": attempt.job.truncate_prompts,
        "context_tokens": attempt.job.context_tokens,
        "chat_date": attempt.job.chat_date if tells_date(attempt.model.path) else "",
        "model": [attempt.model.revision, attempt.model.tokenizer, attempt.model.template],
        **({"context": context} if (context := asked_context(attempt.job)) is not None else {}),
    }
