"""OpenVINO GenAI's continuous batching, from a GGUF file of float16 weights, with its prefix cache.

Of unquantized GGUF its reader takes float16 alone ("Unsupported quantization type" for float32). The plugin says that
it keeps keys and values as 8-bit integers, but in float32 all requests of W1 and W2 got the same tokens as from vLLM.
Settings in capitals are properties of the plugin, for example `openvino:KV_CACHE_PRECISION=f32`; others are fields of
its scheduler. On a CPU without bfloat16 the plugin ignores the bfloat16 hint and computes in float32: not measured.
"""

from collections.abc import Sequence

import numpy as np
import openvino
import openvino_genai

from tests.bench.measure import Ask, Generate, Options, Unsupported, main


def load(options: Options) -> Generate:
    """Compile the model, for at most 128 requests and 512 tokens in a step."""
    capabilities = openvino.Core().get_property("CPU", "OPTIMIZATION_CAPABILITIES")
    if options.dtype == "bfloat16" and "BF16" not in capabilities:
        raise Unsupported("OpenVINO computes bfloat16 as float32 on this CPU")
    scheduler = openvino_genai.SchedulerConfig()
    fields = {"max_num_seqs": 128, "max_num_batched_tokens": 512, "enable_prefix_caching": True, "cache_size": 4}
    properties = {
        "INFERENCE_PRECISION_HINT": {"float32": "f32", "bfloat16": "bf16"}[options.dtype],
        "INFERENCE_NUM_THREADS": options.threads,
    }
    for name, value in options.settings.items():
        (properties if name.isupper() else fields)[name] = value
    for name, value in fields.items():
        setattr(scheduler, name, value)
    pipeline = openvino_genai.ContinuousBatchingPipeline(str(options.gguf), scheduler, "CPU", properties)

    def generate(asks: Sequence[Ask]) -> list[list[int]]:
        prompts = [openvino.Tensor(np.array([ask.prompt], dtype=np.int64)) for ask in asks]
        return [list(result.m_generation_ids[0]) for result in pipeline.generate(prompts, list(map(config, asks)))]

    return generate


def config(ask: Ask) -> openvino_genai.GenerationConfig:
    """Return the configuration of one request."""
    made = openvino_genai.GenerationConfig()
    made.max_new_tokens, made.ignore_eos, made.do_sample = ask.max_new, True, False
    return made


if __name__ == "__main__":
    main(load)
