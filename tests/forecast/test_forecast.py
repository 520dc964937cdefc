"""A forecast needs a corpus and a calibration, and no model; it changes nothing of a run but to read its corpus."""

import io
import json
import sys
import xml.etree.ElementTree as ElementTree
from collections.abc import Callable
from contextlib import redirect_stdout
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import pytest

from hpc.cli.actions import plan
from hpc.cli.main import parse
from hpc.cli.verbs import Plan
from hpc.exit import Refusal
from hpc.forecast.estimate import Estimator, Prediction
from hpc.forecast.fit import Fit
from hpc.forecast.forecast import Advice, Forecast, forecast, predict_all
from hpc.forecast.show import advice, show
from hpc.job import Job
from hpc.model.loader import Loader
from hpc.mpi.comm import Single
from hpc.mpi.signals import Stop
from hpc.pipeline import generate
from tests.conftest import Ended, finish, own_cache, start, write_corpus

ROWS = [{"prompt": f"row {index} " * (1 + index % 5)} for index in range(40)] + [{"prompt": ""}, {"prompt": "row 0 "}]


class Place:
    """A folder with a corpus, a model and a user's cache of its own."""

    def __init__(self, folder: Path, model: Path) -> None:
        self.folder = folder
        self.corpus = write_corpus(folder / "c.jsonl", ROWS)
        self.flags = ("--model", str(model), "--corpus", str(self.corpus), "--dtype", "float32", "--device", "cpu")

    def call(self, verb: str, *flags: str, ending: bool = False) -> Ended:
        """Call a verb in this process; rows are `ending` where they end, and not at their limits."""
        runs = ("--runs", str(self.folder / "runs"), "--sampling.max-new-tokens", "24")
        runs = runs if ending else (*runs, "--sampling.ignore-eos")
        (_, command), out = parse([verb, *self.flags, *runs, *flags], None), io.StringIO()
        with pytest.MonkeyPatch.context() as patch, redirect_stdout(out):
            for name, value in own_cache(self.folder / "cache").items():
                patch.setenv(name, value)
            try:
                if isinstance(command, Plan):
                    return Ended(plan(command, Loader()), out.getvalue(), "")
                return Ended(generate(command.job, Single(), Loader(), Stop()), out.getvalue(), "")
            except Refusal as refusal:
                return Ended(2, out.getvalue(), str(refusal))


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


def test_without_a_calibration_it_counts_and_says_how_to_get_one(tmp_path: Path, tiny_model: Path) -> None:
    ended = Place(tmp_path, tiny_model).call("plan")
    assert (ended.code, "40 requests" in ended.out, "scattergen calibrate" in ended.out) == (0, True, True)


def test_rows_are_counted_as_a_run_would(found: dict[str, Any]) -> None:
    names = ("rows", "refused", "refusals", "done", "duplicates", "requests")
    assert [found[name] for name in names] == [42, 1, {"empty": 1}, 0, 1, 40]


def test_a_refused_row_says_why(found: dict[str, Any]) -> None:
    [reason] = found["reasons"]
    assert reason.startswith('c.jsonl:41: "prompt" is empty')


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
    assert place.call("run", "--name", "ending", "--limit", "36", ending=True).code == 0
    values = json.loads(place.call("plan", "--name", "ending", "--json", ending=True).out)
    assert (values["done"], values["lengths_from"]) == (37, "36 completions of this run")


def test_lengths_are_the_limits_where_nothing_else_ends_a_row(found: dict[str, Any]) -> None:
    assert found["lengths_from"] == "max_new_tokens, as --sampling.ignore-eos says"


def test_a_forecast_leaves_no_state_and_no_attempt(place: Place, found: dict[str, Any]) -> None:
    run = place.folder / "runs" / "fresh"
    assert not (run / "state").exists()
    assert not (run / "job.json").exists()
    assert list((run / "events").iterdir()) == []


def test_a_run_that_follows_reads_the_corpus_no_more(place: Place, found: dict[str, Any]) -> None:
    before = (place.folder / "runs" / "fresh" / "store.json").stat().st_mtime_ns
    assert place.call("run", "--name", "fresh").code == 0
    assert (place.folder / "runs" / "fresh" / "store.json").stat().st_mtime_ns == before


