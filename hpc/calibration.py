"""Calibrations: what the steps of past runs cost, kept in the user's cache for each model and kind of node."""

import json
import logging
import platform
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from hpc import atomic
from hpc.cost import StepCosts
from hpc.predict import Bounds

LOGGER = logging.getLogger(__name__)


@dataclass(frozen=True)
class Calibration:
    """What one replica of a model costs on one kind of node, with as many beside it as there were."""

    model: str
    """Revision."""
    dtype: str
    device: str
    threads: int
    ranks_on_node: int
    engine: Bounds
    load_s: float
    costs: StepCosts
    steps: int
    """Steps that were measured."""
    time: float
    """When, in seconds of the clock."""

    def __str__(self) -> str:
        """Return it in words."""
        made = time.strftime("%Y-%m-%d %H:%M", time.localtime(self.time))
        return (
            f"{self.device}, {self.dtype}, {self.threads} threads, {self.ranks_on_node} ranks on a node "
            f"({self.steps:,} steps, {made})"
        )


def save(calibration: Calibration, folder: Path) -> None:
    """Keep a calibration, in the place of one of the same kind."""
    folder.mkdir(parents=True, exist_ok=True)
    kind = (calibration.model, calibration.dtype, calibration.device, calibration.threads, calibration.ranks_on_node)
    name = "-".join(str(part) for part in kind)
    safe = "".join(char if char.isalnum() or char in "-._" else "_" for char in name)[:200]
    atomic.write(folder / f"{safe}.json", json.dumps(asdict(calibration), indent=2) + "\n")


def find(folder: Path, model: str, dtype: str) -> list[Calibration]:
    """Return the calibrations of a model, of any dtype where that is "auto", the newest first."""
    found = []
    for path in folder.glob("*.json"):
        try:
            calibration = read(path)
        except (OSError, ValueError, KeyError, TypeError) as error:
            LOGGER.debug("%s: %s", path, error)
            continue
        if calibration.model == model and dtype in ("auto", calibration.dtype):
            found.append(calibration)
    return sorted(found, key=lambda calibration: -calibration.time)


def read(path: Path) -> Calibration:
    """Read a calibration from its file."""
    values: dict[str, Any] = json.loads(path.read_text())
    costs, engine = values.pop("costs"), values.pop("engine")
    made = StepCosts(**{**costs, "knots": tuple(costs["knots"]), "at_knots": tuple(costs["at_knots"])})
    return Calibration(**values, costs=made, engine=Bounds(**engine))


def cpu() -> str:
    """Return the name of this machine's processor."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()
