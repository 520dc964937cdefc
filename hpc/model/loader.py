"""What knows models, handed to the pipeline; an echo or another engine takes its place behind the same methods."""

import contextlib
import logging
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hpc.corpus.tokenize import Checker, PromptLimits
from hpc.engine.admission import REFILL, SHARE_FROM
from hpc.engine.bounds import CPU_STEP_TOKENS, MAX_SEQS, MAX_SEQS_GPU, Size, Speed
from hpc.engine.interface import Engine
from hpc.engine.steps import Measured
from hpc.exit import Refusal
from hpc.job import Job
from hpc.model.find import Model, find, resolve, user_cache
from hpc.mpi.binding import Binding
from hpc.trim import Decode

if TYPE_CHECKING:
    from hpc.model.load import Description

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
    """What the time went to that is not loading: a kind of `hpc.report.timeline`, beginning and end by the clock, s."""
    gpu: str = ""
    """The UUID of its GPU, as torch says it; nothing where it was known before."""


class Loader:
    """Loads models with transformers. Nothing is imported before it is needed: a finished run needs none of it."""

    def resolve(self, model: str) -> Model:
        """Find the model; see `hpc.model.find.resolve`."""
        return resolve(model)

    def find(self, model: str) -> Path:
        """Find the model's directory; see `hpc.model.find.find`."""
        return find(model)

    def examine(self, job: Job, path: Path) -> None:
        """Raise `Refusal` if the files at `path` show that they are not all of a causal language model."""
        from hpc.model import load

        load.quiet()
        load.examine(path, job.trust_remote_code)

    def dtype(self, job: Job) -> str:
        """Return the dtype that the job's stands for on this machine."""
        from hpc.model.device import resolve_dtype

        with _refusing():
            return resolve_dtype(job.dtype, job.device)

    def check(self, job: Job, path: Path, place: Binding) -> None:
        """Raise `Refusal` if the job's engine would not start, as far as that can be told without loading."""
        if job.device == "cuda" and place.gpu is None:
            with _refusing():
                _device(job, place)
        if job.engine == "vllm":
            from hpc.engine.vllm.engine import check_vllm

            if problem := check_vllm(_engine_arguments(job, path, place)):
                raise Refusal(problem)

    def checker(self, job: Job, path: Path, file_names: tuple[str, ...]) -> Checker:
        """Return what checks and tokenizes rows for the model at `path`."""
        from hpc.model import load
        from hpc.model.tokenizer import Tokenizer

        load.quiet()
        described = load.describe(path, job.trust_remote_code, job.context_tokens)
        with load.refusing(path):
            tokenizer = Tokenizer(path, job.trust_remote_code, job.chat_date)
        ending = tokenizer.chat_ending(described.eos_token_ids)
        limits = PromptLimits(described.vocab_size, context_tokens(job, described), job.truncate_prompts, ending)
        return Checker(file_names, job.sampling, limits, tokenizer)

    def choose_engine(self, job: Job, path: Path) -> tuple[str, str]:
        """Return the engine that is to generate with the model at `path`, and why not the job's, if it is not."""
        from hpc.engine.native.build import choose_engine
        from hpc.model import load

        load.quiet()
        described = load.describe(path, job.trust_remote_code, job.context_tokens)
        config = load.configuration(path, job.trust_remote_code)
        context = described.context_tokens or UNLIMITED_TOKENS
        return choose_engine(job.engine, config, context, job.trust_remote_code)

    def load(self, job: Job, path: Path, place: Binding) -> Replica:
        """Load the model onto the device of the rank at `place`."""
        began = time.time()
        from hpc.engine import memory
        from hpc.engine.hf import HFEngine
        from hpc.model import endings, load
        from hpc.model.device import cpu_name, device_name, free_memory, gpu_uuid
        from hpc.model.tokenizer import Tokenizer

        load.quiet()
        spent = [("import", began, time.time())]
        device = _device(job, place)
        tokenizer = Tokenizer(path, job.trust_remote_code)
        described = load.describe(path, job.trust_remote_code, job.context_tokens)
        of_chats = tokenizer.chat_ending(described.eos_token_ids)
        LOGGER.info("%s", endings.say(described.eos_sources, tokenizer.token, of_chats))
        gpu = "" if place.gpu_name.startswith(("GPU-", "MIG-")) else gpu_uuid(device)
        made = device_name(device) if device.type == "cuda" else cpu_name()
        if job.engine == "vllm":
            from hpc.engine.vllm.engine import VllmEngine, start_vllm

            index = device.index if device.type == "cuda" else None
            started = VllmEngine(
                start_vllm(_engine_arguments(job, path, place), index, place.threads),
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
                free_memory()
                model = load.load(path, device, job.dtype, place.threads, job.trust_remote_code)
            if engine is None:
                num_buckets = job.buckets  # the plan has none
        name = "native" if engine else "hf"
        engine = engine or HFEngine(
            model, described.eos_token_ids, tokenizer.decode, job.batch_tokens, num_buckets=num_buckets
        )
        return Replica(engine, described.eos_token_ids, tokenizer.decode, made, size, name, tuple(spent), gpu)

    def trial(self, replica: Replica, seconds: float) -> tuple[list[Measured], Speed | None]:
        """Measure steps of all shapes, and the device, for about so many seconds; the hf engine tells of none."""
        from hpc.engine.native.engine import NativeEngine
        from hpc.engine.native.trial import bytes_per_second, flops_per_second, served, trial
        from hpc.engine.vllm.engine import VllmEngine

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
    place: Binding,
    spent: list[tuple[str, float, float]],
) -> tuple[Engine | None, bool]:
    """Return the native engine of a model; None, and a message, where it does not support the model.

    And whether the model is as it was, or the engine's. What building the kernel took is added to `spent`.
    """
    from hpc.engine import memory
    from hpc.engine.kernel import compiler
    from hpc.engine.layers.attention import Unsupported
    from hpc.engine.native.build import build_native, check_supported
    from hpc.engine.native.runner import EngineLimits

    cuda, intact = model.device.type == "cuda", True
    try:
        context = described.context_tokens or UNLIMITED_TOKENS
        check_supported(model, context)
        intact = False
        began = time.time()
        compiled = None if cuda else compiler.load(user_cache() / "kernels")
        spent.append(("build", began, time.time()))
        limits = EngineLimits(
            max_seqs=job.max_num_seqs or (MAX_SEQS_GPU if cuda else MAX_SEQS),
            step_tokens=8192 if cuda else CPU_STEP_TOKENS,
            # Of a GPU 0: what is left is measured, with the engine at work.
            cache_bytes=int(job.cache_gib * 2**30) or (0 if cuda else memory.cache_bytes(place.ranks_on_node)),
            context_tokens=context,
            deterministic=job.deterministic,
            refill=REFILL if cuda else 0.0,
            share_from=SHARE_FROM if cuda else None,
            drafts=job.drafts,
        )
        return build_native(model, described.eos_token_ids, decode, limits, compiled), True
    except Unsupported as error:
        reason = str(error)  # as text: the exception holds the model
    LOGGER.warning("the native engine does not support this model: %s; the hf engine generates", reason)
    return None, intact


