"""Calibrating, as far as it needs no engine that tells of its steps."""

import math
from dataclasses import replace
from pathlib import Path

import pytest

from hpc.engine.bounds import Bounds, Size
from hpc.engine.steps import Measured
from hpc.exit import Refusal
from hpc.forecast.calibrate import CPU_S, calibrate
from hpc.job import Job
from hpc.model.loader import Replica
from hpc.mpi.binding import Binding
from hpc.mpi.comm import Single
from tests.fakes import EchoLoader

JOB = Job("echo", ("-",))


@pytest.mark.parametrize("seconds", [0.0, -1.0, math.inf, math.nan])
def test_seconds_that_no_trial_can_take_are_refused(seconds: float) -> None:
    with pytest.raises(Refusal, match=f"--seconds {seconds}.*more than 0"):
        calibrate(JOB, Single(), EchoLoader(), seconds)


def test_an_engine_that_keeps_no_model_on_several_devices_is_refused() -> None:
    job = replace(JOB, device="cpu", replica_cpus=2, engine="native")
    with pytest.raises(Refusal, match=r"--replica-cpus is 2.*native.*--engine vllm"):
        calibrate(job, Single(), EchoLoader())


class Begun(Exception):
    """A trial begins."""


class TrialLoader(EchoLoader):
    """A loader whose engine has bounds, and whose trial tells for how long it is asked."""

    def load(self, job: Job, path: Path, place: Binding) -> Replica:
        replica = super().load(job, path, place)
        replica.engine.bounds = Bounds(8, 64, 1024, 100)
        return replace(replica, size=Size(1, 1.0, 1.0, 1))

    def trial(self, replica: Replica, seconds: float) -> tuple[list[Measured], None]:
        raise Begun(seconds)


@pytest.mark.parametrize(("given", "expected"), [(0.5, 0.5), (None, CPU_S)])
def test_a_trial_takes_the_seconds_that_are_given(given: float | None, expected: float) -> None:
    with pytest.raises(Begun) as begun:
        calibrate(JOB, Single(), TrialLoader(), given)
    assert begun.value.args == (expected,)
