"""What knows models, handed to the pipeline; an echo or another engine takes its place behind the same methods."""

import logging
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hpc import calibration
from hpc.admission import REFILL, SHARE_FROM
from hpc.calibration import Size, Speed
from hpc.cost import Sample
from hpc.engine import Engine
from hpc.job import Job, Refusal
from hpc.model import Model, find, resolve, user_cache
from hpc.place import Place
from hpc.plan import AT_ONCE, AT_ONCE_GPU
from hpc.rows import Checker, Limits
from hpc.trim import Decode

if TYPE_CHECKING:
    from hpc.engine.load import Description

LOGGER = logging.getLogger(__name__)

UNLIMITED_TOKENS = 32768
"""Longest sequence, in tokens, of a model that sets no limit: what the native engine makes room for."""
VLLM_CPU_GIB = 2
"""Memory for keys and values of vLLM on a CPU, where the job does not say."""


@dataclass(frozen=True)
class Replica:
    """An engine, with what is needed of its model to make text of tokens."""

    engine: Engine
    eos_token_ids: tuple[int, ...]
    decode: Decode
    device: str = "cpu"
    """What computes, by its maker's name."""
    size: Size | None = None
    """What it holds, where that is known."""
    engine_name: str = ""
    """What generates, by the name of its flag; empty: what the job says."""
    spent: tuple[tuple[str, float, float], ...] = ()
    """What the time went to that is not loading: kinds of `hpc.history`, from when to when in seconds of the clock."""
    gpu: str = ""
    """The UUID of its GPU, as torch says it; nothing where it was known before."""


class Loader:
    """Loads models with transformers. Nothing is imported before it is needed: a finished run needs none of it."""

    def resolve(self, model: str) -> Model:
        """Find the model; see `hpc.model.resolve`."""
        return resolve(model)

    def find(self, model: str) -> Path:
        """Find the model's directory; see `hpc.model.find`."""
        return find(model)

    def examine(self, job: Job, path: Path) -> None:
        """Raise `Refusal` if the files at `path` show that they are not all of a causal language model."""
        from hpc.engine import load

        load.quiet()
        load.examine(path, job.trust_remote_code)

    def dtype(self, job: Job) -> str:
        """Return the dtype that the job's stands for on this machine."""
        from hpc.engine import load

        return load.resolve_dtype(job.dtype, job.device)

    def check(self, job: Job, path: Path, place: Place) -> None:
        """Raise `Refusal` if the job's engine would not start, as far as that can be told without loading."""
        if job.engine == "vllm":
            from hpc.engine import vllm

            if problem := vllm.check(_engine_arguments(job, path, place)):
                raise Refusal(problem)

    def checker(self, job: Job, path: Path, file_names: tuple[str, ...]) -> Checker:
        """Return what checks and tokenizes rows for the model at `path`."""
        from hpc.engine import load
        from hpc.tokenizer import Tokenizer

        load.quiet()
        described = load.describe(path, job.trust_remote_code, job.context_tokens)
        with load.refusing(path):
            tokenizer = Tokenizer(path, job.trust_remote_code, job.chat_date)
        ending = tokenizer.chat_ending(described.eos_token_ids)
        limits = Limits(described.vocab_size, context_tokens(job, described), job.truncate_prompts, ending)
        return Checker(file_names, job.sampling, limits, tokenizer)

    def choose_engine(self, job: Job, path: Path) -> tuple[str, str]:
        """Return the engine that is to generate with the model at `path`, and why not the job's, if it is not."""
        from hpc.engine import load, support

        load.quiet()
        described = load.describe(path, job.trust_remote_code, job.context_tokens)
        config = load.configuration(path, job.trust_remote_code)
        context = described.context_tokens or UNLIMITED_TOKENS
        return support.choose_engine(job.engine, config, context, job.trust_remote_code)

    def load(self, job: Job, path: Path, place: Place) -> Replica:
        """Load the model onto the device of the rank at `place`."""
        began = time.time()
        from hpc.engine import endings, load, memory
        from hpc.engine.hf import HFEngine
        from hpc.tokenizer import Tokenizer

        load.quiet()
        spent = [("import", began, time.time())]
        device = _device(job, place)
        tokenizer = Tokenizer(path, job.trust_remote_code)
        described = load.describe(path, job.trust_remote_code, job.context_tokens)
        of_chats = tokenizer.chat_ending(described.eos_token_ids)
        LOGGER.info("%s", endings.say(described.eos_sources, tokenizer.token, of_chats))
        gpu = "" if place.gpu_name.startswith(("GPU-", "MIG-")) else load.uuid(device)
        made = load.device_name(device) if device.type == "cuda" else calibration.cpu()
        if job.engine == "vllm":
            from hpc.engine import vllm

            index = device.index if device.type == "cuda" else None
            started = vllm.VllmEngine(
                vllm.start(_engine_arguments(job, path, place), index, place.threads),
                described.eos_token_ids,
                tokenizer.decode,
            )
            counted = _size(job, path, device, place)
            return Replica(started, described.eos_token_ids, tokenizer.decode, made, counted, "vllm", tuple(spent), gpu)
        model = load.load(path, device, job.dtype, place.threads, job.trust_remote_code)
        size = Size(*load.weights(model), memory.device_bytes(device, place.ranks_on_node))
        LOGGER.info("loaded %s as %s on %s, %d threads", path.name, job.dtype, device, place.threads)
        engine: Engine | None = None
        num_buckets = 0
        if job.engine == "native":
            engine, intact = native(job, model, described, tokenizer.decode, place, spent)
            if not intact:  # what was tried has changed the model: it goes before another comes
                model = None
                load.free()
                model = load.load(path, device, job.dtype, place.threads, job.trust_remote_code)
            if engine is None:
                num_buckets = job.buckets  # the plan has none
        name = "native" if engine else "hf"
        engine = engine or HFEngine(
            model, described.eos_token_ids, tokenizer.decode, job.batch_tokens, num_buckets=num_buckets
        )
        return Replica(engine, described.eos_token_ids, tokenizer.decode, made, size, name, tuple(spent), gpu)

    def trial(self, replica: Replica, seconds: float) -> tuple[list[Sample], Speed | None]:
        """Measure steps of all shapes, and the device, for about so many seconds; the hf engine tells of none."""
        from hpc.engine.native import NativeEngine
        from hpc.engine.trial import bytes_per_second, flops_per_second, served, trial
        from hpc.engine.vllm import VllmEngine

        engine = replica.engine
        if isinstance(engine, VllmEngine):
            return served(engine, seconds), None
        assert isinstance(engine, NativeEngine)
        speed = Speed(bytes_per_second(engine.device), flops_per_second(engine.device, engine.dtype))
        return trial(engine, seconds), speed