def test_a_run_says_what_it_was_expected_to_take(place: Place) -> None:
    assert place.call("run", "--name", "expected").code == 0
    run = place.folder / "runs" / "expected"
    expected = json.loads((run / "summary.json").read_text())["predicted_seconds"]
    assert expected > 0
    [load] = [
        e for e in map(json.loads, (run / "events/0001-00000.jsonl").read_text().splitlines()) if e["phase"] == "load"
    ]
    assert load["seconds"] == pytest.approx(expected, abs=1e-3)


def test_a_table_and_an_answer_are_printed(place: Place) -> None:
    ended = place.call("plan", "--name", "other", "--deadline-min", "600")
    assert "speed-up" in ended.out
    assert "Fewest within 10 h 00 min: 1 rank," in " ".join(ended.out.split())


def test_no_model_is_loaded(place: Place) -> None:
    code = "import sys; from hpc import forecast; print(sorted({'torch', 'mpi4py.MPI'} & set(sys.modules)))"
    assert finish(start(["-c", code])).out == "[]\n", sys.executable


def test_a_model_that_a_gpu_does_not_hold_is_said_to_need_more(place: Place, found: dict[str, Any]) -> None:
    as_large = f"{found['memory']['weights'] / 2**30:.9f}"
    ended = place.call("plan", "--name", "large", "--device", "auto", "--gpu-gib", as_large)
    assert "do not fit a GPU of 0.0 GiB" in ended.out
    assert "add --engine vllm --replica-gpus 2" in ended.out


def test_on_a_cpu_nothing_is_said_of_gpus(found: dict[str, Any]) -> None:
    assert found["fit"] is None


def test_a_gpu_without_memory_is_refused(place: Place) -> None:
    ended = place.call("plan", "--device", "auto", "--gpu-gib", "0")
    assert (ended.code, "--gpu-gib 0.0: it must be more than 0" in ended.err) == (2, True)


def test_the_hf_engine_is_counted_and_not_predicted(place: Place) -> None:
    ended = place.call("plan", "--name", "hf", "--engine", "hf", "--json")
    values = json.loads(ended.out)
    assert (values["requests"], values["predictions"], values["calibration"]) == (40, [], None)


def test_the_histogram_and_the_buckets_have_every_prompt_once(found: dict[str, Any]) -> None:
    assert sum(count for _, count in found["histogram"]) == sum(count for _, count in found["buckets"]) == 40


def test_the_memory_of_a_rank_is_its_weights_and_its_cache(found: dict[str, Any]) -> None:
    memory = found["memory"]
    assert 0 < memory["weights"] < memory["weights"] + memory["cache"] < memory["all"]


def test_a_picture_of_the_prediction_is_drawn(place: Place) -> None:
    picture = place.folder / "plan.svg"
    assert place.call("plan", "--name", "drawn", "--plot", str(picture)).code == 0
    assert ElementTree.parse(picture).getroot().tag.endswith("svg")


@pytest.mark.parametrize("name", ["plan.docx", "missing/plan.svg"])
def test_a_picture_that_cannot_be_drawn_is_refused(place: Place, name: str) -> None:
    ended = place.call("plan", "--name", "drawn", "--plot", str(place.folder / name))
    assert (ended.code, "--plot" in ended.err) == (2, True)


def test_a_file_that_is_no_calibration_is_refused(place: Place) -> None:
    ended = place.call("plan", "--name", "drawn", "--calibration", str(place.corpus))
    assert (ended.code, "is no calibration" in ended.err) == (2, True)


def prediction(ranks: int, seconds: float) -> Prediction:
    return Prediction(ranks, seconds, seconds, seconds, ranks * seconds / 3600, 1.0, 1.0, 0.0)


class Law:
    """An estimator that knows a law of the time over ranks."""

    max_ranks = 1000

    def __init__(self, law: Callable[[int], float]) -> None:
        self._law = law

    def predict(self, ranks: int) -> Prediction:
        return prediction(ranks, self._law(ranks))


def advised(law: Callable[[int], float], deadline_min: float | None = None) -> Advice:
    return predict_all(cast("Estimator", Law(law)), 10.0, deadline_min)[1]


def test_the_fewest_ranks_that_are_as_fast_as_any_are_advised() -> None:
    # From 50 ranks on there is one request for each; 10 + 1000/50 is 30 s, and 2 % more need 49.
    assert advised(lambda ranks: 10 + max(20.0, 1000 / ranks)).fastest.ranks == 49


