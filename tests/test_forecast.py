"""A forecast needs a corpus and a calibration, and no model; it changes nothing of a run but to read its corpus."""

import json
import sys
from pathlib import Path
from typing import Any

import pytest

from hpc.forecast import Forecast, Prediction, advice
from tests.conftest import Ended, finish, scattergen, start, write_corpus

ROWS = [{"prompt": f"row {index} " * (1 + index % 5)} for index in range(40)] + [{"prompt": ""}, {"prompt": "row 0 "}]


class Place:
    """A folder with a corpus, a model and a user's cache of its own."""

    def __init__(self, folder: Path, model: Path) -> None:
        self.folder = folder
        self.corpus = write_corpus(folder / "c.jsonl", ROWS)
        self.flags = ("--model", str(model), "--corpus", str(self.corpus), "--dtype", "float32", "--device", "cpu")

    def call(self, verb: str, *flags: str) -> Ended:
        runs = ("--runs", str(self.folder / "runs"), "--sampling.max-new-tokens", "24", "--sampling.ignore-eos")
        return scattergen(verb, *self.flags, *runs, *flags, XDG_CACHE_HOME=str(self.folder / "cache"))


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory, tiny_model: Path) -> Place:
    """Where a pilot has been run, named "pilot"."""
    made = Place(tmp_path_factory.mktemp("forecast"), tiny_model)
    assert made.call("run", "--name", "pilot", "--limit", "36").code == 0
    return made


@pytest.fixture(scope="module")
def found(place: Place) -> dict[str, Any]:
    ended = place.call("plan", "--name", "fresh", "--json")
    assert ended.code == 0, ended.err
    values: dict[str, Any] = json.loads(ended.out)
    return values


def test_without_a_calibration_it_says_how_to_get_one(tmp_path: Path, tiny_model: Path) -> None:
    ended = Place(tmp_path, tiny_model).call("plan")
    assert (ended.code, "--limit 64" in ended.err) == (2, True)


def test_rows_are_counted_as_a_run_would(found: dict[str, Any]) -> None:
    names = ("rows", "refused", "refusals", "done", "duplicates", "requests")
    assert [found[name] for name in names] == [42, 1, {"empty": 1}, 0, 1, 40]


def test_tokens_are_counted(found: dict[str, Any]) -> None:
    prompts = [len(row["prompt"]) for row in ROWS[:40]]
    assert (found["prompt_tokens"], found["longest_prompt"]) == (sum(prompts), max(prompts))
    assert found["most_new_tokens"] == 40 * 24


def test_it_predicts_for_powers_of_two_ranks(found: dict[str, Any]) -> None:
    ranks = [prediction["ranks"] for prediction in found["predictions"]]
    assert ranks == [2**index for index in range(len(ranks))]


def test_the_first_prediction_is_the_measure_of_the_others(found: dict[str, Any]) -> None:
    alone = found["predictions"][0]
    assert (alone["speedup"], alone["efficiency"], alone["idle"]) == (1.0, 1.0, 0.0)
    for prediction in found["predictions"]:
        assert prediction["speedup"] == pytest.approx(alone["seconds"] / prediction["seconds"])


def test_lengths_are_drawn_from_the_completions_that_there_are(place: Place) -> None:
    ended = place.call("plan", "--name", "pilot", "--json")
    values = json.loads(ended.out)
    assert (values["done"], values["lengths_from"]) == (37, "36 completions of this run")


def test_a_forecast_leaves_no_state_and_no_attempt(place: Place, found: dict[str, Any]) -> None:
    run = place.folder / "runs" / "fresh"
    assert not (run / "state").exists()
    assert not (run / "job.json").exists()
    assert list((run / "events").iterdir()) == []


def test_a_run_that_follows_reads_the_corpus_no_more(place: Place, found: dict[str, Any]) -> None:
    before = (place.folder / "runs" / "fresh" / "store.json").stat().st_mtime_ns
    assert place.call("run", "--name", "fresh").code == 0
    assert (place.folder / "runs" / "fresh" / "store.json").stat().st_mtime_ns == before


def test_a_table_and_an_answer_are_printed(place: Place) -> None:
    ended = place.call("plan", "--name", "other", "--deadline-min", "600")
    assert "speed-up" in ended.out
    assert "Cheapest within 10 h 00 min: 1 ranks" in " ".join(ended.out.split())


def test_no_model_is_loaded(place: Place) -> None:
    code = "import sys; from hpc import forecast; print(sorted({'torch', 'mpi4py.MPI'} & set(sys.modules)))"
    assert finish(start(["-c", code])).out == "[]\n", sys.executable


def test_the_other_engine_is_refused(place: Place) -> None:
    ended = place.call("plan", "--engine", "hf")
    assert (ended.code, "--engine native" in ended.err) == (2, True)


def forecast_of(*seconds: float) -> Forecast:
    predictions = [
        Prediction(2**i, s, s, s, 2**i * s / 3600, seconds[0] / s, seconds[0] / s / 2**i, 0.0)
        for i, s in enumerate(seconds)
    ]
    return Forecast(10, 0, {}, 0, 0, 10, 100, 0, 20, 100, "limits", "here", 1.0, predictions)


def test_the_fastest_number_of_ranks_is_advised() -> None:
    assert "Ask for 2 ranks and --slurm.time-min 6." in advice(forecast_of(100, 60, 70), None)


def test_the_cheapest_that_meets_a_deadline_is_advised() -> None:
    assert "Ask for 1 ranks and --slurm.time-min 7." in advice(forecast_of(100, 60, 70), 2.0)


def test_a_deadline_that_nothing_meets_is_said() -> None:
    assert advice(forecast_of(100, 60, 70), 0.5).endswith("No number of ranks meets 30 s.")


def test_a_run_with_nothing_left_needs_no_ranks() -> None:
    done = Forecast(10, 0, {}, 10, 0, 0, 0, 0, 0, 0, "limits", "here", 1.0, [])
    assert advice(done, None) == "Nothing is left to generate."
