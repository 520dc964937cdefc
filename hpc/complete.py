"""Complete: what every rank does with its requests: generate, trim, write down.

The one thread of a rank does everything: the engine calls `on_step` at each decoding step, and there
the rank answers messages, notices signals and says how far it is.
"""

import logging
import time
from collections.abc import Callable, Collection

from hpc.engine import Engine, Sequence
from hpc.gather import OwnRecords
from hpc.journal import JournalWriter
from hpc.progress import Progress
from hpc.records import Completion
from hpc.scatter import Backlog
from hpc.trim import Decode, trim

LOGGER = logging.getLogger(__name__)


def complete(
    engine: Engine,
    backlog: Backlog,
    journal: JournalWriter,
    records: OwnRecords,
    progress: Progress,
    on_step: Callable[[], bool],
    finish: Callable[[Sequence], Completion],
) -> None:
    """Run an engine on a backlog; every finished sequence is in the journal before the next step."""
    progress.began = progress.ended = time.time()
    sequences = engine.generate(backlog, on_step)
    try:
        for finished in sequences:
            completions = [_finish(finish, sequence) for sequence in finished]
            for completion, sequence, (offset, length) in zip(
                completions, finished, journal.append(completions), strict=True
            ):
                rows = [completion.row, *backlog.also.pop(completion.row, ())]
                for row in rows:
                    records.add(row, offset, length)
                progress.rows += len(rows)
                progress.errors += len(rows) if completion.error else 0
                progress.requests += 1
                progress.prompt_tokens += len(sequence.request.token_ids)
                progress.generated_tokens += len(completion.token_ids)
            progress.ended, progress.waited_s = time.time(), backlog.waited_s
            progress.busy_s = progress.ended - progress.began - progress.waited_s
    finally:
        close = getattr(sequences, "close", None)
        if close:
            close()
        journal.close()
        records.sort()


def _finish(finish: Callable[[Sequence], Completion], sequence: Sequence) -> Completion:
    try:
        return finish(sequence)
    except Exception as error:
        raise RuntimeError(f"request {sequence.request.id!r}: {type(error).__name__}: {error}") from error


def finisher(eos_token_ids: Collection[int], decode: Decode) -> Callable[[Sequence], Completion]:
    """Return the function that makes a completion of a sequence."""

    def finish(sequence: Sequence) -> Completion:
        request = sequence.request
        if sequence.error is not None:
            error = {"kind": "engine", "message": f"id {request.id!r}: {sequence.error}"}
            return Completion(request.key, request.row, request.id, (), None, "error", error)
        token_ids, text, reason = trim(sequence.token_ids, request.sampling, eos_token_ids, decode)
        if reason is None:
            raise ValueError(f"the engine ended it after {len(token_ids)} tokens, for no reason")
        return Completion(request.key, request.row, request.id, token_ids, text, reason)

    return finish
