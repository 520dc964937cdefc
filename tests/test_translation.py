"""Whole jobs with an encoder-decoder: its languages, its text, what is generated again."""

import json
import runpy
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from hpc import generate
from hpc.exit import REFUSED
from hpc.job import Job
from hpc.mpi.comm import Single
from tests.conftest import ROOT, read_rows, run_here, write_corpus
from tests.engine.oracle import loaded, plain_output
from tests.many_jobs import run

NEW = 12
GERMAN, FRENCH = 34, 36
"""Tokens of the languages of the tiny translator."""


def job(model: Path, corpus: Path, **values: Any) -> dict[str, Any]:
    sampling = {"max_new_tokens": NEW}
    return {"model": str(model), "corpus": [str(corpus)], "dtype": "float32", "sampling": sampling, **values}


def test_a_translation_begins_with_the_language_of_its_row_and_its_text_does_not(
    tmp_path: Path, tiny_translator: Path
) -> None:
    rows = [{"prompt": "ab", "target_lang": "deu_Latn"}, {"prompt": "ab", "target_lang": "fra_Latn"}]
    values = job(tiny_translator, write_corpus(tmp_path / "rows.jsonl", rows), return_token_ids=True)
    found = read_rows(run_here(tmp_path, **values))
    assert [row["token_ids"][0] for row in found] == [GERMAN, FRENCH]
    assert [row["meta"] for row in found] == [{"target_lang": "deu_Latn"}, {"target_lang": "fra_Latn"}]
    assert not any("Latn" in row["text"] or row["text"].startswith(" ") for row in found)


def test_a_translation_is_what_plain_generate_gives(tmp_path: Path, tiny_translator: Path) -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(tiny_translator, src_lang="fra_Latn")
    path = write_corpus(tmp_path / "rows.jsonl", [{"prompt": "some text"}])
    values = job(tiny_translator, path, return_token_ids=True, source_lang="fra_Latn", target_lang="deu_Latn")
    [row] = read_rows(run_here(tmp_path, **values))
    source = tokenizer("some text")["input_ids"]
    plain = plain_output(loaded(tiny_translator), 2, source, NEW, forced_bos_token_id=GERMAN, eos_token_id=2)
    assert row["token_ids"] == plain
    assert row["text"] == tokenizer.decode(plain, skip_special_tokens=True)


def test_another_target_language_is_generated_and_the_same_one_is_not(tmp_path: Path, tiny_translator: Path) -> None:
    path = write_corpus(tmp_path / "rows.jsonl", [{"prompt": "ab"}, {"prompt": "cd", "target_lang": "deu_Latn"}])
    generated = []
    for target in ("deu_Latn", "deu_Latn", "fra_Latn"):
        output = run_here(tmp_path, **job(tiny_translator, path, target_lang=target))
        generated.append(json.loads((output.parent / "summary.json").read_text())["generated_tokens"] > 0)
    assert generated == [True, False, True]


def test_a_job_whose_language_the_model_has_not_is_refused(tmp_path: Path, tiny_translator: Path) -> None:
    path = write_corpus(tmp_path / "rows.jsonl", [{"prompt": "ab"}])
    values = {**job(tiny_translator, path, target_lang="German"), "runs": str(tmp_path), "name": "run"}
    assert run(Job.from_json(values), Single()) == REFUSED


@pytest.mark.parametrize("name", ["translate", "summarize"])
@pytest.mark.parametrize("model", ["tiny_translator", "tiny_summarizer", "tiny_model"])
def test_the_ready_jobs_run_with_an_encoder_decoder_and_with_a_chat_model(
    tmp_path: Path, request: pytest.FixtureRequest, name: str, model: str
) -> None:
    ready: Job = runpy.run_path(str(ROOT / f"jobs/{name}.py"))["JOB"]
    corpus = write_corpus(tmp_path / "rows.jsonl", [{"prompt": "some text"}, {"prompt": "more", "id": "x"}])
    target = "" if model == "tiny_summarizer" else "deu_Latn"
    asked = replace(
        ready, model=str(request.getfixturevalue(model)), corpus=(str(corpus),), runs=str(tmp_path), name="run",
        target_lang=target if (name, model) != ("summarize", "tiny_model") else "", dtype="float32",
        sampling=replace(ready.sampling, max_new_tokens=3, min_new_tokens=1),
    )  # fmt: skip
    assert run(asked, Single()) == 0
    rows = read_rows(tmp_path / "run/completions.jsonl")
    assert [row["error"] for row in rows] == [None, None]
    prompt_tokens = rows[0]["usage"]["prompt_tokens"]
    assert (prompt_tokens > len("some text") + 20) == (model == "tiny_model")  # a chat model is told what to do


def test_a_python_call_translates_as_a_job_does(tmp_path: Path, tiny_translator: Path) -> None:
    values = job(tiny_translator, write_corpus(tmp_path / "rows.jsonl", [{"prompt": "ab cd"}]), target_lang="deu_Latn")
    [row] = read_rows(run_here(tmp_path, **values))
    [found] = generate(
        ["ab cd"], model=str(tiny_translator), dtype="float32", device="cpu", target_lang="deu_Latn", max_new_tokens=NEW
    )
    assert found.text == row["text"]
