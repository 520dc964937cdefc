"""A run directory is bound to its corpus: moved, grown or edited it goes on, another of its name is refused."""

import json
import os
from pathlib import Path
from typing import Any

import pytest

from hpc.exit import Refusal
from hpc.forecast.forecast import forecast
from hpc.job import Job
from hpc.mpi.comm import Single
from hpc.mpi.signals import Stop
from hpc.pipeline import generate
from tests.conftest import read_rows, write_corpus
from tests.fakes import EchoLoader
from tests.test_pipeline import SHORT, CountingLoader

CAT, DOG, BIRD = {"id": "1", "prompt": "cat"}, {"id": "2", "prompt": "dog"}, {"id": "3", "prompt": "bird"}
REFUSED = r"begun with another corpus.*b/p.jsonl in the place of .*a/p.jsonl.*--force"


def write(tmp_path: Path, name: str, rows: list[Any]) -> str:
    path = tmp_path / name
    path.parent.mkdir(exist_ok=True)
    return str(write_corpus(path, rows))


def job(tmp_path: Path, *corpus: str, **knobs: Any) -> Job:
    return Job(model="echo", corpus=corpus, runs=str(tmp_path / "runs"), sampling=SHORT, **knobs)


def go(tmp_path: Path, *corpus: str, **knobs: Any) -> int:
    """Run a corpus in runs/p; return how many times a model was loaded."""
    loader = CountingLoader()
    assert generate(job(tmp_path, *corpus, **knobs), Single(), loader, Stop()) == 0
    return loader.loads


def output(tmp_path: Path, name: str = "completions.jsonl") -> list[str]:
    return [row["id"] for row in read_rows(tmp_path / "runs/p" / name)]


@pytest.fixture
def first(tmp_path: Path) -> str:
    """A finished run of a/p.jsonl."""
    made = write(tmp_path, "a/p.jsonl", [CAT, DOG])
    go(tmp_path, made)
    return made


@pytest.mark.parametrize(
    "rows",
    [
        [{"id": "9", "prompt": "cat"}],
        [CAT],
        [CAT, BIRD],
        [{"id": "8", "prompt": "cat"}, {"id": "9", "prompt": "dog"}, BIRD],
        [{"prompt": "cat"}, {"prompt": "dog"}],
        [CAT, CAT, CAT],
    ],
    ids=["one in common", "fewer", "one less and one more", "other ids", "no ids", "duplicates"],
)
def test_another_corpus_of_the_same_name_is_refused_and_the_output_stays(
    tmp_path: Path, first: str, rows: list[Any]
) -> None:
    before = {path: path.read_bytes() for path in (tmp_path / "runs/p").glob("*.*")}
    with pytest.raises(Refusal, match=REFUSED):
        go(tmp_path, write(tmp_path, "b/p.jsonl", rows))
    assert {path: path.read_bytes() for path in before} == before
    assert go(tmp_path, first) == 0


def test_a_part_of_a_corpus_of_several_files_is_refused(tmp_path: Path, first: str) -> None:
    second = write(tmp_path, "b/p.jsonl", [BIRD])
    assert go(tmp_path, first, second) == 1
    with pytest.raises(Refusal, match="lacks 2 of the 3 rows"):
        go(tmp_path, second)


def test_with_force_another_corpus_goes_on_and_the_output_is_kept(tmp_path: Path, first: str) -> None:
    assert go(tmp_path, write(tmp_path, "b/p.jsonl", [CAT, BIRD]), force=True) == 1
    assert (output(tmp_path), output(tmp_path, "completions.before-2.jsonl")) == (["1", "3"], ["1", "2"])


def test_a_plan_with_force_does_not_unbind_a_run(tmp_path: Path, first: str) -> None:
    other = write(tmp_path, "b/p.jsonl", [CAT, BIRD])
    with pytest.raises(Refusal, match=REFUSED):
        forecast(job(tmp_path, other, force=True), EchoLoader())
    with pytest.raises(Refusal, match=REFUSED):
        go(tmp_path, other)


