"""Engine arguments of vLLM, in its own names, and their checks. Pure: vLLM is imported in `hpc.engine.vllm`."""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

OURS = {
    "model": "--model", "dtype": "--dtype", "max_num_seqs": "--max-num-seqs", "kv_cache_memory_bytes": "--cache-gib",
    "device": "--device", "seed": "--sampling.seed", "tensor_parallel_size": "--replica-gpus",
    "trust_remote_code": "--trust-remote-code",
}  # fmt: skip
"""Arguments of vLLM that a job says elsewhere, with the flag that does."""
FIXED = (
    "skip_tokenizer_init", "disable_log_stats", "generation_config", "use_tqdm_on_load", "tokenizer",
    "distributed_executor_backend", "data_parallel_size", "pipeline_parallel_size", "stream_interval",
    "logprobs_mode", "scheduler_cls",
)  # fmt: skip
"""Arguments of vLLM that the engine sets itself: others would break the order, the seeds or the ranks."""


@dataclass(frozen=True)
class Vllm:
    """What the job asks of vLLM; None leaves it to vLLM."""

    gpu_memory_utilization: float | None = None
    """Share of the GPU's memory that vLLM may have, the weights included."""
    max_model_len: int | None = None
    """Maximum tokens of a prompt and its completion; where less than the model's context is enough."""
    max_num_batched_tokens: int | None = None
    """Maximum tokens of a step; on a CPU, which takes whole prompts, as many as the model's context."""
    quantization: str | None = None
    """How the weights are kept: fp8, awq, gptq, …"""
    kv_cache_dtype: str | None = None
    """How keys and values are kept: fp8, …"""
    enforce_eager: bool = False
    """No compilation, no CUDA graphs: slower steps after a faster start. On a CPU always so."""
    enable_prefix_caching: bool = True
    """Compute what prompts share at their beginning once."""
    speculative_config: str | None = None
    """Speculative decoding, as JSON: {"method": "ngram", "num_speculative_tokens": 4}."""
    extra: Mapping[str, str] = field(default_factory=dict)
    """Any other of vLLM's engine arguments: block_size 32 max_num_partial_prefills 2; values are JSON or plain text."""

    def __post_init__(self) -> None:
        share = self.gpu_memory_utilization
        if share is not None and not 0 < share <= 1:
            raise ValueError(f'"vllm.gpu_memory_utilization" is {share}; it must be above 0 and at most 1')
        for name in ("max_model_len", "max_num_batched_tokens"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f'"vllm.{name}" is {value}; it must be at least 1')
        if self.speculative_config is not None and not isinstance(_value(self.speculative_config), dict):
            raise ValueError(
                f'"vllm.speculative_config" is {self.speculative_config!r}; it must be a JSON object, as '
                '{"method": "ngram", "num_speculative_tokens": 4}'
            )
        for name in self.extra:
            said = f"--vllm.{name.replace('_', '-')}" if name in vars(self) else OURS.get(name)
            if said is not None:
                raise ValueError(f'"vllm.extra" names {name}; say it with {said}')
            if name in FIXED:
                raise ValueError(f'"vllm.extra" names {name}, which must be as it is: leave it out')

    def arguments(self) -> dict[str, Any]:
        """Return the given values as keyword arguments of vLLM's `EngineArgs`."""
        values = {name: value for name, value in vars(self).items() if name != "extra" and value is not None}
        if self.speculative_config is not None:
            values["speculative_config"] = _value(self.speculative_config)
        return {**values, **{name: _value(text) for name, text in self.extra.items()}}


def _value(text: str) -> Any:
    try:
        return json.loads(text)
    except ValueError:
        return text
