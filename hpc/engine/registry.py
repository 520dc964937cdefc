"""List the engines with their traits and modules, and choose one for a job. Imports an engine when it is first needed.

To add one, write a module with the functions of `Maker` and a line in `ENGINES`. Code outside of this package asks for
traits, and never for an engine by name.
"""

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, cast

from hpc.engine.bounds import Size, Speed
from hpc.engine.decoder import DecoderRules
from hpc.engine.interface import Engine
from hpc.engine.steps import Measured
from hpc.exit import Refusal
from hpc.job import Job
from hpc.mpi.binding import Binding
from hpc.trim import Decode

if TYPE_CHECKING:
    import torch

AUTO = "auto"
"""The value of --engine that leaves the choice to `choose`."""


class Checkpoint(Protocol):
    """A model directory with the job and the placement of a rank: the input of `Maker`.

    Properties are computed when they are first read.
    """

    job: Job
    path: Path
    place: Binding

    @property
    def cuda(self) -> bool:
        """Whether the job is for a GPU, even if this process sees none, as in a plan on a login node."""

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
        """Maximum tokens of prompt and completion together; None if the model sets no limit."""

    @property
    def decoder_rules(self) -> DecoderRules | None:
        """The rules of an encoder-decoder's decoder; None for a causal language model."""

    @property
    def decode(self) -> Decode:
        """The function that turns tokens into text."""

    @property
    def kernels(self) -> Path:
        """The folder of compiled kernels."""

    def load(self) -> Any:
        """Load the model onto the device, with transformers."""

    def size(self, model: Any = None) -> Size | None:
        """Return the size of a loaded model, or the size that it will have; None if that is unknown."""


@dataclass(frozen=True)
class Loaded:
    """An engine that is ready to generate."""

    engine: Engine
    name: str
    """Name of the engine, which may be the fallback of another."""
    size: Size | None
    """None if unknown."""
    spent: tuple[tuple[str, float, float], ...] = ()
    """Time that was no loading: a kind of `hpc.report.timeline`, begin and end in seconds since the epoch."""


class Maker(Protocol):
    """The module of an engine."""

    def supports(self, checkpoint: Checkpoint) -> str | None:
        """Return why the engine cannot generate with a model, as a clause; None if it can.

        Loads no weights. The last engine, which generates with all models, is not asked.
        """

    def check(self, checkpoint: Checkpoint) -> str | None:
        """Return why a job that names this engine is refused, or None. Only `optional` engines are asked."""

    def load(self, checkpoint: Checkpoint) -> Loaded:
        """Load the model and make the engine."""

    def trial(self, engine: Engine, seconds: float) -> tuple[list[Measured], Speed | None]:
        """Measure steps and the device for about `seconds`. Only engines that report steps are asked."""


@dataclass(frozen=True)
class EngineKind:
    """The traits of an engine, and its module."""

    name: str
    """The value of `--engine`."""
    module: str
    """Import path of the `Maker`."""
    pads: bool = False
    """It computes batches of like length, padded to the longest; others take the most expensive request first."""
    shares_prefixes: bool = True
    """It computes the common prefix of prompts once."""
    max_tail: float = 1.0
    """Maximum share of the work that rank 0 keeps back to hand out on demand."""
    reports_steps: bool = True
    """It logs its steps and has `Bounds`, which calibrations and predictions need."""
    simulated: bool = True
    """The simulator of a forecast admits requests as this engine does; otherwise the forecast says so."""
    encoder_decoder: bool = False
    """It also generates with models that have an encoder and a decoder."""
    own_context: bool = False
    """--vllm.max-model-len limits its sequences."""
    optional: bool = False
    """It may be missing, or not fit the driver: a job that names it is checked early, and by `doctor`."""
    shards: bool = False
    """It can keep a model on several devices of a node (--replica-gpus)."""
    auto_on: tuple[str, ...] = ("cpu", "cuda")
    """Devices on which `auto` may choose it."""
    fallback: str = ""
    """The engine that replaces it, if a job names it, for models that it does not support; empty: none does."""

    @property
    def maker(self) -> Maker:
        """The module of the engine; the first access imports its libraries."""
        return cast("Maker", importlib.import_module(self.module))


_KINDS = (
    EngineKind(
        "vllm", "hpc.engine.vllm.load", simulated=False, own_context=True, optional=True, shards=True, auto_on=("cuda",)
    ),
    EngineKind("native", "hpc.engine.native.load", fallback="hf"),
    EngineKind(
        "hf",
        "hpc.engine.hf",
        pads=True,
        shares_prefixes=False,
        max_tail=0.15,
        reports_steps=False,
        encoder_decoder=True,
    ),
)  # max_tail of hf: its batches want many rows of one bucket
ENGINES = {kind.name: kind for kind in _KINDS}
"""Engines by name, in the order in which `auto` asks them; the last one serves every model."""


@dataclass(frozen=True)
class Choice:
    """The engine that was chosen, and why."""

    engine: str
    reason: str = ""
    """A sentence for the log; empty if the job named this engine."""
    fell_back: bool = False
    """Whether it is the last resort, because no other engine supports the model."""


def candidates(asked: str) -> list[EngineKind]:
    """Return the engines that may generate for a value of --engine, the first choice first."""
    if asked == AUTO:
        return list(ENGINES.values())
    kind = ENGINES[asked]
    return [kind, *([ENGINES[kind.fallback]] if kind.fallback else [])]


def traits(engine: str) -> EngineKind:
    """Return the traits of an engine; those of the first choice for `auto`, which remains if nothing is generated."""
    return candidates(engine)[0]


def check_devices(job: Job) -> None:
    """Raise `Refusal` if a job wants a model on several devices from engines that use one."""
    if job.replica_devices > 1 and not any(kind.shards for kind in candidates(job.engine)):
        flag = "--replica-gpus" if job.replica_gpus > 1 else "--replica-cpus"
        able = " or ".join(f"--engine {name}" for name, kind in ENGINES.items() if kind.shards)
        raise Refusal(
            f"{flag} is {job.replica_devices}, and the {job.engine} engine keeps a model on one device; take {able}"
        )


def choose(asked: str, device: str, why_not: Callable[[EngineKind], str | None], devices: int = 1) -> Choice:
    """Return the engine for a type of device: the first candidate without an objection.

    `why_not` returns the objection to an engine (`Maker.supports`). Candidates are asked in order, until one has none;
    the last is not asked. With several `devices` only the engine that `shards` is allowed; its objection raises
    `Refusal`.
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


def no_encoder(kind: EngineKind, config: Any) -> str | None:
    """Return why an engine cannot generate with an encoder-decoder; None if it can, or the model is no such."""
    if kind.encoder_decoder or not config.is_encoder_decoder:
        return None
    return f"the {kind.name} engine does not support models with an encoder and a decoder ({config.model_type})"


def measurable(asked: str) -> tuple[str, ...]:
    """Return the names of the engines that may generate for a value of --engine and report their steps."""
    return tuple(kind.name for kind in candidates(asked) if kind.reports_steps)


def asked_context(job: Job) -> int | None:
    """Return the maximum tokens of a sequence if the job sets one for an engine that may generate.

    The engine need not be the chosen one: rows are refused before the engine is chosen.
    """
    return job.vllm.max_model_len if any(kind.own_context for kind in candidates(job.engine)) else None