def context_tokens(job: Job, described: "Description") -> int | None:
    """Return the most tokens of prompt and completion together: the model's, or fewer where vLLM is told so."""
    asked = job.vllm.max_model_len if job.engine == "vllm" else None
    return min((limit for limit in (asked, described.context_tokens) if limit is not None), default=None)


def _device(job: Job, place: Binding) -> Any:
    """Return the device of a rank; where nothing named GPUs, torch may still see some: the ranks' in their order."""
    from hpc.model.device import resolve_device

    return resolve_device(job.device, place.local_rank if place.gpu is None else place.gpu)


@contextlib.contextmanager
def _refusing() -> Iterator[None]:
    """Refuse the job where there is no such device; for rank 0, before the others begin."""
    try:
        yield
    except ValueError as error:
        raise Refusal(str(error)) from error


def _engine_arguments(job: Job, path: Path, place: Binding) -> dict[str, Any]:
    """Return what vLLM is started with."""
    from hpc.engine.vllm.engine import engine_arguments
    from hpc.model import load

    cuda = _device(job, place).type == "cuda"
    max_seqs = job.max_num_seqs or (MAX_SEQS_GPU if cuda else MAX_SEQS)
    # On a CPU vLLM would take most of the machine's memory, whoever else is there.
    cache_bytes = int((job.cache_gib or (0 if cuda else VLLM_CPU_GIB)) * 2**30)
    context = context_tokens(job, load.describe(path, job.trust_remote_code, job.context_tokens))
    values = engine_arguments(path, job.dtype, max_seqs, cache_bytes, context, cuda, job.vllm)
    return {**values, "trust_remote_code": True} if job.trust_remote_code else values


def _size(job: Job, path: Path, device: Any, place: Binding) -> Size | None:
    """Return what a model holds that somebody else loads; None for one that is quantized."""
    from hpc.engine import memory
    from hpc.model import load

    if job.vllm.quantization is not None:
        return None
    counted = load.weights_of(path, job.dtype)
    return counted and Size(*counted, memory.device_bytes(device, place.ranks_on_node))
