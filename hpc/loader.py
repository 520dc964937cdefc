"""What knows models, handed to the pipeline; an echo or another engine takes its place behind the same methods."""

import logging
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hpc import calibration
from hpc.admission import REFILL, SHARE_FROM
from hpc.calibration import Size, Speed
from hpc.cost import Sample
from hpc.engine import Engine
from hpc.job import Job
from hpc.model import Model, resolve, user_cache
from hpc.place import Place
from hpc.plan import AT_ONCE, AT_ONCE_GPU
from hpc.rows import Checker, Limits
from hpc.trim import Decode

if TYPE_CHECKING:
    from hpc.engine.load import Description

LOGGER = logging.getLogger(__name__)


@dataclass(frozen=True)
class Replica:
    """An engine, with what is needed of its model to make text of tokens."""

    engine: Engine
    eos_token_ids: tuple[int, ...]
    decode: Callable[[Any], str]
    device: str = "cpu"
    """What computes, by its maker's name."""
    size: Size | None = None
    """What it holds, where that is known."""
    gpu: str = ""
    """The UUID of its GPU, as torch says it; nothing where it was known before."""


class Loader:
    """Loads models with transformers. Nothing is imported before it is needed: a finished run needs none of it."""

    def resolve(self, model: str) -> Model:
        """Find the model; see `hpc.model.resolve`."""
        return resolve(model)

    def dtype(self, job: Job) -> str:
        """Return the dtype that the job's stands for on this machine."""
        from hpc.engine import load

        return load.resolve_dtype(job.dtype, job.device)

    def checker(self, job: Job, path: Path, file_names: tuple[str, ...]) -> Checker:
        """Return what checks and tokenizes rows for the model at `path`."""
        from hpc.engine import load
        from hpc.tokenizer import Tokenizer

        load.quiet()
        described = load.describe(path)
        limits = Limits(described.vocab_size, described.context_tokens, job.truncate_prompts)
        return Checker(file_names, job.sampling, limits, Tokenizer(path))

    def load(self, job: Job, path: Path, place: Place) -> Replica:
        """Load the model onto the device of the rank at `place`."""
        from hpc.engine import load, memory
        from hpc.engine.hf import HFEngine
        from hpc.tokenizer import Tokenizer

        load.quiet()
        # Where nothing named GPUs, torch may still see some: they are the ranks' in their order.
        device = load.resolve_device(job.device, place.local_rank if place.gpu is None else place.gpu)
        tokenizer, described = Tokenizer(path), load.describe(path)
        model = load.load(path, device, job.dtype, place.threads)
        size = Size(*load.weights(model), memory.device_bytes(device, place.ranks_on_node))
        LOGGER.info("loaded %s as %s on %s, %d threads", path.name, job.dtype, device, place.threads)
        engine: Engine | None = None
        if job.engine == "native":
            engine, intact = native(job, model, described, tokenizer.decode, place)
            if not intact:  # what was tried has changed the model: it goes before another comes
                model = None
                load.free()
                model = load.load(path, device, job.dtype, place.threads)
        engine = engine or HFEngine(model, described.eos_token_ids, tokenizer.decode, job.batch_tokens)
        gpu = "" if place.gpu_name.startswith(("GPU-", "MIG-")) else load.uuid(device)
        name = load.device_name(device) if device.type == "cuda" else calibration.cpu()
        return Replica(engine, described.eos_token_ids, tokenizer.decode, name, size, gpu)

    def trial(self, replica: Replica, seconds: float) -> tuple[list[Sample], Speed]:
        """Measure steps of all shapes, and the device, for about so many seconds; for the native engine alone."""
        from hpc.engine.native import NativeEngine
        from hpc.engine.trial import bytes_per_second, flops_per_second, trial

        engine = replica.engine
        assert isinstance(engine, NativeEngine)
        speed = Speed(bytes_per_second(engine.device), flops_per_second(engine.device, engine.dtype))
        return trial(engine, seconds), speed


def native(job: Job, model: Any, described: "Description", decode: Decode, place: Place) -> tuple[Engine | None, bool]:
    """Return the native engine of a model; None, and a message, where it does not support the model.

    And whether the model is as it was, or the engine's.
    """
    from hpc.engine import compiler, memory, support
    from hpc.engine.attention import Unsupported
    from hpc.engine.run import Limits

    cuda, intact = model.device.type == "cuda", True
    try:
        support.check(model)
        intact = False
        compiled = None if cuda else compiler.load(user_cache() / "kernels")
        limits = Limits(
            max_seqs=job.max_num_seqs or (AT_ONCE_GPU if cuda else AT_ONCE),
            step_tokens=8192 if cuda else calibration.CPU_STEP_TOKENS,
            # Of a GPU 0: what is left is measured, with the engine at work.
            cache_bytes=int(job.cache_gib * 2**30) or (0 if cuda else memory.cache_bytes(place.ranks_on_node)),
            context_tokens=described.context_tokens or 32768,
            deterministic=job.deterministic,
            refill=REFILL if cuda else 0.0,
            share_from=SHARE_FROM if cuda else None,
            drafts=job.drafts,
        )
        return support.build(model, described.eos_token_ids, decode, limits, compiled), True
    except Unsupported as error:
        reason = str(error)  # as text: the exception holds the model
    LOGGER.warning("the native engine does not support this model: %s; the hf engine generates", reason)
    return None, intact
