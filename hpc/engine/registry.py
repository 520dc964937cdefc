"""The engines: what each is like, who makes it, and which one a job gets. Imports none before it is needed.

To add one, write a module with the functions of `Maker` and a line in `ENGINES`. Nobody outside of this package asks
for an engine by name: whoever treats one differently asks for a trait.
"""

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, cast

from hpc.engine.bounds import Size, Speed
from hpc.engine.interface import Engine
from hpc.engine.steps import Measured
from hpc.exit import Refusal
from hpc.job import Job
from hpc.mpi.binding import Binding
from hpc.trim import Decode

if TYPE_CHECKING:
    import torch

AUTO = "auto"
"""What a job asks for that leaves the engine to `choose`."""


class Checkpoint(Protocol):
    """A model directory, the job, and the place of a rank: what an engine is chosen, and made, for.

    Each property costs what it needs, the first time that it is asked for.
    """

    job: Job
    path: Path
    place: Binding

    @property
    def cuda(self) -> bool:
        """Whether it is for a GPU, which this process need not see: a plan may be made elsewhere."""

    @property
    def device(self) -> "torch.device":
        """The device of the rank."""

    @property
    def config(self) -> Any:
        """The model's configuration, as transformers reads it."""

    @property
    def eos_token_ids(self) -> tuple[int, ...]:
        """The end-of-sequence tokens."""

    @property
    def context_tokens(self) -> int | None:
        """Most tokens of prompt and completion together; None where the model sets no limit."""

    @property
    def decode(self) -> Decode:
        """What makes text of tokens."""

    @property
    def kernels(self) -> Path:
        """The folder of compiled kernels."""

    def load(self) -> Any:
        """Load the model onto the device, with transformers."""

    def size(self, model: Any = None) -> Size | None:
        """Return what a loaded model holds; of none, what it will hold, and None where that cannot be told."""


@dataclass(frozen=True)
class Loaded:
    """An engine that is ready to generate."""

    engine: Engine
    name: str
    """Of the engine that it became, which may be another's fallback."""
    size: Size | None
    """None where it is not known."""
    spent: tuple[tuple[str, float, float], ...] = ()
    """What the time went to that is not loading: a kind of `hpc.report.timeline`, beginning and end by the clock, s."""


class Maker(Protocol):
    """The module of an engine."""

    def supports(self, checkpoint: Checkpoint) -> str | None:
        """Return why the engine cannot generate with a model, as a whole clause; None if it can.

        Told without loading weights. The engine that generates with all models is not asked.
        """

    def check(self, checkpoint: Checkpoint) -> str | None:
        """Return why a job that names this engine is refused. Asked of the `optional` engines alone."""

    def load(self, checkpoint: Checkpoint) -> Loaded:
        """Load the model and make the engine."""

    def trial(self, engine: Engine, seconds: float) -> tuple[list[Measured], Speed | None]:
        """Measure steps, and the device, for about so long. Asked of engines that report steps alone."""


@dataclass(frozen=True)
class EngineKind:
    """The traits of an engine, and where it is made."""

    name: str
    """Its value of `--engine`."""
    module: str
    """The `Maker`."""
    pads: bool = False
    """It computes batches of like length, padded to the longest; the others take what costs most first."""
    shares_prefixes: bool = True
    """What prompts have in common at their beginning is computed once."""
    max_tail: float = 1.0
    """Largest share of the work that rank 0 may keep back for it."""
    reports_steps: bool = True
    """It tells of its steps and has `Bounds`: calibrations and predictions are made of these."""
    simulated: bool = True
    """A forecast admits requests as it does; else its predictions say that they assume so."""
    own_context: bool = False
    """--vllm.max-model-len says how long its sequences may get."""
    optional: bool = False
    """It has to be installed, and may not fit the driver: a job that names it is checked early, and by `doctor`."""
    shards: bool = False
    """It keeps a model on several devices of a node: --replica-gpus."""
    auto_on: tuple[str, ...] = ("cpu", "cuda")
    """Devices on which `auto` may choose it."""
    fallback: str = ""
    """The engine of the models that it does not support, where it was asked for by name; empty: there is none."""

    @property
    def maker(self) -> Maker:
        """The module that makes it; the first time, its libraries are imported."""
        return cast("Maker", importlib.import_module(self.module))