def test_a_deadline_is_met_with_the_fewest_ranks_that_can() -> None:
    found = advised(lambda ranks: 10 + 1000 / ranks, deadline_min=1).cheapest
    assert found is not None
    assert found.ranks == 20


def test_a_deadline_that_no_number_of_ranks_meets_has_no_cheapest() -> None:
    assert advised(lambda ranks: 10 + 1000 / ranks, deadline_min=0.1).cheapest is None


def test_it_says_from_when_on_loading_takes_longer_than_generating() -> None:
    assert advised(lambda ranks: 10 + 1000 / ranks).loading_from == 100


def test_the_time_to_ask_for_is_a_quarter_and_five_minutes_more() -> None:
    assert advised(lambda ranks: 2400.0).time_min == 55


def forecast_of(requests: int, advised: Advice | None) -> Forecast:
    counted = (10, 0, {}, [], 0, 0, requests, 100, 0, 20, 100, [(16, 10)], "native", "", [(16, 10)], 0.0)
    return Forecast(*counted, "limits", "here", 1.0, None, [], advised)


def test_the_answer_names_ranks_and_time() -> None:
    found = forecast_of(10, Advice(prediction(8, 100.0), 16, prediction(4, 200.0), 9))
    assert advice(found, 5.0).endswith("Fewest within 5 min 00 s: 4 ranks, 3 min 20 s. Ask for 4 ranks and "
                                       "--slurm.time-min 9.")  # fmt: skip


def test_the_answer_says_how_many_gpus_a_rank_has() -> None:
    found = replace(forecast_of(10, Advice(prediction(8, 100.0), None, None, 9)), fit=Fit(1, 1, 4, 1))
    assert advice(found, None).endswith("Ask for 8 ranks of 4 GPUs each and --slurm.time-min 9.")


def test_an_engine_that_cannot_be_measured_has_no_estimate_and_no_calibration_is_asked_for() -> None:
    said = {engine: advice(replace(forecast_of(10, None), engine=engine), None) for engine in ("hf", "native")}
    assert said["hf"].startswith("No time is predicted: the hf engine generates with this model")
    assert ["scattergen calibrate" in said[engine] for engine in said] == [False, True]


def test_an_encoder_decoder_is_planned_for_without_an_estimate(
    tmp_path: Path, tiny_summarizer: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    corpus = write_corpus(tmp_path / "rows.jsonl", [{"prompt": "a" * count} for count in (1, 20, 50)])
    found = forecast(Job(str(tiny_summarizer), (str(corpus),), runs=str(tmp_path), device="cpu"), Loader())
    assert (found.engine, found.predictions, found.requests) == ("hf", [], 3)
    assert (found.prompt_tokens, found.longest_prompt) == (74, 51)  # with the token that ends each source


def test_a_deadline_that_nothing_meets_is_said() -> None:
    assert advice(forecast_of(10, Advice(prediction(8, 100.0), None, None, 9)), 0.5).endswith(
        "No number of ranks meets 30 s."
    )


def test_a_run_with_nothing_left_needs_no_ranks() -> None:
    assert advice(forecast_of(0, None), None) == "Nothing is left to generate."


def test_nothing_is_printed_of_the_prompts_of_a_run_with_nothing_left(capsys: pytest.CaptureFixture[str]) -> None:
    show(forecast_of(0, None))
    lines = capsys.readouterr().out.splitlines()
    assert [lines[2], *lines[3:]] == ["lengths of the outputs: limits", "Nothing is left to generate."]


def test_the_lengths_of_prompts_and_the_kinds_of_refusals_are_named(capsys: pytest.CaptureFixture[str]) -> None:
    show(replace(forecast_of(10, None), refused=3, refusals={"empty": 2, "id": 1}))
    printed = capsys.readouterr().out
    assert ("3 refused (2 empty, 1 id); " in printed, "lengths of the prompts:\n  up to" in printed) == (True, True)


def test_what_generates_for_a_model_that_native_does_not_support_is_planned_for(
    capsys: pytest.CaptureFixture[str],
) -> None:
    reason = "the native engine does not support this model: it is another; the hf engine generates"
    show(replace(forecast_of(10, None), engine="hf", engine_reason=reason, calibration=None))
    printed = capsys.readouterr().out
    assert reason in printed
    assert "padding: 0.0%, to 16 tokens" in printed
