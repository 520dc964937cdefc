"""Generate a batch, whatever happens to it: halve one that fails until the request at fault is alone."""

import logging
import traceback
from collections.abc import Callable, Iterator
from dataclasses import replace

import torch

from hpc.engine.sequence import Sequence

LOGGER = logging.getLogger(__name__)


class EngineFault(Exception):
    """The engine itself is broken, and not one request: nothing more can be expected of it."""


FAULT_AFTER = 8
"""So many requests that fail one after the other, none succeeding between them, are the engine's fault."""

GenerateBatch = Callable[[list[Sequence]], list[Sequence]]
"""Takes sequences as they begin, and returns grown ones; it leaves those that it was given as they are."""


class Bisector:
    """Runs batches through `generate_batch`, and turns failures into error rows of the fewest requests.

    `shrink` is called when a batch has run out of memory, and again when one of half its size has: it
    frees what it can, and makes later batches half as large.
    """

    def __init__(
        self,
        generate_batch: GenerateBatch,
        is_out_of_memory: Callable[[Exception], bool],
        shrink: Callable[[], None],
    ) -> None:
        self._generate_batch = generate_batch
        self._is_out_of_memory = is_out_of_memory
        self._shrink = shrink
        self._failed: list[Sequence] = []
        self._faults = 0

    def run(self, batch: list[Sequence]) -> Iterator[list[Sequence]]:
        """Yield the sequences of a batch, grown, as its parts succeed.

        One that fails alone is yielded as an error once another has succeeded after it, or at
        the `flush`. Raises `EngineFault` if `FAULT_AFTER` fail in a row, and not for memory: rather
        end with the good rows safe than write a corpus full of errors.
        """
        parts, did_not_fit = [batch], 2 * len(batch)
        while parts:
            part = parts.pop(0)
            done, failure, out_of_memory = self._try(part)
            # Only now: in the except clause the traceback would still hold what is to be freed.
            if out_of_memory and 2 * len(part) <= did_not_fit + 1:
                did_not_fit = len(part)
                self._shrink()
            if failure is None:
                if done:
                    self._faults = 0
                    yield from self.flush()
                    yield done
            elif len(part) == 1:
                self._fail(part[0], failure, out_of_memory)
            else:
                LOGGER.warning("a batch of %d requests failed (%s); trying its halves", len(part), failure)
                parts[:0] = [part[: len(part) // 2], part[len(part) // 2 :]]

    def flush(self) -> Iterator[list[Sequence]]:
        """Yield the requests that failed alone and have not been yielded."""
        if self._failed:
            yield self._failed
            self._failed = []

    def _try(self, batch: list[Sequence]) -> tuple[list[Sequence], str | None, bool]:
        """Return the sequences, or in words why there are none, and whether that was for want of memory."""
        try:
            return self._generate_batch(batch), None, False
        except Exception as error:
            # As text: a handler that keeps its records would keep what the traceback holds, and not free it.
            LOGGER.debug("a batch of %d requests failed:\n%s", len(batch), traceback.format_exc())
            return [], one_line(error), self._is_out_of_memory(error)

    def _fail(self, sequence: Sequence, failure: str, out_of_memory: bool) -> None:
        reason = "it does not fit in memory, even alone" if out_of_memory else failure
        again = any(failed.request is sequence.request for failed in self._failed)  # another of its samples
        self._failed.append(replace(sequence, error=reason))
        self._faults += not out_of_memory and not again
        LOGGER.warning("request %r failed alone: %s", sequence.request.id, failure)
        if self._faults >= FAULT_AFTER:
            ids = ", ".join(repr(sequence.request.id) for sequence in self._failed)
            raise EngineFault(
                f"{self._faults} requests failed one after the other (ids {ids}), the last with {failure}"
            )


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
