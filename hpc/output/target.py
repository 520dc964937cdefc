"""Where the output of a run goes, and in which format: decided by the job, and the kind of its corpus."""

import os
import re
from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from hpc.corpus.files import Blocks
from hpc.corpus.formats import CorpusFile, rows
from hpc.corpus.openai import is_batch_line
from hpc.exit import Refusal
from hpc.job import Job
from hpc.output.facts import Facts
from hpc.output.formats import packed, parquet
from hpc.output.formats.format import Format
from hpc.output.formats.registry import FORMATS
from hpc.rundir.directory import RunDirectory

_STEM = "completions"
_HEAD_BYTES = 1 << 16
_LOOKED_AT = frozenset({"custom_id", "body", "url", "method", "prompt", "messages"})


@dataclass(frozen=True)
class Target:
    """The files of an output."""

    folder: Path
    stem: str
    """The name of a file without what its format adds."""
    format: str
    """A name in `FORMATS`."""
    packing: str = ""
    rows_per_file: int = 0
    """0 for one file."""
    error_file: Path | None = None
    """Where error rows go, if not with the others."""

    @property
    def ending(self) -> str:
        """What the names of its files end in."""
        return FORMATS[self.format][0] + self.packing

    @property
    def path(self) -> Path:
        """The file, or the name that those of several are made of."""
        return self.folder / (self.stem + self.ending)

    @property
    def partial(self) -> "Target":
        """Where the output goes while rows are missing."""
        error_file = self.error_file
        if error_file is not None:
            packing = packed.of_name(error_file)
            bare = error_file.with_name(error_file.name.removesuffix(packing))
            error_file = bare.with_name(f"{bare.stem}.partial{bare.suffix}{packing}")
        return replace(self, stem=f"{self.stem}.partial", error_file=error_file)

    def files(self, count: int) -> list[Path]:
        """Return the names of so many files, in their order, which is that of the names."""
        if not self.rows_per_file:
            return [self.path]
        return [self.folder / f"{self.stem}-{index:05d}-of-{count:05d}{self.ending}" for index in range(count)]

    def part(self, index: int) -> Path:
        """Return what a file is called while it is not known how many there will be."""
        return self.folder / f"{self.stem}-{index:05d}{self.ending}"

    def existing(self) -> list[Path]:
        """Return the files of this output that are there, also those of another number of files; no error file."""
        if not self.rows_per_file:
            return [self.path] if self.path.exists() else []
        name = re.compile(re.escape(self.stem) + r"-\d{5,}-of-\d{5,}" + re.escape(self.ending))
        found = self.folder.iterdir() if self.folder.is_dir() else iter(())
        return sorted(path for path in found if name.fullmatch(path.name))

    def error_files(self) -> list[Path]:
        """Return the error file, if there is to be one."""
        return [] if self.error_file is None else [self.error_file]

    def make_format(self, facts: Facts) -> Format:
        """Return what writes and reads its files; raise `Refusal` where a package for it is missing."""
        return FORMATS[self.format][2](facts, self.packing)


def target_of(job: Job, run: Path, is_batch: bool = False) -> Target:
    """Return where the output of a job goes whose run directory is `run`; raise `Refusal` where that cannot be.

    `is_batch` says that the corpus is a batch of OpenAI's API, whose own format is then that of JSON lines.
    """
    given = Path(job.output).expanduser().absolute() if job.output else run
    kind = job.output_format
    is_folder = (
        not job.output or given.is_dir() or job.output.endswith("/") or not (given.suffix or given.name.startswith("."))
    )
    folder, name = (given, "") if is_folder else (given.parent, given.name)
    lines = "openai" if is_batch else "jsonl"
    if is_folder:
        target = Target(folder, _STEM, lines if kind == "auto" else kind)
    else:
        found = _by_name(name)
        if found is None:
            known = ", ".join(sorted({end + more for end, packings, _ in FORMATS.values() for more in packings}))
            raise Refusal(
                f'--output "{job.output}": the name of a file must end in one of {known}; or name a folder, with a / '
                "behind it"
            )
        ending, packing = found
        fitting = [each for each, (end, *_) in FORMATS.items() if end == ending]
        if kind != "auto" and kind not in fitting:
            wanted = FORMATS[kind][0]
            raise Refusal(f'--output "{job.output}" with --output-format {kind}: the name must end in {wanted}')
        chosen = kind if kind != "auto" else lines if ending == FORMATS[lines][0] else fitting[0]
        target = Target(folder, name[: -len(ending + packing)], chosen, packing)
    error_file = Path(job.error_file).expanduser().absolute() if job.error_file else None
    target = replace(target, rows_per_file=job.output_rows_per_file, error_file=error_file)
    _check(target, job)
    return target