@pytest.mark.parametrize("rows", [[CAT, DOG], [BIRD, DOG, CAT], [CAT, DOG, DOG | {"id": "4"}, ""]])
def test_a_corpus_that_was_moved_or_has_grown_goes_on_and_says_so(
    tmp_path: Path, first: str, capsys: pytest.CaptureFixture[str], rows: list[Any]
) -> None:
    Path(first).unlink()
    assert go(tmp_path, write(tmp_path, "b/p.jsonl", rows)) == (BIRD in rows)
    assert "with all 2 rows that are finished: going on" in capsys.readouterr().err


def test_rows_without_ids_may_be_moved_and_grow(tmp_path: Path) -> None:
    go(tmp_path, write(tmp_path, "a/p.jsonl", [{"prompt": "x"}, {"prompt": "y"}]))
    assert go(tmp_path, write(tmp_path, "b/p.jsonl", [{"prompt": "z"}, {"prompt": "x"}, {"prompt": "y"}])) == 1


def test_rows_of_the_same_file_may_be_removed(tmp_path: Path, first: str) -> None:
    write(tmp_path, "a/p.jsonl", [DOG, BIRD])
    assert (go(tmp_path, first), output(tmp_path)) == (1, ["2", "3"])


def test_what_was_not_finished_binds_nothing(tmp_path: Path) -> None:
    stop = Stop()
    stop.request("test")
    assert generate(job(tmp_path, write(tmp_path, "a/p.jsonl", [CAT])), Single(), EchoLoader(), stop) == 75
    assert go(tmp_path, write(tmp_path, "b/p.jsonl", [DOG])) == 1


def test_the_paths_of_one_file_are_one_corpus(tmp_path: Path, first: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path / "a")
    (tmp_path / "link").symlink_to(tmp_path / "a")
    (tmp_path / "p.jsonl").symlink_to(first)
    for path in ("p.jsonl", "../a/p.jsonl", "../link/p.jsonl", "../p.jsonl", first):
        assert go(tmp_path, path) == 0


def test_a_link_that_leads_to_another_file_is_another_corpus(tmp_path: Path) -> None:
    link = tmp_path / "p.jsonl"
    link.symlink_to(write(tmp_path, "a/p.jsonl", [CAT, DOG]))
    go(tmp_path, str(link))
    other = write(tmp_path, "b/p.jsonl", [CAT, BIRD])
    link.unlink()
    link.symlink_to(other)
    with pytest.raises(Refusal, match="begun with another corpus"):
        go(tmp_path, str(link))


def test_shares_of_another_corpus_are_refused(tmp_path: Path) -> None:
    first = write(tmp_path, "a/p.jsonl", [CAT, DOG])
    for share in ("0/2", "1/2"):
        go(tmp_path, first, share=share)
    other = write(tmp_path, "b/p.jsonl", [CAT, BIRD])
    for share in ("0/2", "1/2"):
        with pytest.raises(Refusal, match=REFUSED):
            go(tmp_path, other, share=share)
    assert (output(tmp_path), (tmp_path / "runs/p/state").read_text()) == (["1", "2"], "done\n")


def without_paths(run: Path) -> None:
    """Make a run directory as it was before stores had the real paths."""
    values = json.loads((run / "store.json").read_text())
    del values["inputs"]["paths"]
    (run / "store.json").write_text(json.dumps(values))


@pytest.mark.parametrize("damage", [without_paths, lambda run: os.unlink(run / "store.json")], ids=["old", "no store"])
def test_a_run_directory_that_knows_less_of_its_corpus_goes_on_and_refuses_another(
    tmp_path: Path, first: str, damage: Any
) -> None:
    damage(tmp_path / "runs/p")
    with pytest.raises(Refusal, match=REFUSED):
        go(tmp_path, write(tmp_path, "b/p.jsonl", [CAT, BIRD]))
    assert go(tmp_path, first) == 0
