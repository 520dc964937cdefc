"""The demo: 77 prompts of very different lengths, answered by a small chat model. `make demo` runs it."""

from pathlib import Path

from hpc import Job, SamplingParams, main

HERE = Path(__file__).parent

JOB = Job(
    model=str(HERE.parent / "models" / "SmolLM2-135M-Instruct.Q4_1.gguf"),
    corpus=(str(HERE / "demo.jsonl"),),
    sampling=SamplingParams(max_new_tokens=64),
    show=3,
)

if __name__ == "__main__":
    main(JOB)
