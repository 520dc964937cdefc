"""Store and find calibrations: step costs for each model and kind of node, in the user's cache."""

import json
import logging
import re
import time
from collections.abc import Sequence
from dataclasses import asdict, astuple, dataclass
from pathlib import Path
from typing import Any

from hpc.engine.bounds import CPU_STEP_TOKENS, Bounds, Size, Speed
from hpc.engine.steps import Measured
from hpc.forecast.step_costs import StepCosts, fit
from hpc.rundir import atomic

LOGGER = logging.getLogger(__name__)


MIN_STEPS = 16
"""Steps of a run that a fit needs, since they are much alike. A trial may have fewer, of all shapes."""


VERSION = 1
"""Version of calibrations. Version 0 charged each step of a GPU with the time of the step before."""


@dataclass(frozen=True)
class Kind:
    """The model, device, ranks and engine that a calibration is for."""

    model: str
    """Revision."""
    dtype: str
    device: str
    threads: int
    ranks_on_node: int
    engine: str = "native"
    """Older files do not have it: there was no other engine."""
    devices: int = 1
    """Number of devices on which each rank keeps the model."""

    def __str__(self) -> str:
        """Return it in words."""
        ranks = f"{self.ranks_on_node} rank{'s' * (self.ranks_on_node != 1)} on a node"
        device = self.device if self.devices == 1 else f"{self.devices} × {self.device}"
        return f"{self.engine} on {device}, {self.dtype}, {self.threads} thread{'s' * (self.threads != 1)}, {ranks}"


@dataclass(frozen=True)
class Calibration:
    """The step costs of one replica on one kind of node, measured with all ranks of the node at work."""

    kind: Kind
    engine: Bounds
    size: Size
    load_s: float
    costs: StepCosts
    steps: int
    """Steps that were measured."""
    time: float
    """When it was made, in seconds of the clock."""
    trial: tuple[Measured, ...] = ()
    """Steps of a trial, which are of all shapes; those of a run are of few."""
    speed: Speed | None = None
    """Speed of the device, from the trial."""
    version: int = VERSION

    def __str__(self) -> str:
        """Return it in words."""
        made = time.strftime("%Y-%m-%d %H:%M", time.localtime(self.time))
        return f"{self.kind} ({self.steps:,} steps, {made}{'' if self.trial else ', from runs, not from `calibrate`'})"


def add_steps(
    folder: Path,
    kind: Kind,
    engine: Bounds,
    size: Size,
    load_s: float,
    run: Sequence[Measured] = (),
    trial: Sequence[Measured] = (),
    speed: Speed | None = None,
) -> Calibration:
    """Fit costs to the steps of a run or of a trial, and replace the calibration of that kind.

    The steps of an earlier trial are fitted together with those of a run. Raises `ValueError` for too few steps.
    """
    path = _path(folder, kind)
    try:
        earlier = read_calibration(path)
        trial, speed = trial or earlier.trial, speed or earlier.speed
    except (OSError, ValueError):
        pass  # there is none, or it is of another version
    samples = [*run, *trial]
    costs = fit(samples, len(trial) or MIN_STEPS)
    made = Calibration(kind, engine, size, load_s, costs, len(samples), time.time(), tuple(trial), speed)
    folder.mkdir(parents=True, exist_ok=True)
    atomic.write(path, json.dumps(asdict(made)) + "\n")
    return made


def find_calibration(
    folder: Path,
    model: str,
    dtype: str,
    engines: Sequence[str],
    ranks_on_node: int = 0,
    threads: int = 0,
    devices: int = 1,
) -> Calibration | None:
    """Return the calibration of a model and one of the engines that suits best: ranks on a node, threads, the newest.

    Only one for as many `devices` of a rank. With the dtype "auto" any dtype will do. None if there is no calibration.
    """
    found = []
    for path in folder.glob("*.json"):
        try:
            calibration = read_calibration(path)
        except (OSError, ValueError) as error:
            LOGGER.debug("%s", error)
            continue
        kind = calibration.kind
        same = kind.model == model and kind.engine in engines and kind.devices == devices
        if same and dtype in ("auto", kind.dtype):
            fits = ranks_on_node == kind.ranks_on_node, threads == kind.threads
            found.append((fits, calibration.time, calibration))
    return max(found, key=lambda entry: entry[:2])[2] if found else None


def read_calibration(path: Path) -> Calibration:
    """Read a calibration from its file; raise `ValueError` if it holds none."""
    try:
        values: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        if values.setdefault("version", 0) < VERSION and values["engine"]["step_tokens"] > CPU_STEP_TOKENS:
            raise ValueError("times of a GPU, of which each is another step's")
        costs, speed = values["costs"], values["speed"]
        return Calibration(
            **{
                **values,
                "kind": Kind(**values["kind"]),
                "engine": Bounds(**values["engine"]),
                "size": Size(**values["size"]),
                "costs": StepCosts(**{**costs, "knots": tuple(costs["knots"]), "at_knots": tuple(costs["at_knots"])}),
                "trial": tuple(tuple(sample) for sample in values["trial"]),
                "speed": Speed(**speed) if speed else None,
            }
        )
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path} is no calibration: {error!r}; `scattergen calibrate` makes one") from error


def _path(folder: Path, kind: Kind) -> Path:
    parts = astuple(kind)[: None if kind.devices > 1 else -1]  # as such files were called before
    name = "-".join(map(str, parts))
    return folder / f"{re.sub(r'[^A-Za-z0-9._-]', '_', name)[:200]}.json"
