"""Where an output goes, and in which format: by its name, the flags and the kind of the corpus."""

from pathlib import Path

import pytest

from hpc.exit import Refusal
from hpc.job import Job
from hpc.output.target import Target, check_folders, check_free, check_place, target_of, with_absolute_output
from hpc.rundir.directory import RunDirectory
from tests.conftest import finish, start

RUN = Path("/runs/x")


def target(output: str = "", is_batch: bool = False, **knobs: object) -> Target:
    return target_of(Job("m", ("c.jsonl",), output=output, **knobs), RUN, is_batch)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("name", "form", "packing"),
    [
        ("a.jsonl", "jsonl", ""),
        ("a.b.jsonl.gz", "jsonl", ".gz"),
        ("a.jsonl.zst", "jsonl", ".zst"),
        ("a.csv", "csv", ""),
        ("a.csv.gz", "csv", ".gz"),
        ("a.parquet", "parquet", ""),
    ],
)
def test_the_name_of_the_output_says_its_format(name: str, form: str, packing: str) -> None:
    found = target(f"/out/{name}")
    assert (found.path, found.format, found.packing) == (Path("/out") / name, form, packing)


@pytest.mark.parametrize("name", ["a.txt", "a.parquet.gz", ".jsonl", "a.json"])
def test_a_name_that_says_no_format_is_refused_with_those_that_do(name: str) -> None:
    with pytest.raises(Refusal, match=r'--output "/out/.*\.csv, .*\.jsonl\.zst, \.parquet'):
        target(f"/out/{name}")


def test_without_a_name_the_output_is_in_the_run_directory() -> None:
    assert target().path == RUN / "completions.jsonl"


@pytest.mark.parametrize(("form", "name"), [("parquet", "completions.parquet"), ("openai", "completions.jsonl")])
def test_a_format_gives_the_default_name_its_end(form: str, name: str) -> None:
    assert target(output_format=form).path == RUN / name


@pytest.mark.parametrize("given", ["{}", "{}/", "{}/new/", "{}/new", "{}/v1.5/"])
def test_a_folder_gets_a_file(tmp_path: Path, given: str) -> None:
    given = given.format(tmp_path)
    assert target(given, output_format="csv").path == Path(given) / "completions.csv"


@pytest.mark.parametrize(
    ("output", "form", "expected"),
    [("", "auto", "openai"), ("a.jsonl.gz", "auto", "openai"), ("a.csv", "auto", "csv"), ("a.jsonl", "jsonl", "jsonl")],
)
def test_a_batch_is_answered_as_one_unless_the_job_says_otherwise(output: str, form: str, expected: str) -> None:
    assert target(output, is_batch=True, output_format=form).format == expected


def test_a_name_that_contradicts_the_format_is_refused() -> None:
    with pytest.raises(Refusal, match=r"--output-format parquet: the name must end in \.parquet"):
        target("a.csv", output_format="parquet")


def test_an_error_file_is_for_the_format_whose_errors_it_takes() -> None:
    with pytest.raises(Refusal, match=r'--error-file "e.jsonl".* --output-format openai'):
        target("a.jsonl", error_file="e.jsonl")


def test_an_error_file_is_another_file_than_the_output() -> None:
    with pytest.raises(Refusal, match="is the output itself"):
        target("a.jsonl", output_format="openai", error_file="a.jsonl")


def test_the_names_of_several_files_sort() -> None:
    files = target("/out/a.jsonl.gz", output_rows_per_file=10).files(12)
    assert [file.name for file in (files[0], files[-1])] == ["a-00000-of-00012.jsonl.gz", "a-00011-of-00012.jsonl.gz"]
    assert files == sorted(files)


def test_an_output_is_the_same_from_any_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    job = with_absolute_output(Job("m", ("c",), output="out/", error_file="e.jsonl"))
    assert (job.output, job.error_file) == (f"{tmp_path}/out/", f"{tmp_path}/e.jsonl")


def test_a_file_of_the_corpus_is_never_written_over(tmp_path: Path) -> None:
    (tmp_path / "c.jsonl").write_text("{}")
    with pytest.raises(Refusal, match="is a file of the corpus"):
        check_free(target(str(tmp_path / "c.jsonl")), [tmp_path / "c.jsonl"], [], force=True)


@pytest.mark.parametrize(
    ("output", "error_file"),
    [
        ("/runs/x/errors.jsonl", ""),
        ("/runs/y/../x/requests.jsonl", ""),
        ("/runs/x/journal/a.jsonl", ""),
        ("/runs/x/events/", ""),
        ("/out/a.jsonl", "/runs/x/lock"),
        ("/out/a.jsonl", "/runs/x/state-3"),
    ],
)
def test_no_output_takes_the_place_of_a_file_of_the_run_itself(output: str, error_file: str) -> None:
    found = target(output, output_format="openai", error_file=error_file)
    with pytest.raises(Refusal, match=r"is a file that the run keeps .*name another one"):
        check_place(found, RunDirectory(RUN))


@pytest.mark.parametrize("output", ["", "/runs/x/a.jsonl", "/runs/x/more/errors.jsonl", "/runs/errors.jsonl"])
def test_another_output_may_be_in_the_run_directory(output: str) -> None:
    check_place(target(output), RunDirectory(RUN))


@pytest.mark.parametrize("name", ["file/a.csv", "file/more/", "file/more/a.csv"])
def test_an_output_below_a_file_is_refused_naming_the_file(tmp_path: Path, name: str) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(Refusal, match=rf"{tmp_path}/file is no folder"):
        check_folders(target(f"{tmp_path}/{name}"))


def test_the_folder_of_an_output_need_not_be_there(tmp_path: Path) -> None:
    check_folders(target(f"{tmp_path}/new/newer/a.csv"))


@pytest.mark.parametrize("own", [True, False])
@pytest.mark.parametrize("force", [True, False])
@pytest.mark.parametrize("rows_per_file", [0, 5])
def test_a_file_that_the_run_has_not_written_is_kept_without_force(
    tmp_path: Path, own: bool, force: bool, rows_per_file: int
) -> None:
    found = target(str(tmp_path / "a.csv"), output_rows_per_file=rows_per_file)
    found.files(1)[0].write_text("precious")
    names = [str(found.path)] if own else []
    if own or force:
        check_free(found, [], names, force)
    else:
        with pytest.raises(Refusal, match=r"this run has not written it; .*--force"):
            check_free(found, [], names, force)


WITHOUT = """
import sys
from pathlib import Path

sys.modules.update(dict.fromkeys(["pyarrow", "backports", "compression"]))
from hpc.exit import Refusal
from hpc.job import Job
from hpc.output.target import target_of

for name in ("a.parquet", "a.jsonl.zst"):
    try:
        target_of(Job("m", ("c",), output=name), Path())
    except Refusal as refusal:
        print(refusal)
"""


def test_a_format_whose_package_is_missing_is_refused_with_the_way_to_it() -> None:
    said = finish(start(["-c", WITHOUT])).out.splitlines()
    assert ["scattergen[parquet]" in said[0], "scattergen[zstd]" in said[1]] == [True, True]
