"""The story: read, bucket, shard, scatter, generate, journal, gather, trim, merge, write.

`generate` runs on every rank and gets its world handed in: how ranks talk, what loads models, what
says stop. Rank 0 tells the story (`lead`); the other ranks do what its messages say (`hpc.follow`).
"""

import contextlib
import logging
import time
from dataclasses import asdict
from typing import Any

import numpy as np

from hpc import corpus, expect, output, place, read, scatter, summary
from hpc.allocation import Allocation, Share
from hpc.attempt import Attempt, begin, run_path
from hpc.comm import Comm
from hpc.complete import complete, finisher
from hpc.corpus import Blocks, CorpusError
from hpc.follow import follow
from hpc.gather import Gathering, OwnRecords
from hpc.job import Job, Refusal
from hpc.journal import JournalIndex, JournalWriter
from hpc.leader import Leader
from hpc.loader import Loader
from hpc.outline import outline
from hpc.output import Counts
from hpc.plan import AT_ONCE, AT_ONCE_GPU, arrange
from hpc.progress import Progress, Work, left, overall
from hpc.rundir import RunDirectory
from hpc.scatter import Backlog, Dispatcher
from hpc.stop import Stop
from hpc.store import Keys, StoreError, StoreWriter, TokenStore

LOGGER = logging.getLogger(__name__)

OK, FAULT, REFUSED, UNFINISHED = 0, 1, 2, 75
"""Exit codes; 75 is EX_TEMPFAIL of sysexits.h: run the same command again."""


def generate(job: Job, world: Comm, loader: Loader, stop: Stop, allocation: Allocation | None = None) -> int:
    """Generate a completion for every row of the job's corpus; return this rank's exit code.

    In an `allocation` whose end is known, what would not end in time is left to another attempt.

    Raises `Refusal`, on rank 0 alone, when every other rank has been told to leave. After any other
    exception the other ranks still wait: it is for the caller to `world.abort`.
    """
    if world.rank:
        return follow(world, loader, stop)
    leader = Leader(world, stop)
    try:
        code = take_and_lead(job, leader, loader, allocation)
    except Refusal:
        leader.dismiss()
        raise
    leader.dismiss()
    return code


def take_and_lead(job: Job, leader: Leader, loader: Loader, allocation: Allocation | None) -> int:
    """Take the run directory, tell the story, give it back."""
    try:
        files = corpus.find(job.corpus)
    except CorpusError as error:
        raise Refusal(str(error)) from error
    directory = RunDirectory(run_path(job, files), Share.of(job.share))
    directory.create()
    directory.acquire(job.force)
    before = directory.state
    try:
        return lead(begin(job, directory, files, leader, loader, allocation))
    except Refusal:
        directory.restore_state(before)  # what an earlier attempt left is as it was
        raise
    except BaseException:
        directory.set_failed()
        raise
    finally:
        directory.release()


def lead(attempt: Attempt) -> int:
    """Tell the story on rank 0."""
    with contextlib.closing(attempt.events):
        earlier = JournalIndex(attempt.directory.journals(), attempt.job.retry_errors)
        tokens = read_corpus(attempt, earlier)
        if tokens is None:
            return drain(attempt)
        attempt.write_job()
        work, dispatcher = plan(attempt, tokens, earlier)
        own = generate_all(attempt, tokens, earlier, work, dispatcher)
        if attempt.leader.stop.reason or attempt.leader.requests_left():
            return drain(attempt, work)
        if attempt.directory.share:
            return merge_if_last(attempt, tokens, work)
        counts = gather_and_merge(attempt, tokens, earlier, own)
        return conclude(attempt, work, counts)


