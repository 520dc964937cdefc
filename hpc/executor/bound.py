"""Bind a run directory to its corpus, so that another corpus does not replace its output.

A run directory is named after its corpus, and two corpora may have one name. A corpus that was moved, has grown or was
edited goes on; another one is refused.
"""

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from hpc.arrays import Keys
from hpc.corpus.store import TokenStore, id_hash
from hpc.exit import Refusal
from hpc.output.journal import JournalIndex
from hpc.rundir.directory import RunDirectory

LOGGER = logging.getLogger(__name__)


Hashes = npt.NDArray[np.uint64]


@dataclass(frozen=True)
class CorpusBinding:
    """The completions of a run directory, and the corpus files that they belong to, where these are known."""

    directory: RunDirectory
    earlier: JournalIndex
    before: TokenStore | None
    """The corpus as it was last read; None if it never was, or the store is damaged."""

    def check(self, files: Sequence[Path], keys: Keys, ids: Hashes, force: bool, attempt: int) -> None:
        """Log how the corpus has changed; raise `Refusal` if it is another one.

        `keys` and `ids` (hashes) are of its rows, shape [rows]. With `force` another one goes on, and the
        output that there is gets a name of its own, with the number of the `attempt`.
        """
        found = self.earlier.find(keys) if len(self.earlier) and len(keys) else np.empty(0, dtype=np.int64)
        if len(self.earlier) and len(keys) and not (found >= 0).any():
            raise Refusal(
                f"{self.directory.path} holds {len(self.earlier):,} completions, and none of them is for a row of this "
                "corpus with these sampling parameters. Choose another --name, or remove the run directory"
            )
        was, now = self._paths(), real_paths(files)
        if not set(was) - set(now):
            if self.before is not None and self.before.num_rows != len(keys):
                LOGGER.info("the corpus had %d rows, and has %d now", self.before.num_rows, len(keys))
            return
        done, missing = self._missing(keys, ids, found)
        what = f"{', '.join(map(str, files))} in the place of {', '.join(was)}"
        if not missing:
            LOGGER.info("the corpus is %s, with all %d rows that are finished: going on", what, done)
        elif force:
            kept = self.directory.keep_completions(attempt)
            LOGGER.warning(
                "the corpus is %s, without %d of the %d rows that are finished%s",
                what, missing, done, f": their output is kept as {kept.name}" if kept else "",
            )  # fmt: skip
        else:
            raise Refusal(
                f"{self.directory.path} was begun with another corpus: {what} lacks {missing:,} of the {done:,} rows "
                "that are finished. Choose another --name; or go on here with --force, which keeps the output so far "
                "under another name"
            )

    def _paths(self) -> list[str]:
        if self.before is not None:
            inputs = self.before.inputs
            return inputs["paths"] if "paths" in inputs else real_paths([Path(name) for name, *_ in inputs["files"]])
        return real_paths([Path(name) for name in (self.directory.read_job() or {"files": []})["files"]])

    def _missing(self, keys: Keys, ids: Hashes, found: npt.NDArray[np.int64]) -> tuple[int, int]:
        """Return the number of finished rows, and how many of them the corpus has neither by key nor by id."""
        if self.before is None:
            return len(self.earlier), len(self.earlier) - len(np.unique(found[found >= 0]))
        done = np.flatnonzero((self.earlier.find(self.before.keys) >= 0) & self.before.good)
        own = np.array([id_hash(self.before.id(row)) for row in done.tolist()], dtype=np.uint64)
        there = np.isin(self.before.keys[done], keys) & np.isin(own, ids)
        return len(done), int(np.count_nonzero(~there))


def real_paths(files: Sequence[Path]) -> list[str]:
    """Return the resolved paths of files: the same for a relative path, an absolute one and a link."""
    return [str(file.resolve()) for file in files]
