"""Generate: every rank runs its engine on its requests, trims the completions and writes them to its journal.

A rank has one thread. The engine calls `on_step` at each decoding step; there the rank answers messages, notices
signals and reports its progress.
"""

import contextlib
import time
from collections.abc import Callable, Collection, Generator, Iterable, Iterator
from dataclasses import replace

from hpc.engine.interface import Engine
from hpc.engine.sequence import Sequence
from hpc.executor.gather import OwnRecords
from hpc.executor.scatter import Backlog
from hpc.output.journal import JournalWriter
from hpc.request import Completion, Sample
from hpc.rundir.progress import Progress
from hpc.trim import Decode, trim

Finish = Callable[[list[Sequence]], Completion]
"""Makes the completion of a request from its sequences, in the order of its samples."""
Answer = tuple[Completion, list[int]]
"""A completion, and the rows that it answers."""


def generate_shard(
    engine: Engine,
    backlog: Backlog,
    journal: JournalWriter,
    records: OwnRecords,
    progress: Progress,
    on_step: Callable[[], bool],
    finish: Finish,
) -> None:
    """Run an engine on a backlog; write each completion to the journal before the next step."""
    try:
        with contextlib.closing(complete(engine, backlog, progress, on_step, finish)) as steps:
            for ended in steps:
                places = journal.append(completion for completion, _ in ended)
                for (_, rows), (offset, length) in zip(ended, places, strict=True):
                    for row in rows:
                        records.add(row, offset, length)
    finally:
        journal.close()
        records.sort()


def complete(
    engine: Engine, backlog: Backlog, progress: Progress, on_step: Callable[[], bool], finish: Finish
) -> Generator[list[Answer], None, None]:
    """Run an engine on a backlog; after each step yield the completions whose last sample has ended, if there are any.

    `progress` counts them. It may be closed at any time, and leaves nothing in the engine.
    """
    progress.began = progress.ended = time.time()
    sequences = engine.generate(backlog, on_step)
    waiting: dict[int, dict[int, Sequence]] = {}
    try:
        for finished in sequences:
            answers: list[Answer] = []
            for samples in _whole(finished, waiting):
                completion = _finish(finish, samples)
                steps = max(len(sequence.token_ids) for sequence in samples)
                rows = [completion.row, *backlog.done(completion.row, steps)]
                answers.append((completion, rows))
                progress.rows += len(rows)
                progress.errors += len(rows) if completion.error else 0
                progress.requests += 1
                progress.prompt_tokens += len(samples[0].request.token_ids)
                progress.generated_tokens += completion.num_tokens
                progress.guessed_tokens += sum(sequence.guessed for sequence in samples)
                progress.accepted_tokens += sum(sequence.accepted for sequence in samples)
            progress.ended, progress.waited_s = time.time(), backlog.waited_s
            progress.busy_s = progress.ended - progress.began - progress.waited_s
            progress.totals = replace(engine.steps.totals)
            if answers:
                yield answers
    finally:
        close = getattr(sequences, "close", None)
        if close:
            close()


def _whole(finished: Iterable[Sequence], waiting: dict[int, dict[int, Sequence]]) -> Iterator[list[Sequence]]:
    """Yield the sequences of each request whose samples have all ended; the others are kept in `waiting`, by row."""
    for sequence in finished:
        samples = waiting.setdefault(sequence.request.row, {})
        samples[sequence.sample] = sequence
        if len(samples) == sequence.request.sampling.n:
            del waiting[sequence.request.row]
            yield [samples[index] for index in sorted(samples)]


def _finish(finish: Finish, samples: list[Sequence]) -> Completion:
    try:
        return finish(samples)
    except Exception as error:
        raise RuntimeError(f"request {samples[0].request.id!r}: {type(error).__name__}: {error}") from error


def completion_maker(eos_token_ids: Collection[int], decode: Decode, goes_on: bool = True) -> Finish:
    """Return the function that makes a completion of the sequences of a request.

    `goes_on` says that the text goes on with the prompt's; that of an encoder-decoder begins anew.
    """

    def sample(sequence: Sequence) -> Sample:
        sampling = sequence.request.sampling
        before = sequence.request.token_ids if goes_on else ()
        token_ids, text, reason = trim(sequence.token_ids, sampling, eos_token_ids, decode, before)
        if sequence.cut and len(token_ids) == sampling.max_new_tokens:
            reason = "length"
        if reason is None:
            raise ValueError(f"the engine ended it after {len(token_ids)} tokens, for no reason")
        if sampling.logprobs is None:
            return Sample(token_ids, text, reason)
        if len(sequence.logprobs) < len(token_ids):
            raise ValueError(f"the engine gave {len(sequence.logprobs)} log probabilities for {len(token_ids)} tokens")
        return Sample(token_ids, text, reason, tuple(sequence.logprobs[: len(token_ids)]))

    def finish(samples: list[Sequence]) -> Completion:
        request = samples[0].request
        for sequence in samples:
            if sequence.error is not None:  # an error of one is the request's
                which = f"id {request.id!r}" + (f", sample {sequence.sample}" if len(samples) > 1 else "")
                error = {"kind": "engine", "message": f"{which}: {sequence.error}"}
                return Completion(request.key, request.row, request.id, (), None, "error", error)
        first, *others = map(sample, samples)
        return Completion(
            request.key, request.row, request.id, first.token_ids, first.text, first.finish_reason,
            logprobs=first.logprobs, others=tuple(others),
        )  # fmt: skip

    return finish
