"""Find the files of a job's corpus, and copy those that can be read once alone into the run directory."""

from collections.abc import Callable, Sequence
from pathlib import Path

from hpc.corpus import detect, formats, pipe
from hpc.corpus.columns import Columns, refusal
from hpc.corpus.errors import CorpusError
from hpc.corpus.files import Blocks, find_files
from hpc.corpus.formats import FORMATS, CorpusFile
from hpc.corpus.formats.stream import TextStream
from hpc.exit import Refusal
from hpc.job import Job
from hpc.rundir.directory import RunDirectory

_FIRST_ROWS = 100


def corpus_files(job: Job) -> tuple[Path, ...]:
    """Return the corpus files of a job, absolute; raise `Refusal` for what is none, or of a format that is not read."""
    files = find_files(job.corpus)
    if not job.name and pipe.is_nameless(files[0]):
        raise Refusal("a corpus that comes through a pipe gives no name to the run; add --name")
    if job.share and any(map(pipe.is_pipe, files)):
        raise Refusal("the jobs that share a corpus must all read it, and a pipe can be read once; write it to a file")
    find_formats([file for file in files if not pipe.is_pipe(file)], job)
    return files


def keep_corpus(
    files: Sequence[Path], directory: RunDirectory, job: Job, give_up: Callable[[], bool]
) -> tuple[Path, ...] | None:
    """Return the corpus files, pipes copied into the run directory; None if it was given up.

    Raises `Refusal` for what cannot be copied, or is of a format that is not read.
    """
    try:
        kept = pipe.keep(files, directory.path / "corpus", give_up)
    except OSError as error:
        raise RuntimeError(f"cannot copy the corpus into {directory.path}: {error}; make room and run again") from error
    find_formats([copy for file, copy in zip(files, kept or files, strict=True) if copy != file], job)
    return kept


def check_columns(files: Sequence[CorpusFile], columns: Columns) -> None:
    """Raise `Refusal` if the first rows of a corpus have text, and none of them anything that is read as a prompt."""
    rows = (value for block in Blocks(files, limit=_FIRST_ROWS) for _, _, value in formats.rows(block))
    if (reason := refusal(rows, columns)) is not None:
        raise Refusal(f'corpus "{files[0].path}": {reason}')


def find_format(path: Path, asked: str = "auto") -> str:
    """Return the format of a file, a name in `FORMATS`; raise `CorpusError` for one that is not read.

    `asked` is what the user says it is, or "auto".
    """
    try:
        with open(path, "rb") as file:
            found = asked if asked != "auto" else detect.table_format(file.read(detect.HEAD_BYTES))
    except OSError as error:
        raise CorpusError(f'corpus "{path}" cannot be read: {error.strerror}') from error
    if not found:
        with TextStream(path, path.name) as stream:
            head = stream.read(detect.HEAD_BYTES)
        found = detect.recognise(head, str(path), len(head) < detect.HEAD_BYTES)
    FORMATS[found].columns(CorpusFile(path, path.name, found))  # it can be read, and has what that takes
    return found


def find_formats(files: Sequence[Path], job: Job) -> tuple[str, ...]:
    """Return the format of each file, as the job says or its content; raise `Refusal` for one that is not read."""
    asked = "file" if job.text_per == "file" else job.format
    return tuple(find_format(file, asked) for file in files)
