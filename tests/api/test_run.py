"""`hpc.run` runs a whole job from Python, here and on the ranks of an MPI world."""

import json
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

import hpc
from hpc.engine.interface import OnStep, Source
from hpc.engine.sequence import Sequence as Growing
from tests.conftest import ROOT, finish, start, write_corpus
from tests.fakes import EchoEngine, EchoLoader

IN_A_WORLD = f"""
import sys
sys.path.insert(0, {str(ROOT)!r})
import hpc
from tests.fakes import EchoLoader
found = hpc.run(hpc.Job(model="echo", corpus=(sys.argv[1],), runs=sys.argv[2]), loader=EchoLoader())
print(found if found is None else (found["rows"], found["ranks"]), flush=True)
"""


def job(tmp_path: Path, *rows: object, **knobs: object) -> hpc.Job:
    corpus = write_corpus(tmp_path / "rows.jsonl", rows)
    return hpc.Job(model="echo", corpus=(str(corpus),), runs=str(tmp_path / "runs"), **knobs)  # type: ignore[arg-type]


class Told(EchoEngine):
    """Is told by a signal to stop."""

    def __init__(self, number: int) -> None:
        super().__init__()
        self._number = number

    def generate(self, source: Source, on_step: OnStep) -> Iterator[list[Growing]]:
        signal.raise_signal(self._number)
        return super().generate(source, on_step)


def test_it_returns_the_summary(tmp_path: Path) -> None:
    found = hpc.run(job(tmp_path, {"prompt": "a"}, {"prompt": ""}), loader=EchoLoader())
    assert found == json.loads((tmp_path / "runs/rows/summary.json").read_text())
    assert (found["rows"], found["errors"]) == (2, 1)


def test_it_prints_nothing_to_standard_output(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    hpc.run(job(tmp_path, {"prompt": "a"}), loader=EchoLoader())
    assert capsys.readouterr().out == ""


def test_too_many_error_rows_are_an_error_that_quotes_the_first(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match=r"2 of 2 rows.*is empty"):
        hpc.run(job(tmp_path, {"prompt": ""}, {"prompt": ""}), loader=EchoLoader())


def test_a_refusal_is_raised(tmp_path: Path) -> None:
    with pytest.raises(hpc.Refusal, match="no such file"):
        hpc.run(hpc.Job(model="echo", corpus=(str(tmp_path / "none.jsonl"),)), loader=EchoLoader())


def test_a_run_that_is_told_to_stop_is_unfinished_and_goes_on(tmp_path: Path) -> None:
    one = job(tmp_path, {"prompt": "a"})
    with pytest.raises(hpc.Unfinished, match="SIGTERM"):
        hpc.run(one, loader=EchoLoader(Told(signal.SIGTERM)))
    found = hpc.run(one, loader=EchoLoader())
    assert found is not None
    assert found["rows"] == 1


def test_ctrl_c_drains_the_run_and_raises(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        hpc.run(job(tmp_path, {"prompt": "a"}), loader=EchoLoader(Told(signal.SIGINT)))
    assert (tmp_path / "runs/rows/state").read_text() == "drained\n"


def test_a_share_that_leaves_rows_to_others_has_no_summary(tmp_path: Path) -> None:
    assert hpc.run(job(tmp_path, {"prompt": "a"}, {"prompt": "b"}, share="0/2"), loader=EchoLoader()) is None


def test_in_a_world_rank_0_alone_returns_the_summary(tmp_path: Path) -> None:
    corpus = write_corpus(tmp_path / "rows.jsonl", [{"prompt": "a"}, {"prompt": "b"}])
    ended = finish(start(["-c", IN_A_WORLD, str(corpus), str(tmp_path / "runs")], ranks=2))
    assert sorted(ended.out.splitlines()) == ["(2, 2)", "None"], ended.err