def read_corpus(attempt: Attempt, earlier: JournalIndex) -> TokenStore | None:
    """Return the token store of the corpus, read now or, if nothing has changed, before; None when told to stop.

    A corpus that has nothing to do with the completions of earlier attempts is refused, and the token
    store of the last one stays.
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
    tokens = None
    with contextlib.suppress(StoreError, OSError, ValueError):  # there is none, or it is damaged: read again
        tokens = TokenStore(folder)
    if tokens is None or tokens.inputs != inputs:
        attempt.events.write("read", {})
        place.use_threads(attempt.place.threads)
        began = time.monotonic()
        checker = attempt.loader.checker(job, attempt.model.path, attempt.file_names)
        attempt.imports_s = time.monotonic() - began
        blocks = Blocks(attempt.files, read.BLOCK_BYTES, job.limit)
        writer = StoreWriter(folder)
        try:
            leader = attempt.leader
            read.lead(leader.world, blocks, checker.check_block, writer.append, leader.stop, leader.on_message)
            if leader.stop.reason:
                return None
            if not writer.num_rows:
                raise Refusal(f"the corpus {', '.join(job.corpus)} has no rows")
            tokens = writer.finish(
                attempt.file_names, inputs, blocks.digests, lambda keys: refuse_strangers(attempt, earlier, keys)
            )
        except OSError as error:
            raise RuntimeError(f"cannot write the token store in {folder}: {error}; make room and run again") from error
        finally:
            writer.close()
    return tokens


def refuse_strangers(attempt: Attempt, earlier: JournalIndex, keys: Keys) -> None:
    """Raise `Refusal` if there are completions of earlier attempts, and none is for one of `keys`."""
    if len(earlier) and len(keys) and not (earlier.find(keys) >= 0).any():
        raise Refusal(
            f"{attempt.directory.path} holds {len(earlier):,} completions, and none of them is for a row of this "
            "corpus with these sampling parameters. Choose another --name, or remove the run directory"
        )


def store_inputs(attempt: Attempt) -> dict[str, Any]:
    """Return all that a token store depends on, as JSON has it. A file is known by its size and time, as in make."""
    stats = [(str(file), file.stat()) for file in attempt.files]
    sampling = {name: list(v) if isinstance(v, tuple) else v for name, v in asdict(attempt.job.sampling).items()}
    return {
        "format": 1,
        "files": [[name, stat.st_size, stat.st_mtime_ns] for name, stat in stats],
        "limit": attempt.job.limit,
        "sampling": sampling,
        "truncate_prompts": attempt.job.truncate_prompts,
        "model": [attempt.model.revision, attempt.model.tokenizer, attempt.model.template],
    }


def plan(attempt: Attempt, tokens: TokenStore, earlier: JournalIndex) -> tuple[Work, Dispatcher]:
    """Bucket and shard what no earlier attempt has done."""
    job, size = attempt.job, attempt.leader.world.size
    for damage in earlier.damages:
        LOGGER.warning("%s", damage)
    found = outline(tokens, earlier, attempt.directory.share)
    # Of the whole corpus, not of what is pending: see `hpc.prefix`.
    asked = tokens.prompts(found.asked)
    at_once = job.max_num_seqs or (AT_ONCE if attempt.place.gpu is None else AT_ONCE_GPU)
    arranged = arrange(asked, np.searchsorted(found.asked, found.pending), job, size, at_once=at_once)
    padded = int(arranged.buckets.sum())
    attempt.padding = 1 - int(tokens.prompt_lengths(found.pending).sum()) / padded if padded else 0.0
    attempt.events.write("plan", asdict(found.work))
    return found.work, Dispatcher(tokens, found.pending, found.also, arranged, scatter.piece_bytes(size))


def generate_all(
    attempt: Attempt, tokens: TokenStore, earlier: JournalIndex, work: Work, dispatcher: Dispatcher
) -> OwnRecords:
    """Scatter the requests over all ranks, this one too, and generate until nothing is in flight."""
    leader, job, directory = attempt.leader, attempt.job, attempt.directory
    journal = directory.journal(attempt.number, 0)
    own, progress = OwnRecords(journal), Progress()
    if leader.stop.reason:
        return own
    if not work.requests:
        LOGGER.info("all %d rows are done: nothing to generate", work.rows)
        return own
    LOGGER.info(
        "%d rows: %d refused, %d done before, %d duplicates; %d requests to generate",
        work.rows, work.refused, work.done, work.duplicates, work.requests,
    )  # fmt: skip
    deadline = attempt.deadline()
    leader.start(work, dispatcher, progress, attempt.events, deadline)
    attempt.events.write("load", expect.foresee(attempt, tokens, earlier, dispatcher))  # while the other ranks load
    began = time.monotonic()
    replica = attempt.loader.load(job, attempt.model.path, attempt.place)
    progress.load_s, progress.gpu = time.monotonic() - began, replica.gpu
    backlog = Backlog(job.sampling, lambda: backlog.add(dispatcher.next_piece(0)), deadline=deadline)
    writer = JournalWriter(journal)
    complete(
        replica.engine, backlog, writer, own, progress,
        on_step=lambda: leader.step(writer), finish=finisher(replica.eos_token_ids, replica.decode),
    )  # fmt: skip
    leader.wait_for_others()
    if not leader.stop.reason:
        expect.learn(attempt, replica, attempt.imports_s + progress.load_s)
    return own


def drain(attempt: Attempt, work: Work | None = None) -> int:
    """End before the end: everything finished is in the journals."""
    attempt.directory.set_state("drained")
    attempt.events.write("drained", {})
    reason = attempt.leader.stop.reason or "the rest would not end within the time limit"
    LOGGER.warning("stopped (%s); run the same command again to go on", reason)
    if work is not None:
        LOGGER.info("%s", left(work, overall(attempt.leader.progress), time.time()))
    return UNFINISHED


def merge_if_last(attempt: Attempt, tokens: TokenStore, work: Work) -> int:
    """End a share: the one that finds every row answered, by whichever job, writes the output."""
    directory = attempt.directory
    with directory.alone("merge", lambda: bool(attempt.leader.stop.reason)):
        index = JournalIndex(directory.journals())
        missing = int(tokens.good.sum()) - int(np.count_nonzero((index.find(tokens.keys) >= 0) & tokens.good))
        directory.set_state("done")
        if missing:
            LOGGER.info("share %s is done; %d rows are left to the other shares", attempt.job.share, missing)
            return OK
        counts = gather_and_merge(attempt, tokens, index, OwnRecords(directory.journal(attempt.number, 0)))
        code = conclude(attempt, work, counts)
        directory.set_whole_state("done" if code == OK else "failed")
        return code


def gather_and_merge(attempt: Attempt, tokens: TokenStore, earlier: JournalIndex, own: OwnRecords) -> Counts:
    """Merge this attempt's completions with those of earlier attempts into the output."""
    attempt.events.write("merge", {})
    began, job = time.monotonic(), attempt.job
    gathering = Gathering(attempt.leader.world, attempt.leader.ranks_with_records(), attempt.leader.on_message)
    streams = [output.journal_records(tokens, earlier), iter(own), *gathering.streams()]
    rows = output.output_rows(tokens, attempt.files, job.limit, streams, job.return_token_ids)
    path = attempt.directory.completions
    try:
        counts = output.write(path, rows)
    except OSError as error:
        raise RuntimeError(
            f"cannot write {path}: {error}; every completion is in the journals: make room, and run the same command "
            "again"
        ) from error
    if counts.missing:
        raise RuntimeError(
            f"{counts.missing} of {tokens.num_rows} rows have no completion; this is a fault of scattergen"
        )
    attempt.directory.partial.unlink(missing_ok=True)
    attempt.seconds["gather"] = gathering.waited_s
    attempt.seconds["merge"] = time.monotonic() - began - gathering.waited_s
    return counts


def conclude(attempt: Attempt, work: Work, counts: Counts) -> int:
    """Write and print the summary; decide the exit code."""
    attempt.seconds["total"] = time.monotonic() - attempt.began
    leader = attempt.leader
    values = summary.summarise(
        attempt.job, leader.world.size, work, counts, leader.progress, attempt.seconds, attempt.padding
    )
    values["predicted_seconds"] = attempt.predicted_s
    values["messages"], values["message_bytes"] = leader.world.traffic  # of rank 0
    values = summary.write(attempt.directory.summary, attempt.number, values)
    rate = counts.errors / counts.rows
    faulty = rate > attempt.job.max_error_rate
    attempt.directory.set_state("failed" if faulty else "done")
    attempt.events.write("done", {"gathered_s": round(attempt.seconds["gather"], 3)})
    summary.show(attempt.directory, values, attempt.job.show, attempt.files)
    if faulty:
        LOGGER.error(
            "%.1f %% of the rows are error rows, more than --max-error-rate allows (%.1f %%)",
            100 * rate, 100 * attempt.job.max_error_rate,
        )  # fmt: skip
    return FAULT if faulty else OK
