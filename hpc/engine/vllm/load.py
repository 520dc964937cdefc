"""Start vLLM in the process of a rank, after checking its version, its models and its arguments."""

import atexit
import os
import tempfile
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import torch
import torch._dynamo

from hpc.engine.bounds import Speed, evenly, seqs_at_once
from hpc.engine.failure import EngineFault
from hpc.engine.interface import Engine
from hpc.engine.registry import Checkpoint, Loaded
from hpc.engine.steps import Measured
from hpc.engine.vllm.engine import VllmEngine
from hpc.engine.vllm.installed import untested, version
from hpc.engine.vllm.process import log_to_rank, terminal_to_log, workers_deaf
from hpc.engine.vllm.scratch import Scratch
from hpc.engine.vllm.trial import served
from hpc.engine_args import Vllm
from hpc.mpi.gpus import CUDA, HIP

CPU_STEP_TOKENS = 8192
"""Maximum tokens of a step on a CPU if the context is unknown: whole prompts must fit, as they are not cut there."""
CPU_CACHE_GIB = 2
"""GiB for keys and values on a CPU if the job names none: vLLM would take a large part of the machine."""


def supports(checkpoint: Checkpoint) -> str | None:
    """Return why vLLM cannot generate for a job; None if it is installed, has the model and accepts the job."""
    if problem := untested(version()):
        return problem
    if checkpoint.job.deterministic:
        return "vLLM knows no --deterministic"
    try:
        if uneven := _uneven(checkpoint):
            return uneven
        if checkpoint.cuda and (lack := lacking(checkpoint.config.architectures or ())):
            return lack
        # Where no GPU is seen, on a login node say, vLLM cannot tell what it would do on one.
        return check(checkpoint) if torch.cuda.is_available() or not checkpoint.cuda else None
    except Exception as error:  # its libraries may fail to load in any way
        return f"vLLM cannot be used: {_said(error)}"


def lacking(architectures: Collection[str]) -> str | None:
    """Return what the installed vLLM lacks for these architectures on a GPU, None if nothing; starts no engine."""
    with terminal_to_log():
        _prepare()
        from vllm import ModelRegistry
        from vllm.platforms import current_platform

        if current_platform.is_cpu():
            return f"vLLM {version()} was built for CPUs"
        if not set(architectures) & set(ModelRegistry.get_supported_archs()):
            return f"vLLM {version()} has no {' or '.join(architectures) or 'such model'}"
    return None


def check(checkpoint: Checkpoint) -> str | None:
    """Return why vLLM refuses a job, as far as it tells without loading; None if it accepts."""
    if problem := untested(version()):  # then nothing else needs to be found out
        return problem
    return _uneven(checkpoint) or check_vllm(_arguments(checkpoint)) or None


def _uneven(checkpoint: Checkpoint) -> str:
    """Return why the devices of a rank cannot share a model's attention heads; an empty text if they can."""
    devices, config = checkpoint.job.replica_devices, checkpoint.config.get_text_config()
    heads, kv_heads = (getattr(config, f"num_{name}_heads", None) for name in ("attention", "key_value"))
    if not heads or evenly(heads, kv_heads, devices):
        return ""
    counts = ", ".join(str(count) for count in range(1, heads + 1) if evenly(heads, kv_heads, count))
    of_keys = f" and {kv_heads} of keys and values" if kv_heads and kv_heads != heads else ""
    return f"the model has {heads} attention heads{of_keys}, which {devices} devices cannot share evenly; {counts} can"


def load(checkpoint: Checkpoint) -> Loaded:
    """Start vLLM with a model."""
    device = checkpoint.device
    index = device.index if device.type == "cuda" else None
    started = start_vllm(_arguments(checkpoint), index, checkpoint.place.threads)
    engine = VllmEngine(started, checkpoint.eos_token_ids, checkpoint.decode)
    return Loaded(engine, "vllm", None if checkpoint.job.vllm.quantization else checkpoint.size())


def trial(engine: Engine, seconds: float) -> tuple[list[Measured], Speed | None]:
    """Measure steps; the speed of the device is unknown, as vLLM alone uses it."""
    assert isinstance(engine, VllmEngine)
    return served(engine, seconds), None


def _arguments(checkpoint: Checkpoint) -> dict[str, Any]:
    """Return vLLM's engine arguments for a job."""
    job, cuda = checkpoint.job, checkpoint.device.type == "cuda"
    cache_bytes = int((job.cache_gib or (0 if cuda else CPU_CACHE_GIB)) * 2**30)
    limits = (job.vllm.max_model_len, checkpoint.context_tokens)
    context = min((limit for limit in limits if limit is not None), default=None)
    values = engine_arguments(
        checkpoint.path, job.dtype, seqs_at_once(job.max_num_seqs, cuda), cache_bytes, context, cuda, job.vllm,
        job.replica_devices,
    )  # fmt: skip
    return {**values, "trust_remote_code": True} if job.trust_remote_code else values


