"""The story: read, bucket, shard, scatter, generate, journal, gather, trim, merge, write.

`generate` runs on every rank; the comm, the model loader and the stop flag are handed in. Rank 0 leads (`lead`), and
the other ranks do what its messages say (`hpc.executor.worker`).
"""

import contextlib
import logging
import time
from dataclasses import asdict, replace
from typing import Any, cast

import numpy as np

from hpc.corpus import pipe
from hpc.corpus.columns import Columns
from hpc.corpus.find import corpus_files, keep_corpus
from hpc.corpus.store import TokenStore
from hpc.corpus.tokenize import Checker
from hpc.executor.attempt import Attempt, Timings, begin
from hpc.executor.crew import Crew
from hpc.executor.gather import Gathering, OwnRecords
from hpc.executor.generate import completion_maker, generate_shard
from hpc.executor.read import make_checker, read_corpus
from hpc.executor.root import Generated, Generation
from hpc.executor.scatter import Backlog, Dispatcher, make_dispatcher
from hpc.executor.worker import serve
from hpc.exit import FAULT, OK, UNFINISHED, Refusal
from hpc.forecast.expect import predict_attempt, record_steps
from hpc.job import Job, Share
from hpc.model.loader import Loader
from hpc.model.token_bytes import token_bytes
from hpc.mpi.comm import Comm, LostRank
from hpc.mpi.signals import Stop
from hpc.output.facts import facts_of
from hpc.output.journal import JournalIndex, JournalWriter
from hpc.output.verify import claim
from hpc.output.write import Counts, journal_records, output_rows, write_output
from hpc.plan.pending import Pending, find_pending
from hpc.report.display import open_display
from hpc.report.summary import nothing_generated, show_summary, summarise, write_summary
from hpc.rundir.directory import RunDirectory, run_path
from hpc.rundir.lock import RunLock, alone
from hpc.rundir.progress import Work, left
from hpc.slurm.allocation import Allocation

LOGGER = logging.getLogger(__name__)


def generate(job: Job, world: Comm, loader: Loader, stop: Stop, allocation: Allocation | None = None) -> int:
    """Generate a completion for every row of the job's corpus; return this rank's exit code.

    In an `allocation` whose end is known, requests that would not end in time are left to another attempt.

    Raises `Refusal` on rank 0 alone, after every other rank was told to leave. After any other exception the other
    ranks still wait, and the caller has to `world.abort`.
    """
    if world.rank:
        return serve(world, loader, stop)
    crew = Crew(world, stop)
    try:
        code = take_and_lead(job, crew, loader, allocation)
    except Refusal:
        crew.dismiss()
        raise
    crew.dismiss()
    return code


def take_and_lead(job: Job, crew: Crew, loader: Loader, allocation: Allocation | None) -> int:
    """Lock the run directory, lead the attempt, and unlock it."""
    files = corpus_files(job)
    directory = RunDirectory(run_path(job, files), Share.of(job.share))
    directory.create()
    lock = RunLock(directory.path, directory.share)
    lock.acquire(job.force)
    before, whole = directory.state, directory.whole_state
    try:
        kept = keep_corpus(files, directory, job, crew.step)
        if kept is None:
            directory.set_state("drained")
            LOGGER.warning("stopped (%s); run the same command again to go on", crew.stop.reason)
            return UNFINISHED
        if kept != files:  # job.json can be run again where there is no pipe
            job = replace(job, corpus=tuple(map(str, kept)), name=directory.path.name)
        return lead(begin(job, directory, kept, crew, loader, allocation))
    except Refusal:
        directory.restore_state(before, whole)  # what an earlier attempt left is as it was
        raise
    except LostRank:
        raise  # as if this rank had been killed too: the state stays "running", and the batch script requeues the job
    except BaseException:
        directory.set_failed()
        raise
    finally:
        lock.release()


def lead(attempt: Attempt) -> int:
    """Lead an attempt on rank 0: read, plan, generate, gather, merge; return the exit code."""
    timings, directory = Timings(), attempt.directory
    with contextlib.closing(attempt.events):
        earlier = JournalIndex(directory.journals(), attempt.job.retry_errors)
        try:
            claim(attempt.target, directory, [file.path for file in attempt.inputs.corpus], attempt.job.force)
            tokens = read(attempt, timings, earlier)
        except Refusal:
            attempt.events.write("refused", {})  # for the batch script, which sees the state of an earlier attempt
            raise
        if tokens is None:
            return drain(attempt)
        attempt.write_job()
        pipe.forget(directory.path / "corpus", attempt.files)
        for damage in earlier.damages:
            LOGGER.warning("%s", damage)
        pending = find_pending(tokens, earlier, directory.share)
        if pending.work.requests:
            attempt = decide_engine(attempt, timings)
        dispatcher = plan(attempt, timings, tokens, pending)
        generated = generate_all(attempt, timings, tokens, earlier, pending.work, dispatcher)
        if attempt.crew.stop.reason or pending.work.requests > generated.total.requests:
            return drain(attempt, pending.work, generated)
        if directory.share:
            return merge_if_last(attempt, timings, tokens, pending.work, generated)
        counts = gather_and_merge(attempt, timings, tokens, earlier, generated)
        return conclude(attempt, timings, pending.work, generated, counts)


