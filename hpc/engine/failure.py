"""What both engines do where computing fails: the policy, and the `hf` engine's way to carry it out.

Out of memory, an engine computes less at a time from then on. Of any other failure it isolates the requests that were
computed together, until the one at fault is alone. That one becomes an error row, but not before another has succeeded
after it: if `FAULT_AFTER` requests fail in a row it is the engine that is broken, and it ends with the good rows safe
rather than write a corpus full of errors.
"""

import enum
import logging
import traceback
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import NamedTuple

import torch

from hpc.engine.sequence import Sequence

LOGGER = logging.getLogger(__name__)


class EngineFault(Exception):
    """The engine itself is broken, and not one request: nothing more can be expected of it."""


FAULT_AFTER = 8
"""Requests that fail one after the other, none succeeding between them, until it is the engine's fault."""


class Failure(NamedTuple):
    """Why something could not be computed. As text: an exception would keep what its traceback holds in memory."""

    text: str
    out_of_memory: bool


class Remedy(enum.Enum):
    """What is to be done about a failure."""

    SHRINK = "compute fewer at a time from now on, and those that failed again"
    ISOLATE = "compute those that failed again in smaller parts"
    GIVE_UP = "the request is alone: it becomes an error"


class Recovery:
    """The policy, and the requests that failed alone and are kept back until another succeeds."""

    def __init__(self) -> None:
        self._failed: list[Sequence] = []
        self._faults = 0

    def remedy(self, failure: Failure, num_sequences: int) -> Remedy:
        """Return what is to be done where so many sequences, at least one, failed together."""
        if num_sequences == 1:
            return Remedy.GIVE_UP
        return Remedy.SHRINK if failure.out_of_memory else Remedy.ISOLATE

    def give_up(self, sequence: Sequence, failure: Failure) -> None:
        """Make an error of a sequence that failed alone, and keep it back.

        Raises `EngineFault` for the last of `FAULT_AFTER` requests in a row; samples of one request count once, and
        those that lacked memory do not count.
        """
        LOGGER.warning("request %r failed alone: %s", sequence.request.id, failure.text)
        again = any(failed.request is sequence.request for failed in self._failed)
        reason = "it does not fit in memory, even alone" if failure.out_of_memory else failure.text
        self._failed.append(replace(sequence, error=reason))
        self._faults += not failure.out_of_memory and not again
        if self._faults >= FAULT_AFTER:
            ids = ", ".join(repr(failed.request.id) for failed in self._failed)
            raise EngineFault(
                f"{self._faults} requests failed one after the other (ids {ids}), the last with {failure.text}"
            )

    def succeed(self) -> list[Sequence]:
        """Note that a sequence has ended well; return those that were kept back, in the order of their failing."""
        self._faults = 0
        return self.flush()

    def flush(self) -> list[Sequence]:
        """Return those that were kept back, once."""
        failed, self._failed = self._failed, []
        return failed


def failure_of(error: Exception, what: str) -> Failure:
    """Describe an exception that `what` raised, such as "a step"; its traceback goes to the log."""
    LOGGER.debug("%s failed:\n%s", what, traceback.format_exc())
    return Failure(one_line(error), is_out_of_memory(error))


GenerateBatch = Callable[[list[Sequence]], list[Sequence]]
"""Takes sequences as they begin, and returns grown ones; it leaves those that it was given as they are."""


class Bisector:
    """Runs batches through `generate_batch`, and halves one that fails.

    `shrink` is called when a batch has run out of memory, and again when one of half its size has: it
    frees what it can, and makes later batches half as large.
    """

    def __init__(self, generate_batch: GenerateBatch, shrink: Callable[[], None]) -> None:
        self._generate_batch = generate_batch
        self._shrink = shrink
        self._recovery = Recovery()

    def run(self, batch: list[Sequence]) -> Iterator[list[Sequence]]:
        """Yield the sequences of a batch, grown, as its parts succeed. Raises `EngineFault`; see `Recovery`."""
        parts, did_not_fit = [batch], 2 * len(batch)
        while parts:
            part = parts.pop(0)
            done, failure = self._try(part)
            if failure is None:
                if done:
                    if failed := self._recovery.succeed():
                        yield failed
                    yield done
                continue
            # Only now: in the except clause the traceback would still hold what is to be freed.
            if failure.out_of_memory and 2 * len(part) <= did_not_fit + 1:
                did_not_fit = len(part)
                self._shrink()
            if self._recovery.remedy(failure, len(part)) is Remedy.GIVE_UP:
                self._recovery.give_up(part[0], failure)
            else:
                LOGGER.warning("a batch of %d requests failed (%s); trying its halves", len(part), failure.text)
                parts[:0] = [part[: len(part) // 2], part[len(part) // 2 :]]

    def flush(self) -> Iterator[list[Sequence]]:
        """Yield the requests that failed alone and have not been yielded."""
        if failed := self._recovery.flush():
            yield failed

    def _try(self, batch: list[Sequence]) -> tuple[list[Sequence], Failure | None]:
        try:
            return self._generate_batch(batch), None
        except Exception as error:
            return [], failure_of(error, f"a batch of {len(batch)} requests")


def one_line(error: BaseException) -> str:
    """Say in one line what an exception says."""
    text = str(error).strip()
    return f"{type(error).__name__}: {text.splitlines()[0]}" if text else type(error).__name__


_OUT_OF_MEMORY = (
    "DefaultCPUAllocator", "can't allocate memory", "not enough memory",
    "CUDA error: out of memory", "HIP error: out of memory", "CUDA out of memory", "HIP out of memory",
    "CUBLAS_STATUS_ALLOC_FAILED", "CUSOLVER_STATUS_ALLOC_FAILED", "CUDNN_STATUS_ALLOC_FAILED",
)  # fmt: skip
"""How torch's allocator for the CPU puts it, which differs with the system, and what libraries and graphs of a GPU say,
which take memory beside torch's allocator."""


def is_out_of_memory(error: Exception) -> bool:
    """Say whether an exception means that there was not enough memory, on a GPU or in the process."""
    if isinstance(error, torch.cuda.OutOfMemoryError | MemoryError):
        return True
    return isinstance(error, RuntimeError) and any(words in str(error) for words in _OUT_OF_MEMORY)
