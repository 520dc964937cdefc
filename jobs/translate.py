"""Translate a corpus: rows are texts, `{"prompt": "…"}`, for an encoder-decoder or for a chat model.

`python jobs/translate.py --model facebook/nllb-200-distilled-600M --corpus texts.jsonl --target-lang deu_Latn`
`python jobs/translate.py --model Qwen/Qwen3-4B-Instruct-2507 --corpus texts.jsonl --target-lang German`

An encoder-decoder is told the languages by its own names for them; one for a single pair, such as
Helsinki-NLP/opus-mt-en-de, needs none. A row's "source_lang" and "target_lang" go before the flags.
"""

from hpc import Job, SamplingParams, main

JOB = Job(
    model="facebook/nllb-200-distilled-600M",
    corpus=("texts.jsonl",),
    instruction="Translate into {target_lang}. Answer with the translation only.\n\n{prompt}",
    sampling=SamplingParams(max_new_tokens=512),
)

if __name__ == "__main__":
    main(JOB)