def check_vllm(arguments: Mapping[str, Any]) -> str:
    """Return why vLLM refuses these arguments, as far as it tells without loading; an empty text if it accepts."""
    if problem := untested(version()):
        return problem
    with terminal_to_log():
        _prepare()
        from vllm import EngineArgs

        known = list(EngineArgs.__dataclass_fields__)
        for name in arguments:
            if name not in known:
                return f'"{name}" is no engine argument of vLLM; they are {", ".join(known)}'
        try:
            EngineArgs(**arguments).create_engine_config()
        except Exception as error:  # pydantic's, ValueError, NotImplementedError, …
            return f"vLLM refuses this job: {_said(error)}"
    return ""


def start_vllm(arguments: Mapping[str, Any], gpu: int | None, threads: int) -> Any:
    """Start vLLM in this process and return its engine; raise `EngineFault` if it does not start.

    `gpu` is the index of the rank's first GPU among the visible ones; None is the CPU. `threads` are those of the rank.
    """
    if problem := untested(version()):
        raise EngineFault(problem)
    folder = os.environ.get("SCATTERGEN_NODE_CACHE")
    scratch = Scratch(Path(folder or tempfile.gettempdir()))
    atexit.register(scratch.remove)  # before vLLM registers what needs it
    os.environ["TMPDIR"] = tempfile.tempdir = str(scratch.path)
    workers = int(arguments.get("tensor_parallel_size") or 1)
    if gpu is None:  # what vLLM compiles besides the model, the ranks of log probabilities say, takes a CPU a minute
        os.environ["TORCH_COMPILE_DISABLE"] = "1"
        torch._dynamo.config.disable = True
    else:
        os.environ.update(shown(os.environ, gpu, workers))
    os.environ["OMP_NUM_THREADS"] = str(max(1, threads // workers))
    with scratch.noting(), terminal_to_log(), workers_deaf(workers > 1):
        _prepare()
        from vllm import EngineArgs, LLMEngine

        try:
            return LLMEngine.from_engine_args(EngineArgs(**arguments))
        except Exception as error:
            raise EngineFault(f"vLLM does not start: {_said(error)}; see this rank's log") from error


def shown(environment: Mapping[str, str], gpu: int, count: int) -> dict[str, str]:
    """Return the variable that makes only `count` GPUs visible, from index `gpu` on, by their present tokens if any.

    Returns nothing for AMD: the rank sees no other GPUs already, and vLLM requires that both variables are equal.
    """
    if HIP in environment:
        return {}
    visible = [name for name in environment.get(CUDA, "").split(",") if name]
    own = visible[gpu : gpu + count] or [str(index) for index in range(gpu, gpu + count)]
    return {CUDA: ",".join(own)}


def engine_arguments(
    path: Path, dtype: str, max_num_seqs: int, cache_bytes: int, context_tokens: int | None, cuda: bool, asked: Vllm,
    devices: int = 1,
) -> dict[str, Any]:  # fmt: skip
    """Return the keyword arguments of vLLM's EngineArgs.

    `cache_bytes` is the cache of all `devices` together; 0 leaves its size to vLLM.
    """
    values: dict[str, Any] = {
        "model": str(path), "dtype": dtype, "max_num_seqs": max_num_seqs, "max_model_len": context_tokens,
        "skip_tokenizer_init": True, "generation_config": "vllm", "use_tqdm_on_load": False,
        "disable_log_stats": True,
        **asked.arguments(),
    }  # fmt: skip
    if cache_bytes:
        values["kv_cache_memory_bytes"] = cache_bytes // devices
    if not cuda:
        values["enforce_eager"] = True
        # A part of a prompt ends a CPU's vLLM where the request is sampled: its generator cannot be set back.
        values.setdefault("enable_chunked_prefill", False)
        values.setdefault("max_num_batched_tokens", max(context_tokens or CPU_STEP_TOKENS, max_num_seqs))
    if devices > 1:
        values |= {"tensor_parallel_size": devices, "distributed_executor_backend": "mp"}
    return values


def _prepare() -> None:
    """Set the environment before vLLM is imported: core in this process, no network traffic, log in the rank's file."""
    log_to_rank("vllm")
    os.environ.update(
        VLLM_ENABLE_V1_MULTIPROCESSING="0",  # nothing is left behind by kill -9
        VLLM_WORKER_MULTIPROC_METHOD="spawn",  # a process that has called MPI_Init must not fork
        VLLM_NO_USAGE_STATS="1",
        DO_NOT_TRACK="1",
        HF_HUB_OFFLINE="1",
        VLLM_CONFIGURE_LOGGING="0",
        VLLM_CPU_OMP_THREADS_BIND="nobind",  # else every rank is bound to the same cores
    )


def _said(error: BaseException) -> str:
    """Return the type and the whole message of an exception in one line."""
    return f"{type(error).__name__}: {' '.join(str(error).split())}"