_KINDS = (
    EngineKind(
        "vllm", "hpc.engine.vllm.load", simulated=False, own_context=True, optional=True, shards=True, auto_on=("cuda",)
    ),
    EngineKind("native", "hpc.engine.native.load", fallback="hf"),
    EngineKind("hf", "hpc.engine.hf", pads=True, shares_prefixes=False, max_tail=0.15, reports_steps=False),
)  # max_tail of hf: its batches want many rows of one bucket
ENGINES = {kind.name: kind for kind in _KINDS}
"""By name, in the order in which `auto` asks them; the last serves every causal language model."""


@dataclass(frozen=True)
class Choice:
    """What generates, and why."""

    engine: str
    reason: str = ""
    """A sentence for the log; empty where the job named this engine."""
    fell_back: bool = False
    """It is what serves every model, because no other does this one."""


def candidates(asked: str) -> list[EngineKind]:
    """Return the engines that may come to generate where a job asks for this one, the first choice first."""
    if asked == AUTO:
        return list(ENGINES.values())
    kind = ENGINES[asked]
    return [kind, *([ENGINES[kind.fallback]] if kind.fallback else [])]


def traits(engine: str) -> EngineKind:
    """Return the traits of an engine; of `auto`, which stays where nothing is left to generate, of its first choice."""
    return candidates(engine)[0]


def check_devices(job: Job) -> None:
    """Raise `Refusal` if no engine that may generate for a job keeps a model on as many devices as it asks for."""
    if job.replica_devices > 1 and not any(kind.shards for kind in candidates(job.engine)):
        flag = "--replica-gpus" if job.replica_gpus > 1 else "--replica-cpus"
        able = " or ".join(f"--engine {name}" for name, kind in ENGINES.items() if kind.shards)
        raise Refusal(
            f"{flag} is {job.replica_devices}, and the {job.engine} engine keeps a model on one device; take {able}"
        )


def choose(asked: str, device: str, why_not: Callable[[EngineKind], str | None], devices: int = 1) -> Choice:
    """Return the engine that is to generate on a type of device: the first candidate that nothing speaks against.

    `why_not` is `Maker.supports` of a kind. The last candidate is not asked; the later ones, only if they come to it.
    Where a model is on several devices, an engine that can do so generates, or raises `Refusal` with what speaks
    against it.
    """
    if devices > 1:
        [kind] = [kind for kind in candidates(asked) if kind.shards]
        if asked == AUTO and (lack := why_not(kind)) is not None:
            raise Refusal(f"a model on {devices} devices is for the {kind.name} engine alone, and {lack}")
        why = f"the {kind.name} engine keeps the model on {devices} devices of each rank"
        return Choice(kind.name, why if asked == AUTO else "")
    allowed = [kind for kind in candidates(asked) if asked != AUTO or device in kind.auto_on]
    against: list[str] = []
    for kind in allowed[:-1]:
        if (reason := why_not(kind)) is None:
            break
        against.append(reason)
    chosen = allowed[len(against)]
    where = "" if asked != AUTO else " on a GPU" if device == "cuda" else " on a CPU"
    generates = f"the {chosen.name} engine generates{where}"
    reason = "; ".join([*against, generates]) if against or asked == AUTO else ""
    return Choice(chosen.name, reason, bool(against) and chosen is allowed[-1])


def measurable(asked: str) -> tuple[str, ...]:
    """Return the names of the engines that may generate for a job and whose steps can have been measured."""
    return tuple(kind.name for kind in candidates(asked) if kind.reports_steps)


def asked_context(job: Job) -> int | None:
    """Return the most tokens of a sequence that the job asks for, where an engine that heeds it may generate.

    Not only where it does: which rows are refused is decided before the engine.
    """
    return job.vllm.max_model_len if any(kind.own_context for kind in candidates(job.engine)) else None
