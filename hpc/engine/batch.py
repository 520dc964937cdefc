"""Generate a batch, whatever happens to it: halve one that fails until the request at fault is alone."""

import logging
from collections.abc import Callable, Iterator

from hpc.engine import EngineFault, Sequence
from hpc.records import Request

LOGGER = logging.getLogger(__name__)

FAULT_AFTER = 8
"""So many requests that fail one after the other, none succeeding between them, are the engine's fault."""

GenerateBatch = Callable[[list[Request]], list[Sequence]]


class Halver:
    """Runs batches through `generate_batch`, and turns failures into error rows of the fewest requests.

    After an out-of-memory error `shrink` is called, which frees what it can; `limit` then holds the
    number of requests that fitted, for the caller's next batches.
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

    def run(self, batch: list[Request]) -> Iterator[list[Sequence]]:
        """Yield the sequences of a batch as its parts succeed.

        A request that fails alone is yielded as an error once another has succeeded after it, or at
        the `flush`. Raises `EngineFault` if `FAULT_AFTER` fail in a row: rather end with the good
        rows safe than write a corpus full of errors.
        """
        try:
            done = self._generate_batch(batch)
        except Exception as error:
            out_of_memory = self._is_out_of_memory(error)
            if out_of_memory:
                self._shrink()
            if len(batch) == 1:
                self._fail(batch[0], error, out_of_memory)
                return
            LOGGER.warning("a batch of %d requests failed (%s); trying its halves", len(batch), _one_line(error))
        else:
            if done:
                yield from self.flush()
                yield done
            return
        middle = len(batch) // 2
        yield from self.run(batch[:middle])
        yield from self.run(batch[middle:])

    def flush(self) -> Iterator[list[Sequence]]:
        """Yield the requests that failed alone and have not been yielded."""
        if self._failed:
            yield self._failed
            self._failed = []

    def _fail(self, request: Request, error: Exception, out_of_memory: bool) -> None:
        reason = "it does not fit in memory, even alone" if out_of_memory else _one_line(error)
        self._failed.append(Sequence(request, error=reason))
        LOGGER.warning("request %r failed alone: %s", request.id, _one_line(error))
        if len(self._failed) >= FAULT_AFTER and not out_of_memory:
            ids = ", ".join(repr(sequence.request.id) for sequence in self._failed)
            raise EngineFault(
                f"{len(self._failed)} requests failed one after the other (ids {ids}), the last with {_one_line(error)}"
            ) from error


def _one_line(error: BaseException) -> str:
    text = str(error).strip()
    return f"{type(error).__name__}: {text.splitlines()[0]}" if text else type(error).__name__
