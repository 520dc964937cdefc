"""vLLM's CPU build, in one process, with prefix caching as by default.

`enforce_eager`, because compiling takes minutes and a C++ compiler; `vllm:enforce_eager=false` compiles, which the
limit of `--cap` must allow for. Settings are arguments of `LLM`. It runs on CPUs with AVX2 alone, in bfloat16 too.
"""

import math
import os
from collections.abc import Sequence

from tests.bench.measure import GIB, Ask, Generate, Options, main


def load(options: Options) -> Generate:
    """Start the engine with a cache that holds every request at once, and at least 2 GiB."""
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(options.model)
    head = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    token_bytes = 2 * config.num_hidden_layers * config.num_key_value_heads * head
    token_bytes *= 4 if options.dtype == "float32" else 2
    cores = sorted(os.sched_getaffinity(0))[: options.threads]
    os.environ |= {
        "VLLM_CPU_KVCACHE_SPACE": str(max(2, math.ceil(1.2 * options.most_tokens * token_bytes / GIB))),
        "VLLM_CPU_OMP_THREADS_BIND": ",".join(map(str, cores)),
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        "VLLM_NO_USAGE_STATS": "1",
        "HF_HUB_OFFLINE": "1",
    }
    from vllm import LLM, SamplingParams

    arguments = {"enforce_eager": True, "disable_log_stats": True, "max_model_len": 8192, **options.settings}
    llm = LLM(model=str(options.model), dtype=options.dtype, **arguments)

    def generate(asks: Sequence[Ask]) -> list[list[int]]:
        parameters = [
            SamplingParams(max_tokens=ask.max_new, temperature=0, ignore_eos=True, detokenize=False) for ask in asks
        ]
        outputs = llm.generate([{"prompt_token_ids": ask.prompt} for ask in asks], parameters, use_tqdm=False)
        return [list(output.outputs[0].token_ids) for output in outputs]

    return generate


if __name__ == "__main__":
    main(load)
