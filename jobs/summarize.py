"""Summarize a corpus: rows are documents, `{"prompt": "…"}`, for an encoder-decoder or for a chat model.

`python jobs/summarize.py --model facebook/bart-large-cnn --corpus articles.jsonl`
`python jobs/summarize.py --model allenai/led-large-16384-arxiv --corpus papers.jsonl --sampling.max-new-tokens 512`
`python jobs/summarize.py --model Qwen/Qwen3-4B-Instruct-2507 --corpus papers.jsonl`

A document that is longer than the model takes is an error row; `--truncate-prompts right` cuts it for an
encoder-decoder. Of a chat it would cut the question: give that a model with a longer context.
"""

from hpc import Job, SamplingParams, main

JOB = Job(
    model="facebook/bart-large-cnn",
    corpus=("documents.jsonl",),
    instruction="Summarize the text in a few sentences. Answer with the summary only.\n\n{prompt}",
    sampling=SamplingParams(max_new_tokens=142, min_new_tokens=30),
)

if __name__ == "__main__":
    main(JOB)