def read(attempt: Attempt, timings: Timings, earlier: JournalIndex) -> TokenStore | None:
    """Read the corpus if it has changed; return its token store, or None when told to stop."""
    began, inputs = time.monotonic(), attempt.inputs

    def checker() -> Checker:
        attempt.events.write("read", {})
        attempt.events.span("read")
        with timings.importing(attempt.events):
            return make_checker(attempt.loader, inputs, attempt.place.threads)

    tokens = read_corpus(inputs, attempt.directory, earlier, attempt.crew, checker, attempt.number)
    timings.seconds["tokenize"] = time.monotonic() - began
    attempt.events.span("other")
    return tokens


def decide_engine(attempt: Attempt, timings: Timings) -> Attempt:
    """Choose the engine before there is a plan, since engines pad and batch differently."""
    with timings.importing(attempt.events):
        choice = attempt.loader.choose_engine(attempt.job, attempt.model.path, attempt.place)
    if choice.reason:
        LOGGER.log(logging.WARNING if choice.fell_back else logging.INFO, "%s", choice.reason)
    job, engine = attempt.job, cast(Any, choice.engine)
    return replace(attempt, job=replace(job, engine=engine), engine_asked=job.engine, engine_reason=choice.reason)


def plan(attempt: Attempt, timings: Timings, tokens: TokenStore, found: Pending) -> Dispatcher:
    """Bucket and shard the requests that no earlier attempt has answered."""
    on_gpu = bool(attempt.place.gpus)
    dispatcher = make_dispatcher(attempt.job, tokens, found, attempt.crew.world.size, on_gpu)
    timings.padding = dispatcher.padding
    attempt.events.write("plan", asdict(found.work))
    return dispatcher


def generate_all(
    attempt: Attempt, timings: Timings, tokens: TokenStore, earlier: JournalIndex, work: Work, dispatcher: Dispatcher
) -> Generated:
    """Scatter the requests over all ranks, rank 0 too, and generate until nothing is in flight."""
    crew, job, directory = attempt.crew, attempt.job, attempt.directory
    journal = directory.journal(attempt.number, 0)
    own = OwnRecords(journal)
    if crew.stop.reason:
        return Generated(own)
    if not work.requests:
        LOGGER.info("%s", nothing_generated(asdict(work)))
        return Generated(own)
    LOGGER.info(
        "%d rows: %d refused, %d done before, %d duplicates; %d requests to generate",
        work.rows, work.refused, work.done, work.duplicates, work.requests,
    )  # fmt: skip
    deadline, display = attempt.deadline(), open_display(crew.world.size)
    generation = Generation(crew, attempt.places, work, dispatcher, attempt.events, deadline, display)
    generation.start(job.engine)
    predicted = predict_attempt(attempt, tokens, earlier, dispatcher)  # while the other ranks load
    attempt.events.write("load", predicted)
    if predicted:
        timings.predicted_s = round(predicted["seconds"], 3)
        generation.expected_end = time.time() + predicted["seconds"]
    attempt.events.span("load")
    began = time.monotonic()
    replica, progress = attempt.loader.load(job, attempt.model.path, attempt.place), generation.own
    progress.load_s, progress.gpu = time.monotonic() - began, replica.gpu
    progress.engine = replica.engine_name or job.engine
    attempt.events.within(replica.spent)
    backlog = Backlog(job.sampling, lambda: backlog.add(dispatcher.next_piece(0)), deadline=deadline)
    writer = JournalWriter(journal)
    beat = generation.heartbeat(writer)
    finish = completion_maker(replica.eos_token_ids, replica.decode, replica.goes_on)
    attempt.events.span("generate")
    generate_shard(replica.engine, backlog, writer, own, progress, beat, finish)
    attempt.events.span("drain" if crew.stop.reason else "idle")
    generation.wait_for_others(beat)
    attempt.events.span("other")
    if not crew.stop.reason:
        record_steps(attempt, replica, timings.imports_s + progress.load_s)
    return Generated(own, generation.progress)


