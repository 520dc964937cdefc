"""Load a model for the native engine; fall back to the hf engine if the native one does not support it."""

import logging
import time
from typing import Any

from hpc.engine import hf, memory
from hpc.engine.admission import REFILL, SHARE_FROM
from hpc.engine.bounds import CPU_STEP_TOKENS, Speed, seqs_at_once
from hpc.engine.interface import Engine
from hpc.engine.kernel import compiler
from hpc.engine.kernel.kernel import Kernel
from hpc.engine.layers.attention import Unsupported
from hpc.engine.native.build import build_native, check_supported, unsupported
from hpc.engine.native.engine import NativeEngine
from hpc.engine.native.limits import EngineLimits
from hpc.engine.native.trial import bytes_per_second, flops_per_second
from hpc.engine.native.trial import trial as measure
from hpc.engine.registry import Checkpoint, Loaded
from hpc.engine.steps import Measured

LOGGER = logging.getLogger(__name__)


UNLIMITED_TOKENS = 32768
"""Maximum tokens of a sequence of a model that sets no limit: tables and CUDA graphs need a number."""
GPU_STEP_TOKENS = 8192
"""Prompt tokens of a step on a GPU: enough to be bound by arithmetic and not by launches."""


def supports(checkpoint: Checkpoint) -> str | None:
    """Return why the engine cannot generate with a model, judging by its configuration; None if it can."""
    device = "cuda" if checkpoint.cuda else "cpu"
    reason = unsupported(checkpoint.config, _context(checkpoint), checkpoint.job.trust_remote_code, device)
    return reason and f"the native engine does not support this model: {reason}"


def load(checkpoint: Checkpoint) -> Loaded:
    """Load the model and build its engine; an hf engine, with a warning, if the native one does not support it."""
    model = checkpoint.load()
    size, spent = checkpoint.size(model), []
    intact = True  # trying the engine changes the model
    try:
        check_supported(model, _context(checkpoint), model.device.type)
        intact = False
        kernel = None
        if model.device.type != "cuda":
            began = time.time()
            kernel = compiler.load(checkpoint.kernels)
            spent.append(("build", began, time.time()))
        engine = _build(checkpoint, model, kernel)
        return Loaded(engine, "native", size, tuple(spent))
    except Unsupported as error:
        reason = str(error)  # as text: the exception holds the model
    LOGGER.warning("the native engine does not support this model: %s; the hf engine generates", reason)
    if not intact:  # it is freed before another is loaded
        model = None
        memory.free()
        model = checkpoint.load()
    # The plan has no buckets.
    return Loaded(hf.of_model(checkpoint, model, checkpoint.job.buckets), "hf", size, tuple(spent))


def trial(engine: Engine, seconds: float) -> tuple[list[Measured], Speed | None]:
    """Measure steps of all shapes, and the device, for about `seconds`."""
    assert isinstance(engine, NativeEngine)
    speed = Speed(bytes_per_second(engine.device), flops_per_second(engine.device, engine.dtype))
    return measure(engine, seconds), speed


def _build(checkpoint: Checkpoint, model: Any, kernel: Kernel | None) -> NativeEngine:
    job, cuda = checkpoint.job, model.device.type == "cuda"
    limits = EngineLimits(
        max_seqs=seqs_at_once(job.max_num_seqs, cuda),
        step_tokens=GPU_STEP_TOKENS if cuda else CPU_STEP_TOKENS,
        # Of a GPU 0: what is left is measured, with the engine at work.
        cache_bytes=int(job.cache_gib * 2**30) or (0 if cuda else memory.cache_bytes(checkpoint.place.ranks_on_node)),
        context_tokens=_context(checkpoint),
        deterministic=job.deterministic,
        refill=REFILL if cuda else 0.0,
        share_from=SHARE_FROM if cuda else None,
        drafts=job.drafts,
    )
    return build_native(model, checkpoint.eos_token_ids, checkpoint.decode, limits, kernel)


def _context(checkpoint: Checkpoint) -> int:
    return checkpoint.context_tokens or UNLIMITED_TOKENS
