"""What a call generates is what a job does, with a real model; and the examples of the docstrings run."""

import contextlib
import doctest
import io
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import hpc
from hpc.api import generate, generator, read, run
from tests.conftest import ROOT, read_rows, run_here, write_corpus

ROWS: list[dict[str, Any]] = [
    *({"prompt": "once upon a time " * n} for n in (1, 9, 3)),
    {"messages": [{"role": "user", "content": "hi"}], "id": "chat"},
    {"prompt_token_ids": [1, 2, 3], "sampling": {"max_new_tokens": 5, "logprobs": 2}},
    {"prompt": "sampled", "sampling": {"temperature": 1.0, "n": 3, "seed": 4}, "id": 70},
    {"prompt": "once upon a time "},
    {"prompt": "x" * 600},
    {"prompt": "x", "sampling": {"top_q": 1}},
    {"prompt": "once more", "id": "chat"},
]


def as_row(completion: hpc.Completion) -> dict[str, Any]:
    """Return a completion as the output of a job has it, with an error of which places are left out."""
    row: dict[str, Any] = {
        "id": completion.id,
        "text": completion.text,
        "finish_reason": completion.finish_reason,
        "usage": vars(completion.usage),
        "error": completion.error and without_places(vars(completion.error)),
        "token_ids": list(completion.token_ids),
    }
    if completion.logprobs is not None:
        row["logprobs"] = [logprob for logprob, _ in completion.logprobs]
    if len(completion.samples) > 1:
        row["samples"] = completion.texts
    return row


def of_job(row: dict[str, Any]) -> dict[str, Any]:
    """Return a row of an output with as much of it as `as_row` gives."""
    logprobs = {"logprobs": row["logprobs"]["token_logprobs"]} if "logprobs" in row else {}
    samples = {"samples": [sample["text"] for sample in row["samples"]]} if "samples" in row else {}
    return {"token_ids": [], **row, "error": row["error"] and without_places(row["error"]), **logprobs, **samples}


def without_places(error: dict[str, str]) -> dict[str, str]:
    """Return an error whose message does not say where its row stands: in a file, or in a call."""
    return {**error, "message": re.sub(r"prompts(\.jsonl:| row )\d+", "PLACE", error["message"])}


@pytest.mark.parametrize("engine", ["native", "hf"])
def test_completions_are_those_of_a_job_with_the_same_rows_and_parameters(
    engine: str, tiny_model: Path, tmp_path: Path
) -> None:
    corpus = write_corpus(tmp_path / "prompts.jsonl", ROWS)
    values = {"model": str(tiny_model), "corpus": [str(corpus)], "engine": engine, "return_token_ids": True}
    output = read_rows(run_here(tmp_path, **values, sampling={"max_new_tokens": 12}))
    found = hpc.generate(ROWS, model=tiny_model, engine=engine, max_new_tokens=12)
    for one, other in zip(map(as_row, found), map(of_job, output), strict=True):
        assert one == other


def test_a_greedy_call_that_was_interrupted_changes_nothing_for_the_next(tiny_model: Path) -> None:
    with hpc.Generator(tiny_model, max_new_tokens=12) as generator:
        expected = generator.generate(ROWS)
        next(generator.stream(ROWS, max_new_tokens=40))
        assert generator.generate(ROWS) == expected


def test_transformers_says_as_much_as_before(tiny_model: Path) -> None:
    from transformers import logging

    before = logging.get_verbosity()
    logging.set_verbosity_info()
    logging.enable_progress_bar()
    try:
        hpc.Generator(tiny_model).generate(["x"], max_new_tokens=1)
        assert (logging.get_verbosity(), logging.is_progress_bar_enabled()) == (logging.INFO, True)
    finally:
        logging.set_verbosity(before)


@pytest.fixture
def in_folder(tmp_path: Path) -> Iterator[Path]:
    """Make a folder with a corpus the current one."""
    write_corpus(tmp_path / "prompts.jsonl", [{"prompt": "a"}, {"prompt": "b"}])
    before = Path.cwd()
    os.chdir(tmp_path)
    yield tmp_path
    os.chdir(before)


def test_the_examples_of_the_docstrings_run(tiny_model: Path, in_folder: Path) -> None:
    names = {name: getattr(hpc, name) for name in hpc.__all__} | {"hpc": hpc}
    finder, runner, said = doctest.DocTestFinder(), doctest.DocTestRunner(), io.StringIO()
    examples = [test for module in (generator, generate, run, read) for test in finder.find(module, globs=names)]
    for test in examples:
        for example in test.examples:
            example.source = example.source.replace("MODEL", str(tiny_model))
        runner.run(test, out=said.write)
    results = runner.summarize(verbose=False)
    assert results.failed == 0, said.getvalue()
    assert results.attempted >= 12


@pytest.mark.slow
def test_the_blocks_of_the_page_run(tiny_model: Path, in_folder: Path) -> None:
    page = (ROOT / "docs/python.md").read_text(encoding="utf-8")
    blocks = [block.partition("```")[0] for block in page.split("```python\n")[1:]]
    names: dict[str, Any] = {}
    with contextlib.redirect_stdout(io.StringIO()):
        for block in blocks:
            exec(compile(block.replace('"M"', repr(str(tiny_model))), "docs/python.md", "exec"), names)
    assert len(blocks) >= 4
