"""Calibrating: all ranks of a node measure at once, and what they found is kept for plans."""

import functools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import ROOT, Ended, finish, own_cache, scattergen, start, write_corpus


def calibrate(cache: Path, model: Path, ranks: int = 0, *flags: str) -> Ended:
    given = ("--model", str(model), "--dtype", "float32", "--device", "cpu", "--seconds", "0.5", *flags)
    return scattergen("calibrate", *given, ranks=ranks, **own_cache(cache))


def kept(cache: Path) -> list[dict[str, Any]]:
    return [json.loads(path.read_text()) for path in sorted((cache / "scattergen/calibrations").glob("*.json"))]


@pytest.fixture(scope="module")
def calibrated(tmp_path_factory: pytest.TempPathFactory, tiny_model: Path) -> Callable[[int], tuple[Path, Ended]]:
    """A user's cache after so many ranks have measured, and what they said."""

    @functools.cache
    def launch(ranks: int) -> tuple[Path, Ended]:
        cache = tmp_path_factory.mktemp("cache")
        return cache, calibrate(cache, tiny_model, ranks)

    return launch


@pytest.mark.parametrize("ranks", [pytest.param(0, marks=pytest.mark.slow), 2])
def test_ranks_that_measured_together_are_kept_as_such(
    calibrated: Callable[[int], tuple[Path, Ended]], ranks: int
) -> None:
    cache, ended = calibrated(ranks)
    assert ended.code == 0, ended.err
    [found] = kept(cache)
    assert (found["kind"]["ranks_on_node"], found["kind"]["threads"]) == (max(1, ranks), 1)
    assert found["steps"] == len(found["trial"]) > 16
    assert found["speed"]["bytes_per_s"] > 0


def test_what_was_found_is_printed_once(calibrated: Callable[[int], tuple[Path, Ended]]) -> None:
    assert calibrated(2)[1].out.count("prefill, 512 tokens behind 0") == 1


def test_a_plan_follows_without_a_pilot(
    calibrated: Callable[[int], tuple[Path, Ended]], tmp_path: Path, tiny_model: Path
) -> None:
    corpus = write_corpus(tmp_path / "c.jsonl", [{"prompt": f"row {index}"} for index in range(50)])
    flags = ("--model", str(tiny_model), "--corpus", str(corpus), "--runs", str(tmp_path / "runs"), "--json")
    ended = scattergen("plan", *flags, "--ranks-on-node", "2", **own_cache(calibrated(2)[0]))
    assert len(json.loads(ended.out)["predictions"]) > 1


@pytest.mark.slow
def test_an_engine_whose_steps_are_not_seen_is_refused_on_all_ranks(tmp_path: Path, tiny_model: Path) -> None:
    ended = calibrate(tmp_path, tiny_model, 2, "--engine", "hf")
    assert (ended.code, "cannot be measured" in ended.err, kept(tmp_path)) == (2, True, [])


def test_a_model_that_is_not_here_is_refused_on_all_ranks(tmp_path: Path) -> None:
    ended = calibrate(tmp_path, tmp_path / "missing", 2)
    assert (ended.code, "missing" in ended.err) == (2, True)


def test_the_echo_engine_is_refused(tmp_path: Path) -> None:
    ended = finish(start([str(ROOT / "tests/echo_job.py"), "calibrate", "--model", "echo"], 2))
    assert (ended.code, "cannot be measured" in ended.err) == (2, True)