def with_absolute_output(job: Job) -> Job:
    """Return the job with an output that is the same from any folder."""
    files = {
        name: str(Path(given).expanduser().absolute()) + "/" * given.endswith("/")
        for name in ("output", "error_file")
        if (given := getattr(job, name))
    }
    return replace(job, **files)


def _by_name(name: str) -> tuple[str, str] | None:
    for ending, packings, _ in FORMATS.values():
        for packing in packings:
            if name.endswith(ending + packing) and name != ending + packing:
                return ending, packing
    return None


def _check(target: Target, job: Job) -> None:
    if target.packing == ".zst":
        packed.zstd()
    if target.format == "parquet":
        parquet.arrow()
    if target.error_file is None:
        return
    if target.format != "openai":
        raise Refusal(
            f'--error-file "{job.error_file}": the output is {target.format}, whose rows say themselves whether they '
            "have an error; it goes with --output-format openai"
        )
    if target.error_file == target.path:
        raise Refusal(f'--error-file "{job.error_file}" is the output itself; name another file')


def check_free(target: Target, corpus: Sequence[Path], own: Collection[str], force: bool) -> None:
    """Raise `Refusal` for an output in the place of a file of the corpus, or of one that this run has not written.

    `own` are the outputs that it has.
    """
    for path in [*target.existing(), *(path for path in target.error_files() if path.exists())]:
        if any(file.exists() and path.samefile(file) for file in corpus):
            raise Refusal(f"{path} is a file of the corpus; name another file with --output")
        if not force and str(target.path) not in own:
            raise Refusal(
                f"{path} is there, and this run has not written it; remove it, name another with --output, or write "
                "over it with --force"
            )


def check_output(job: Job, files: Sequence[CorpusFile], directory: RunDirectory) -> None:
    """Raise `Refusal` for an output that a run of the job would refuse; whether it can write there is not asked."""
    target = target_of(job, directory.path, is_batch(files))
    check_place(target, directory)
    check_free(target, [file.path for file in files], directory.outputs(), job.force)


def check_place(target: Target, directory: RunDirectory) -> None:
    """Raise `Refusal` for an output in the place of a file that the run itself keeps."""
    for path in [target.path, *target.error_files()]:
        if directory.keeps(path):
            raise Refusal(f"{path} is a file that the run keeps in its directory; name another one, or another folder")


def check_folders(target: Target) -> None:
    """Raise `Refusal` for an output whose folder cannot be made or written to."""
    for path in [target.path, *target.error_files()]:
        there = next(folder for folder in path.parents if os.path.lexists(folder))
        if not (there.is_dir() and os.access(there, os.W_OK | os.X_OK)):
            what = "cannot be written to" if there.is_dir() else "is no folder"
            raise Refusal(f"{path}: {there} {what}; name another place with --output or --error-file")


def is_batch(files: Sequence[CorpusFile]) -> bool:
    """Say whether a corpus is a batch of OpenAI's API: by the first of its rows that can be read."""
    for block in Blocks(files, _HEAD_BYTES):
        for _, _, value in rows(block, _LOOKED_AT):
            if isinstance(value, dict):
                return is_batch_line(value)
    return False
