"""Look at a run from its run directory alone: `status`, `verify` and `merge`. Loads neither torch nor MPI."""

import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from hpc.corpus.store import StoreError, TokenStore
from hpc.exit import FAULT, OK, UNFINISHED, Refusal
from hpc.job import Job
from hpc.output.compare import compare
from hpc.output.journal import JournalIndex
from hpc.output.merge import MergeError, OutputRow
from hpc.output.write import journal_records, output_rows, rows_without_corpus, what_is_gone, write_output
from hpc.rundir.directory import RunDirectory


@dataclass(frozen=True)
class RecordedRun:
    """A run as its directory tells it."""

    directory: RunDirectory
    job: Job
    tokens: TokenStore
    index: JournalIndex

    @classmethod
    def open(cls, path: Path) -> "RecordedRun":
        """Open a run directory; raise `Refusal` if it is none, or its corpus was never read to the end."""
        directory = RunDirectory(path)
        values = directory.recorded_job()
        try:
            tokens = TokenStore(path)
        except StoreError as error:
            raise Refusal(str(error)) from error
        return cls(directory, Job.from_json(values["job"]), tokens, JournalIndex(directory.journals()))

    def rows(self, with_corpus: bool = True) -> Iterator[OutputRow]:
        """Yield the output rows that the journals, the token store and the corpus give; without it, but for `meta`."""
        records = [journal_records(self.tokens, self.index)]
        if not with_corpus:
            return rows_without_corpus(self.tokens, records, self.job.return_token_ids)
        limit: int | None = self.tokens.inputs["limit"]
        return output_rows(self.tokens, self.tokens.files, limit, records, self.job.return_token_ids)

    def answered(self) -> int:
        """Return how many rows have a completion in the journals."""
        return int(np.count_nonzero((self.index.find(self.tokens.keys) >= 0) & self.tokens.good))


def merge_run(path: Path) -> int:
    """Write the output from the journals; return the exit code. Raises `Refusal` where the corpus is gone."""
    run = RecordedRun.open(path)
    if gone := what_is_gone(run.tokens):
        raise Refusal(
            f'{path}: {gone}, and the output carries its "meta": put it back as it was, or run again with --corpus '
            f"naming where it is now and --name {run.directory.path.name}"
        )
    missing = int(run.tokens.good.sum()) - run.answered()
    target = run.directory.partial if missing else run.directory.completions
    try:
        counts = write_output(target, run.rows())
    except (MergeError, OSError) as error:
        print(f"scattergen: {path}: {error}", file=sys.stderr)
        return FAULT
    print(f"{target}: {counts.rows:,} rows, {counts.errors:,} of them errors; {counts.missing:,} rows missing")
    return UNFINISHED if missing else OK


def verify_run(path: Path) -> int:
    """Say what is wrong with the output of a run, row by row; return the exit code."""
    run = RecordedRun.open(path)
    for damage in run.index.damages:
        print(f"note: {damage}, if it is not in another journal")
    missing = int(run.tokens.good.sum()) - run.answered()
    if run.directory.state != "done" and (missing or not run.directory.completions.exists()):
        print(f"unfinished: {missing:,} of {run.tokens.num_rows:,} rows have no completion yet")
        return UNFINISHED
    if not run.directory.completions.exists():
        print(f"wrong: {run.directory.completions} is missing; `scattergen merge {path}` writes it again")
        return FAULT
    found, gone = 0, what_is_gone(run.tokens)
    if gone:
        print(f'note: {gone}: the "meta" of the rows cannot be checked, all else can')
    try:
        for problem in compare(run.directory.completions, run.rows(not gone), run.tokens, bool(gone)):
            print(f"wrong: {problem}")
            found += 1
    except (MergeError, OSError) as error:
        print(f"wrong: {error}")
        found += 1
    if found:
        way = "put the corpus back, and " if gone else ""
        print(f"{found:,} faults in {run.directory.completions}; {way}`scattergen merge {path}` writes it again")
        return FAULT
    print(
        f"right: {run.tokens.num_rows:,} rows, each exactly once, in order, as the journals have them"
        + (', but for "meta", which was not checked' if gone else "")
    )
    return OK
