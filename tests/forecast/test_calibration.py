"""Calibrations are kept by kind, and a trial's steps are not forgotten."""

import json
from pathlib import Path

import numpy as np
import pytest

from hpc.engine.bounds import Bounds, Size, Speed
from hpc.engine.steps import Measured
from hpc.forecast.calibration import Calibration, Kind, add_steps, find_calibration, read_calibration
from hpc.forecast.step_costs import StepCosts

NATIVE = ("native",)
KIND = Kind("gpt:1", "float32", "A Processor (R) @ 2 GHz", 2, 1)
TRUE = StepCosts((1, 32, 512), (0.01, 0.03, 0.2), 1e-4, 1e-7, 1e-8)
NARROW: list[Measured] = [(n, n, 0.0, 50 * n, TRUE.step(n, n, 0, 50 * n)) for n in range(1, 33)]
SHAPES = ((1, 1, 0.0, 10**6), (512, 0, 1e6, 0), (512, 0, 1e5, 0), (32, 0, 512.0, 0))
WIDE: list[Measured] = [(*shape, TRUE.step(*shape)) for shape in SHAPES]
SPEED = Speed(1e10, 1e11)


def keep(
    folder: Path, kind: Kind = KIND, run: list[Measured] = NARROW, trial: list[Measured] | None = None
) -> Calibration:
    speed = SPEED if trial else None
    return add_steps(folder, kind, Bounds(8, 512, 4096, 100), Size(1, 2.0, 3.0, 4), 1.5, run, trial or [], speed)


def test_what_was_kept_is_read(tmp_path: Path) -> None:
    made = keep(tmp_path, trial=WIDE)
    assert read_calibration(next(tmp_path.iterdir())) == made


def test_a_trial_says_what_a_run_of_like_steps_cannot(tmp_path: Path) -> None:
    keep(tmp_path, run=[], trial=WIDE)
    found = keep(tmp_path)
    assert (found.costs.pair, found.costs.kv) == pytest.approx((TRUE.pair, TRUE.kv), rel=0.05)
    assert (found.trial, found.speed, found.steps) == (tuple(WIDE), SPEED, len(NARROW) + len(WIDE))


def test_a_run_of_few_steps_alone_is_not_kept(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="3 steps have been measured; 16 are the least"):
        keep(tmp_path, run=NARROW[:3])
    assert find_calibration(tmp_path, "gpt:1", "float32", NATIVE) is None


def test_one_of_the_same_kind_takes_the_place_of_another(tmp_path: Path) -> None:
    keep(tmp_path)
    keep(tmp_path)
    assert len(list(tmp_path.iterdir())) == 1


def test_the_one_with_as_many_ranks_on_a_node_and_as_many_threads_is_found(tmp_path: Path) -> None:
    kinds = [Kind("m", "float32", "cpu", threads, ranks) for threads, ranks in ((1, 1), (1, 2), (2, 1), (2, 2))]
    for kind in kinds:
        keep(tmp_path, kind)
    found = find_calibration(tmp_path, "m", "float32", NATIVE, ranks_on_node=2, threads=1)
    assert found is not None
    assert found.kind == kinds[1]


def test_without_one_that_suits_the_newest_is_found(tmp_path: Path) -> None:
    keep(tmp_path, Kind("m", "float32", "cpu", 1, 4))
    newest = keep(tmp_path, Kind("m", "float32", "cpu", 1, 8))
    assert find_calibration(tmp_path, "m", "auto", NATIVE, ranks_on_node=2) == newest


@pytest.mark.parametrize(("model", "dtype"), [("other", "float32"), ("gpt:1", "bfloat16")])
def test_another_model_or_dtype_is_not_found(tmp_path: Path, model: str, dtype: str) -> None:
    keep(tmp_path)
    assert find_calibration(tmp_path, model, dtype, NATIVE) is None


def test_one_of_as_many_devices_of_a_rank_alone_is_found(tmp_path: Path) -> None:
    for devices in (1, 2):
        keep(tmp_path, Kind("m", "float32", "gpu", 1, 1, devices=devices))
    for devices in (1, 2):
        found = find_calibration(tmp_path, "m", "float32", NATIVE, devices=devices)
        assert found is not None
        assert found.kind.devices == devices
    assert find_calibration(tmp_path, "m", "float32", NATIVE, devices=4) is None


def test_on_how_many_devices_a_model_was_measured_is_said() -> None:
    assert str(Kind("m", "float32", "gpu", 1, 1, devices=2)).startswith("native on 2 × gpu, ")


def test_a_damaged_file_is_passed_over(tmp_path: Path) -> None:
    keep(tmp_path)
    (tmp_path / "damaged.json").write_text('{"kind": 3}')
    assert find_calibration(tmp_path, "gpt:1", "float32", NATIVE) is not None


def test_times_of_a_trial_are_fitted_exactly_where_they_are_exact(tmp_path: Path) -> None:
    found = keep(tmp_path, trial=WIDE)
    expected = np.array([TRUE.step(n, n, 0, 50 * n) for n in (1, 16, 32)])
    assert np.array([found.costs.step(n, n, 0, 50 * n) for n in (1, 16, 32)]) == pytest.approx(expected, rel=0.05)


@pytest.mark.parametrize(("step_tokens", "kept"), [(512, True), (8192, False)])
def test_what_an_earlier_version_measured_on_a_gpu_is_dropped(tmp_path: Path, step_tokens: int, kept: bool) -> None:
    add_steps(tmp_path, KIND, Bounds(8, step_tokens, 4096, 100), Size(1, 2.0, 3.0, 4), 1.5, NARROW)
    [path] = tmp_path.iterdir()
    values = json.loads(path.read_text())
    del values["version"]
    path.write_text(json.dumps(values))
    assert (find_calibration(tmp_path, KIND.model, KIND.dtype, NATIVE) is not None) == kept


def test_what_is_measured_on_a_gpu_is_kept(tmp_path: Path) -> None:
    add_steps(tmp_path, KIND, Bounds(8, 8192, 4096, 100), Size(1, 2.0, 3.0, 4), 1.5, NARROW)
    assert find_calibration(tmp_path, KIND.model, KIND.dtype, NATIVE) is not None
