"""What generates is decided before there is a plan, and the summary says what it was."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from hpc.engine.registry import Choice
from hpc.exit import Refusal
from hpc.job import Job
from hpc.model.loader import Loader, Replica
from hpc.mpi.binding import Binding
from hpc.output.write import Counts
from hpc.report.summary import summarise
from hpc.rundir.progress import Progress, Work
from hpc.sampling_params import SamplingParams
from tests.conftest import make_tiny_model
from tests.test_pipeline import run, summary

ROWS: list[object] = [{"prompt": "x" * length} for length in range(1, 41)]


class Counting(Loader):
    """Notes how many rows each call of transformers' `generate` has."""

    def __init__(self) -> None:
        self.calls: list[int] = []

    def load(self, job: Job, path: Path, place: Binding) -> Replica:
        replica = super().load(job, path, place)
        model = replica.engine._model  # type: ignore[attr-defined]
        generate = model.generate

        def counted(**given: Any) -> Any:
            self.calls.append(len(given["input_ids"]))
            return generate(**given)

        model.generate = counted
        return replica


class Hoping(Counting):
    """Finds out at load alone that the native engine is not for the model."""

    def choose_engine(self, job: Job, path: Path, place: Binding) -> Choice:
        return Choice("native")


@pytest.fixture(scope="module")
def tiny_xglm(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_model(tmp_path_factory.mktemp("tiny-xglm"), "xglm")


@pytest.mark.parametrize("loader", [Counting(), Hoping()], ids=["declared", "found at load"])
def test_a_model_that_native_refuses_is_generated_in_full_batches(
    tmp_path: Path, tiny_xglm: Path, loader: Counting
) -> None:
    run(tmp_path, ROWS, loader, model=str(tiny_xglm), device="cpu", sampling=SamplingParams(max_new_tokens=4))
    # A call more may be for rows that stand alone, as rounding could have changed them.
    assert (sum(count for count in loader.calls if count > 1), len(loader.calls) < 9) == (40, True), loader.calls
    assert (summary(tmp_path)["engine"], summary(tmp_path)["rank_engines"]) == ("hf", ["hf"])


def test_what_has_generated_and_why_is_still_said_when_nothing_is_left(tmp_path: Path, tiny_xglm: Path) -> None:
    for _ in range(2):
        run(tmp_path, ROWS[:2], Loader(), model=str(tiny_xglm), device="cpu", sampling=SamplingParams(max_new_tokens=1))
    found = summary(tmp_path)
    assert (found["generated_tokens"], found["engine"], found["engine_asked"]) == (0, "hf", "auto")
    assert "its attention cannot be replaced; the hf engine generates on a CPU" in found["engine_reason"]


@pytest.mark.parametrize("asked", ["auto", "native"])
def test_an_encoder_decoder_goes_to_hf_with_the_reason(tmp_path: Path, tiny_summarizer: Path, asked: Any) -> None:
    sampling = SamplingParams(max_new_tokens=2)
    run(tmp_path, ROWS[:2], Loader(), model=str(tiny_summarizer), device="cpu", engine=asked, sampling=sampling)
    found = summary(tmp_path)
    assert found["engine"] == "hf"
    assert "an encoder and a decoder (t5); the hf engine generates" in found["engine_reason"]


def test_vllm_that_is_named_for_an_encoder_decoder_is_refused(tmp_path: Path, tiny_summarizer: Path) -> None:
    with pytest.raises(Refusal, match=r"the vllm engine does not support .* leave --engine to auto, or name hf"):
        run(tmp_path, ROWS[:2], Loader(), model=str(tiny_summarizer), device="cpu", engine="vllm")


def test_what_the_generation_config_asks_for_in_vain_is_said_once(
    tmp_path: Path, tiny_summarizer: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = Path(shutil.copytree(tiny_summarizer, tmp_path / "model"))
    path = model / "generation_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "num_beams": 4, "length_penalty": 2.0}))
    run(tmp_path, ROWS[:2], Loader(), model=str(model), device="cpu", sampling=SamplingParams(max_new_tokens=1))
    assert capsys.readouterr().err.count("num_beams 4, length_penalty 2.0, which changes nothing") == 1


def test_what_the_job_asked_for_stays_in_its_file(tmp_path: Path) -> None:
    run(tmp_path, ROWS[:2])
    found = json.loads((tmp_path / "runs/rows/job.json").read_text())["job"]["engine"]
    assert (found, summary(tmp_path)["engine_asked"], summary(tmp_path)["engine"]) == ("auto", "auto", "native")


def test_where_no_row_can_be_generated_no_engine_is_chosen(tmp_path: Path) -> None:
    run(tmp_path, [{"prompt": 3}])
    assert (summary(tmp_path)["engine"], summary(tmp_path)["engine_reason"]) == ("auto", "")


def test_a_run_that_was_begun_with_another_engine_goes_on(tmp_path: Path) -> None:
    run(tmp_path, ROWS[:2], engine="native")
    assert run(tmp_path, ROWS[:3]) == 0
    assert [one["engine"] for one in summary(tmp_path)["attempts"]] == ["native", "native"]


def test_ranks_that_generated_with_different_engines_are_told_apart() -> None:
    seconds = dict.fromkeys(("tokenize", "gather", "merge", "total"), 0.0)
    ranks = {0: Progress(engine="native"), 1: Progress(engine="hf"), 2: Progress(engine="native")}
    values = summarise(Job("m", ("c",)), 3, Work(1, 0, 0, 1, 0), Counts(1), ranks, seconds, 0.0)
    assert (values["engine"], values["rank_engines"]) == ("hf and native", ["native", "hf", "native"])