def drain(attempt: Attempt, work: Work | None = None, generated: Generated | None = None) -> int:
    """End an attempt that was stopped: all finished completions are in the journals."""
    attempt.directory.set_state("drained")
    attempt.events.write("drained", {})
    reason = attempt.crew.stop.reason or "the rest would not end within the time limit"
    LOGGER.warning("stopped (%s); run the same command again to go on", reason)
    if work is not None and generated is not None:
        LOGGER.info("%s", left(work, generated.total, time.time()))
    return UNFINISHED


def merge_if_last(attempt: Attempt, timings: Timings, tokens: TokenStore, work: Work, generated: Generated) -> int:
    """End a share: the share that finds every row answered writes the output."""
    directory = attempt.directory
    with alone(directory.path, "merge", lambda: bool(attempt.crew.stop.reason)):
        index = JournalIndex(directory.journals())
        missing = int(tokens.good.sum()) - int(np.count_nonzero((index.find(tokens.keys) >= 0) & tokens.good))
        directory.set_state("done")
        if missing:
            LOGGER.info("share %s is done; %d rows are left to the other shares", attempt.job.share, missing)
            return OK
        in_journals = replace(generated, own=OwnRecords(directory.journal(attempt.number, 0)))
        counts = gather_and_merge(attempt, timings, tokens, index, in_journals)
        code = conclude(attempt, timings, work, generated, counts)
        directory.set_whole_state("done" if code == OK else "failed")
        return code


def gather_and_merge(
    attempt: Attempt, timings: Timings, tokens: TokenStore, earlier: JournalIndex, generated: Generated
) -> Counts:
    """Merge this attempt's completions with those of earlier attempts into the output."""
    attempt.events.write("merge", {})
    attempt.events.span("merge")
    began, clock, job, crew = time.monotonic(), time.time(), attempt.job, attempt.crew
    gathering = Gathering(crew.world, generated.others_with_records(), crew.on_message)
    streams = [journal_records(tokens, earlier), iter(generated.own), *gathering.streams()]
    rows = output_rows(tokens, tokens.files, job.limit, streams, job.return_token_ids)
    target, directory = attempt.target, attempt.directory
    facts = facts_of(job, attempt.model.path, directory.created, tokens, token_bytes(attempt.model.path))
    try:
        counts = write_output(target, rows, facts, job.show)
    except OSError as error:
        raise RuntimeError(
            f"cannot write {target.path}: {error}; every completion is in the journals: make room, and run the same "
            "command again"
        ) from error
    if counts.missing:
        raise RuntimeError(
            f"{counts.missing} of {tokens.num_rows} rows have no completion; this is a fault of scattergen"
        )
    for path in [*target.partial.existing(), *target.partial.error_files()]:
        path.unlink(missing_ok=True)
    attempt.events.within([("gather", clock, clock + gathering.waited_s)])  # one span for many short waits
    timings.seconds["gather"] = gathering.waited_s
    timings.seconds["merge"] = time.monotonic() - began - gathering.waited_s
    return counts


def conclude(attempt: Attempt, timings: Timings, work: Work, generated: Generated, counts: Counts) -> int:
    """Write and print the summary; return the exit code."""
    timings.seconds["total"] = time.monotonic() - attempt.began
    job, world = attempt.job, attempt.crew.world
    values = summarise(job, world.size, work, counts, generated.progress, timings.seconds, timings.padding)
    values["predicted_seconds"] = timings.predicted_s
    values["engine_asked"] = attempt.engine_asked or job.engine
    values["engine_reason"] = attempt.engine_reason
    values["messages"], values["message_bytes"] = world.traffic  # of rank 0
    values = write_summary(attempt.directory.summary, attempt.number, values)
    rate = counts.errors / counts.rows
    all_bad = counts.errors == counts.rows  # whatever may be bad of many rows, this is no result
    faulty = all_bad or rate > attempt.job.max_error_rate
    attempt.directory.set_state("failed" if faulty else "done")
    attempt.events.write("done", {})
    show_summary(attempt.directory, attempt.target.path, values, counts.examples, Columns.of(attempt.job))
    if all_bad:
        LOGGER.error(
            "every row is an error row: mend the cause, and run the same command again%s. The first says: %s",
            " with --retry-errors" if counts.errors > work.refused else "",
            counts.first_error,
        )
    elif faulty:
        LOGGER.error(
            "%.1f %% of the rows are error rows, more than --max-error-rate allows (%.1f %%)",
            100 * rate, 100 * attempt.job.max_error_rate,
        )  # fmt: skip
    return FAULT if faulty else OK
