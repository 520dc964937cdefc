"""The story: read, bucket, shard, scatter, generate, journal, gather, trim, merge, write.

`generate` runs on every rank and gets its world handed in: how ranks talk, what loads models, what
says stop. Rank 0 tells the story (`lead`); the other ranks do what its messages say (`hpc.executor.worker`).
"""

import contextlib
import logging
import time
from dataclasses import asdict, replace
from typing import Any

import numpy as np

from hpc.corpus import pipe
from hpc.corpus.find import corpus_files, keep_corpus
from hpc.corpus.store import TokenStore
from hpc.engine.bounds import seqs_at_once
from hpc.executor import scatter
from hpc.executor.attempt import Attempt, begin
from hpc.executor.gather import Gathering, OwnRecords
from hpc.executor.generate import completion_maker, generate_shard
from hpc.executor.read import read_corpus
from hpc.executor.root import Root
from hpc.executor.scatter import Backlog, Dispatcher
from hpc.executor.worker import serve
from hpc.exit import FAULT, OK, UNFINISHED, Refusal
from hpc.forecast.expect import predict_attempt, record_steps
from hpc.job import Job, Share
from hpc.model.loader import Loader
from hpc.mpi.comm import Comm
from hpc.mpi.signals import Stop
from hpc.output.journal import JournalIndex, JournalWriter
from hpc.output.write import Counts, journal_records, output_rows, write_output
from hpc.plan.arrange import make_plan
from hpc.plan.pending import find_pending
from hpc.report.summary import first_error, nothing_generated, show_summary, summarise, write_summary
from hpc.rundir.directory import RunDirectory, run_path
from hpc.rundir.progress import Progress, Work, left, overall
from hpc.slurm.allocation import Allocation

LOGGER = logging.getLogger(__name__)


def generate(job: Job, world: Comm, loader: Loader, stop: Stop, allocation: Allocation | None = None) -> int:
    """Generate a completion for every row of the job's corpus; return this rank's exit code.

    In an `allocation` whose end is known, what would not end in time is left to another attempt.

    Raises `Refusal`, on rank 0 alone, when every other rank has been told to leave. After any other
    exception the other ranks still wait: it is for the caller to `world.abort`.
    """
    if world.rank:
        return serve(world, loader, stop)
    leader = Root(world, stop)
    try:
        code = take_and_lead(job, leader, loader, allocation)
    except Refusal:
        leader.dismiss()
        raise
    leader.dismiss()
    return code


def take_and_lead(job: Job, leader: Root, loader: Loader, allocation: Allocation | None) -> int:
    """Take the run directory, tell the story, give it back."""
    files = corpus_files(job)
    directory = RunDirectory(run_path(job, files), Share.of(job.share))
    directory.create()
    directory.acquire(job.force)
    before, whole = directory.state, directory.whole_state
    try:
        kept = keep_corpus(files, directory, leader.step)
        if kept is None:
            directory.set_state("drained")
            LOGGER.warning("stopped (%s); run the same command again to go on", leader.stop.reason)
            return UNFINISHED
        if kept != files:  # job.json can be run again where there is no pipe
            job = replace(job, corpus=tuple(map(str, kept)), name=directory.path.name)
        return lead(begin(job, directory, kept, leader, loader, allocation))
    except Refusal:
        directory.restore_state(before, whole)  # what an earlier attempt left is as it was
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
        try:
            tokens = read_corpus(attempt, earlier)
        except Refusal:
            attempt.events.write("refused", {})  # for the batch script, which sees the state of an earlier attempt
            raise
        if tokens is None:
            return drain(attempt)
        attempt.write_job()
        pipe.forget(attempt.directory.path / "corpus", attempt.files)
        work, dispatcher = plan(attempt, tokens, earlier)
        own = generate_all(attempt, tokens, earlier, work, dispatcher)
        if attempt.leader.stop.reason or attempt.leader.requests_left():
            return drain(attempt, work)
        if attempt.directory.share:
            return merge_if_last(attempt, tokens, work)
        counts = gather_and_merge(attempt, tokens, earlier, own)
        return conclude(attempt, work, counts)


