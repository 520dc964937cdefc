"""Verify or merge a run that its run directory tells of. Loads neither torch nor MPI."""

import itertools
import os
import socket
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from hpc.corpus.store import StoreError, TokenStore
from hpc.exit import FAULT, OK, UNFINISHED, Refusal
from hpc.job import Job, Output
from hpc.output.compare import compare
from hpc.output.facts import Facts, TokenBytes, facts_of
from hpc.output.formats import packed
from hpc.output.formats.format import Format
from hpc.output.journal import JournalIndex
from hpc.output.merge import MergeError
from hpc.output.row import OutputRow
from hpc.output.target import Target, check_folders, check_free, check_place, is_batch, target_of, with_absolute_output
from hpc.output.write import journal_records, output_rows, rows_without_corpus, what_is_gone, write_output
from hpc.rundir.directory import RunDirectory

Tokenizers = Callable[[Path], TokenBytes]
"""Makes bytes of the tokens of a model in a folder."""


AS_THE_JOB_SAYS = Output()


def no_tokenizer(_: Path) -> TokenBytes:
    """Return what knows no token."""
    return lambda _: None


@dataclass(frozen=True)
class RecordedRun:
    """A run as its directory records it."""

    directory: RunDirectory
    job: Job
    tokens: TokenStore
    index: JournalIndex
    model_path: Path

    @classmethod
    def open(cls, path: Path) -> "RecordedRun":
        """Open a run directory; raise `Refusal` if it is none, or its corpus was never read to the end."""
        directory = RunDirectory(path)
        values = directory.recorded_job()
        try:
            tokens = TokenStore(path)
        except StoreError as error:
            raise Refusal(str(error)) from error
        index, model_path = JournalIndex(directory.journals()), Path(values["model_path"])
        return cls(directory, Job.from_json(values["job"]), tokens, index, model_path)

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

    def with_output(self, output: Output) -> "RecordedRun":
        """Return the run with another output than that of its job; as it is where `output` says nothing."""
        if output == AS_THE_JOB_SAYS:
            return self
        return replace(self, job=with_absolute_output(replace(self.job, **vars(output))))

    def target(self, gone: bool = False) -> Target:
        """Return where the output is; of a corpus that is `gone` it is not known whether it was a batch."""
        job = self.job
        if gone and job.output_format == "auto":
            ending = target_of(job, self.directory.path)
            written = ending.format == "jsonl" and _is_openai(ending)
            return replace(ending, format="openai" if written else ending.format)
        return target_of(job, self.directory.path, not gone and is_batch(self.tokens.files))

    def facts(self, tokenizers: Tokenizers) -> Facts:
        """Return what formats need to know."""
        return facts_of(self.job, self.model_path, self.directory.created, self.tokens, tokenizers(self.model_path))


def merge_run(
    path: Path, tokenizers: Tokenizers = no_tokenizer, output: Output = AS_THE_JOB_SAYS, force: bool = False
) -> int:
    """Write the output from the journals; return the exit code. Raises `Refusal` where the corpus is gone.

    The run may be going on: nothing of it but the output is written.
    """
    run = RecordedRun.open(path)
    run = run.with_output(output)
    if gone := what_is_gone(run.tokens):
        raise Refusal(
            f'{path}: {gone}, and the output carries its "meta": put it back as it was, or run again with --corpus '
            f"naming where it is now and --name {run.directory.path.name}"
        )
    missing = int(run.tokens.good.sum()) - run.answered()
    target = run.target()
    target = target.partial if missing else target
    claim(target, run.directory, [file.path for file in run.tokens.files], force)
    try:
        writer = f"{socket.gethostname()}-{os.getpid()}"
        counts = write_output(target, run.rows(), run.facts(tokenizers), writer=writer)
    except MergeError as error:
        print(f"scattergen: {path}: {error}", file=sys.stderr)
        return FAULT
    except OSError as error:
        print(f"scattergen: cannot write {target.path}: {error}; make room, and merge again", file=sys.stderr)
        return FAULT
    print(f"{target.path}: {counts.rows:,} rows, {counts.errors:,} of them errors; {counts.missing:,} rows missing")
    return UNFINISHED if missing else OK


def claim(target: Target, directory: RunDirectory, corpus: list[Path], force: bool) -> None:
    """Make an output one of a run; raise `Refusal` where something else is there."""
    partial = str(directory.path / "completions.partial.jsonl")
    check_place(target, directory)
    check_folders(target)
    check_free(target, corpus, [*directory.outputs(), partial], force)
    directory.note_output(str(target.path))


def verify_run(path: Path, tokenizers: Tokenizers = no_tokenizer, output: Output = AS_THE_JOB_SAYS) -> int:
    """Say what is wrong with the output of a run, row by row; return the exit code."""
    run = RecordedRun.open(path)
    run = run.with_output(output)
    for damage in run.index.damages:
        print(f"note: {damage}, if it is not in another journal")
    missing = int(run.tokens.good.sum()) - run.answered()
    gone = what_is_gone(run.tokens)
    target = run.target(bool(gone))
    merge = f"`scattergen merge {path}`" + ("" if output == AS_THE_JOB_SAYS else " with these flags of the output")
    if run.directory.state != "done" and (missing or not target.existing()):
        print(f"unfinished: {missing:,} of {run.tokens.num_rows:,} rows have no completion yet")
        return UNFINISHED
    if not target.existing() or not all(file.exists() for file in target.error_files()):
        print(f"wrong: {target.path} is missing; {merge} writes it again")
        return FAULT
    found = 0
    if gone:
        print(f'note: {gone}: the "meta" of the rows cannot be checked, all else can')
    try:
        for problem in _problems(run, target, tokenizers, bool(gone)):
            print(f"wrong: {problem}")
            found += 1
    except (MergeError, OSError) as error:
        print(f"wrong: {error}")
        found += 1
    if found:
        way = "put the corpus back, and " if gone else ""
        print(f"{found:,} faults in {target.path}; {way}{merge} writes it again")
        return FAULT
    print(
        f"right: {run.tokens.num_rows:,} rows, each exactly once, in order, as the journals have them"
        + (', but for "meta", which was not checked' if gone else "")
    )
    return OK


def _problems(run: RecordedRun, target: Target, tokenizers: Tokenizers, gone: bool) -> Iterator[str]:
    """Yield what is wrong with the files of an output."""
    facts = run.facts(tokenizers)
    output = target.make_format(replace(facts, inputs=()) if gone else facts)
    files = target.existing()
    for file in target.files(len(files)):
        if file not in files:
            yield f"{file} is missing, or there is a file too many"
    entries = itertools.chain.from_iterable(map(output.read, files))
    if target.error_file is None:
        yield from compare(entries, run.rows(not gone), run.tokens, output, gone)
        return
    good = (row for row in run.rows(not gone) if row.answer is not None and row.error is None)
    yield from compare(entries, good, run.tokens, output, gone)
    bad = (row for row in run.rows(not gone) if row.answer is None or row.error is not None)
    errors = _in_error_file(target, facts).read(target.error_file)
    yield from compare(errors, bad, run.tokens, output, gone)


def _in_error_file(target: Target, facts: Facts) -> Format:
    assert target.error_file is not None
    return replace(target, packing=packed.of_name(target.error_file)).make_format(facts)


def _is_openai(target: Target) -> bool:
    """Say whether a file of JSON lines has responses of OpenAI's API."""
    for path in target.existing()[:1]:
        with packed.read(path, target.packing) as file:
            return b'"custom_id": ' in file.readline()
    return False