def native(
    job: Job,
    model: Any,
    described: "Description",
    decode: Decode,
    place: Place,
    spent: list[tuple[str, float, float]],
) -> tuple[Engine | None, bool]:
    """Return the native engine of a model; None, and a message, where it does not support the model.

    And whether the model is as it was, or the engine's. What building the kernel took is added to `spent`.
    """
    from hpc.engine import compiler, memory, support
    from hpc.engine.attention import Unsupported
    from hpc.engine.run import Limits

    cuda, intact = model.device.type == "cuda", True
    try:
        context = described.context_tokens or UNLIMITED_TOKENS
        support.check(model, context)
        intact = False
        began = time.time()
        compiled = None if cuda else compiler.load(user_cache() / "kernels")
        spent.append(("build", began, time.time()))
        limits = Limits(
            max_seqs=job.max_num_seqs or (AT_ONCE_GPU if cuda else AT_ONCE),
            step_tokens=8192 if cuda else calibration.CPU_STEP_TOKENS,
            # Of a GPU 0: what is left is measured, with the engine at work.
            cache_bytes=int(job.cache_gib * 2**30) or (0 if cuda else memory.cache_bytes(place.ranks_on_node)),
            context_tokens=context,
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


def context_tokens(job: Job, described: "Description") -> int | None:
    """Return the most tokens of prompt and completion together: the model's, or fewer where vLLM is told so."""
    asked = job.vllm.max_model_len if job.engine == "vllm" else None
    return min((limit for limit in (asked, described.context_tokens) if limit is not None), default=None)


def _device(job: Job, place: Place) -> Any:
    """Return the device of a rank; where nothing named GPUs, torch may still see some: the ranks' in their order."""
    from hpc.engine import load

    return load.resolve_device(job.device, place.local_rank if place.gpu is None else place.gpu)


def _engine_arguments(job: Job, path: Path, place: Place) -> dict[str, Any]:
    """Return what vLLM is started with."""
    from hpc.engine import load, vllm

    cuda = _device(job, place).type == "cuda"
    max_seqs = job.max_num_seqs or (AT_ONCE_GPU if cuda else AT_ONCE)
    # On a CPU vLLM would take most of the machine's memory, whoever else is there.
    cache_bytes = int((job.cache_gib or (0 if cuda else VLLM_CPU_GIB)) * 2**30)
    context = context_tokens(job, load.describe(path, job.trust_remote_code, job.context_tokens))
    values = vllm.engine_arguments(path, job.dtype, max_seqs, cache_bytes, context, cuda, job.vllm)
    return {**values, "trust_remote_code": True} if job.trust_remote_code else values


def _size(job: Job, path: Path, device: Any, place: Place) -> Size | None:
    """Return what a model holds that somebody else loads; None for one that is quantized."""
    from hpc.engine import load, memory

    if job.vllm.quantization is not None:
        return None
    counted = load.weights_of(path, job.dtype)
    return counted and Size(*counted, memory.device_bytes(device, place.ranks_on_node))
