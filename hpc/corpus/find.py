"""Find the files of a job's corpus, and copy those that can be read once alone into the run directory."""

from collections.abc import Callable, Sequence
from pathlib import Path

from hpc.corpus import detect, pipe
from hpc.corpus.files import find_files
from hpc.exit import Refusal
from hpc.job import Job
from hpc.rundir.directory import RunDirectory


def corpus_files(job: Job) -> tuple[Path, ...]:
    """Return the corpus files of a job, absolute; raise `Refusal` for what is none, or of a format that is not read."""
    files = find_files(job.corpus)
    if not job.name and pipe.is_nameless(files[0]):
        raise Refusal("a corpus that comes through a pipe gives no name to the run; add --name")
    if job.share and any(map(pipe.is_pipe, files)):
        raise Refusal("the jobs that share a corpus must all read it, and a pipe can be read once; write it to a file")
    for file in files:
        if not pipe.is_pipe(file):
            _check_format(file, str(file))
    return files


def keep_corpus(files: Sequence[Path], directory: RunDirectory, give_up: Callable[[], bool]) -> tuple[Path, ...] | None:
    """Return the corpus files, pipes copied into the run directory; None if it was given up.

    Raises `Refusal` for what cannot be copied, or is of a format that is not read.
    """
    try:
        kept = pipe.keep(files, directory.path / "corpus", give_up)
    except OSError as error:
        raise RuntimeError(f"cannot copy the corpus into {directory.path}: {error}; make room and run again") from error
    for file, copy in zip(files, kept or files, strict=True):
        if copy != file:
            _check_format(copy, "FILE")
    return kept


def _check_format(file: Path, name: str) -> None:
    try:
        with open(file, "rb") as opened:
            found = detect.foreign(opened.read(detect.HEAD_BYTES), name)
    except OSError as error:
        raise Refusal(f'corpus "{file}" cannot be read: {error.strerror}') from error
    if found is not None:
        raise Refusal(f'corpus "{file}" cannot be read: {found}')