def plan(attempt: Attempt, tokens: TokenStore, earlier: JournalIndex) -> tuple[Work, Dispatcher]:
    """Bucket and shard what no earlier attempt has done."""
    job, size = attempt.job, attempt.leader.world.size
    for damage in earlier.damages:
        LOGGER.warning("%s", damage)
    found = find_pending(tokens, earlier, attempt.directory.share)
    if found.work.requests:
        decide_engine(attempt)
        job = attempt.job
    # Of the whole corpus, not of what is pending: see `hpc.plan.prefix`.
    asked = tokens.prompts(found.asked)
    at_once = seqs_at_once(job.max_num_seqs, attempt.place.gpu is not None)
    arranged = make_plan(asked, np.searchsorted(found.asked, found.pending), job, size, at_once=at_once)
    padded = int(arranged.buckets.sum())
    attempt.padding = 1 - int(tokens.prompt_lengths(found.pending).sum()) / padded if padded else 0.0
    attempt.events.write("plan", asdict(found.work))
    return found.work, Dispatcher(tokens, found.pending, found.also, arranged, scatter.piece_bytes(size))


def decide_engine(attempt: Attempt) -> None:
    """Decide what generates, before there is a plan: another one would pad, and batch, otherwise."""
    began = time.monotonic()
    choice = attempt.loader.choose_engine(attempt.job, attempt.model.path, attempt.place)
    took = time.monotonic() - began
    attempt.imports_s += took
    attempt.events.spent([("import", time.time() - took, time.time())])
    if choice.reason:
        LOGGER.log(logging.WARNING if choice.fell_back else logging.INFO, "%s", choice.reason)
    engine: Any = choice.engine
    attempt.engine_asked, attempt.engine_reason = attempt.job.engine, choice.reason
    attempt.job = replace(attempt.job, engine=engine)


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
        LOGGER.info("%s", nothing_generated(asdict(work)))
        return own
    LOGGER.info(
        "%d rows: %d refused, %d done before, %d duplicates; %d requests to generate",
        work.rows, work.refused, work.done, work.duplicates, work.requests,
    )  # fmt: skip
    deadline = attempt.deadline()
    leader.start(work, dispatcher, progress, attempt.events, deadline, job.engine)
    attempt.events.write("load", predict_attempt(attempt, tokens, earlier, dispatcher))  # while the other ranks load
    began = time.monotonic()
    replica = attempt.loader.load(job, attempt.model.path, attempt.place)
    progress.load_s, progress.gpu = time.monotonic() - began, replica.gpu
    progress.engine = replica.engine_name or job.engine
    attempt.events.spent(replica.spent)
    backlog = Backlog(job.sampling, lambda: backlog.add(dispatcher.next_piece(0)), deadline=deadline)
    writer = JournalWriter(journal)
    generate_shard(
        replica.engine, backlog, writer, own, progress,
        on_step=lambda: leader.step(writer), finish=completion_maker(replica.eos_token_ids, replica.decode),
    )  # fmt: skip
    leader.wait_for_others()
    if not leader.stop.reason:
        record_steps(attempt, replica, attempt.imports_s + progress.load_s)
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
    streams = [journal_records(tokens, earlier), iter(own), *gathering.streams()]
    rows = output_rows(tokens, attempt.files, job.limit, streams, job.return_token_ids)
    path = attempt.directory.completions
    try:
        counts = write_output(path, rows)
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
    values = summarise(attempt.job, leader.world.size, work, counts, leader.progress, attempt.seconds, attempt.padding)
    values["predicted_seconds"] = attempt.predicted_s
    values["engine_asked"] = attempt.engine_asked or attempt.job.engine
    values["engine_reason"] = attempt.engine_reason
    values["messages"], values["message_bytes"] = leader.world.traffic  # of rank 0
    values = write_summary(attempt.directory.summary, attempt.number, values)
    rate = counts.errors / counts.rows
    all_bad = counts.errors == counts.rows  # whatever may be bad of many rows, this is no result
    faulty = all_bad or rate > attempt.job.max_error_rate
    attempt.directory.set_state("failed" if faulty else "done")
    attempt.events.write("done", {"gathered_s": round(attempt.seconds["gather"], 3)})
    show_summary(attempt.directory, values, attempt.job.show, attempt.files)
    if all_bad:
        LOGGER.error(
            "every row is an error row: mend the cause, and run the same command again%s. The first says: %s",
            " with --retry-errors" if counts.errors > work.refused else "",
            first_error(attempt.directory.completions),
        )
    elif faulty:
        LOGGER.error(
            "%.1f %% of the rows are error rows, more than --max-error-rate allows (%.1f %%)",
            100 * rate, 100 * attempt.job.max_error_rate,
        )  # fmt: skip
    return FAULT if faulty else OK
