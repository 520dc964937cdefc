"""Whole runs of corpora as people have them: every row is answered in order, or says what is wrong with it."""

import contextlib
import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from hpc.corpus.columns import Columns
from hpc.corpus.files import Blocks, name_files
from hpc.corpus.openai import known_parameters
from hpc.corpus.turns import CHAT_KEYS
from hpc.exit import Refusal
from hpc.job import Job
from hpc.mpi.comm import Single
from hpc.mpi.signals import Stop
from hpc.output.verify import verify_run
from hpc.pipeline import generate
from hpc.sampling_params import SamplingParams
from tests.conftest import read_rows, write_corpus
from tests.fakes import EchoLoader
from tests.stores import make_checker

CHAT, COMPLETIONS = "/v1/chat/completions", "/v1/completions"


def run(folder: Path, *rows: Any, **knobs: Any) -> list[dict[str, Any]]:
    """Run rows with the echo engine; return the rows of the output."""
    corpus = write_corpus(folder / "rows.jsonl", rows)
    knobs = {"sampling": SamplingParams(max_new_tokens=4), **knobs}
    job = Job("echo", (str(corpus),), runs=str(folder / "runs"), **knobs)
    generate(job, Single(), EchoLoader(), Stop())
    assert verify_run(folder / "runs/rows") == 0
    return read_rows(folder / "runs/rows/completions.jsonl")


def line(custom_id: str, text: Any, url: str = CHAT, **parameters: Any) -> dict[str, Any]:
    asked = {"prompt": text} if url == COMPLETIONS else {"messages": [{"role": "user", "content": text}]}
    body = {"model": "m", "temperature": 0, **asked, **parameters}
    return {"custom_id": custom_id, "method": "POST", "url": url, "body": body}


TEN_LINES = [
    line("good", "hi", max_tokens=2),
    line("good", "again", max_tokens=2),
    '{"custom_id": "cut", "method": "POST", "url": "/v1/chat/comple',
    line("completion", "abc", COMPLETIONS),
    line("hot", "hi", temperature="hot"),
    line("guided", "hi", guided_choice=["a", "b"]),
    line("structured", "hi", structured_outputs={"choice": ["a", "b"]}),
    line("parts", [{"type": "text", "text": "hi"}, {"type": "text", "text": "you"}], max_tokens=10),
    line("long", "hi", max_tokens=100_000),
    line("unknown", "hi", max_token=5),
]


def of_ours(row: dict[str, Any]) -> tuple[str | None, bool, str]:
    """Return id, whether a row of our own format is good, and its text or the message of its error."""
    error = row["error"]
    return row["id"], error is None, row["text"] if error is None else error["message"]


def of_openai(line: dict[str, Any]) -> tuple[str | None, bool, str]:
    """Return the same of a line of OpenAI's format."""
    body, code = line["response"]["body"], line["response"]["status_code"]
    if code != 200:
        return line["custom_id"], False, body["error"]["message"]
    [choice] = body["choices"]
    return line["custom_id"], True, choice["text"] if "text" in choice else choice["message"]["content"]


@pytest.mark.parametrize(("output_format", "parts"), [("auto", of_openai), ("jsonl", of_ours)])
def test_ten_lines_of_a_batch_are_ten_lines_in_order_each_good_or_with_its_cause(
    tmp_path: Path, output_format: Any, parts: Any
) -> None:
    found = [parts(row) for row in run(tmp_path, *TEN_LINES, output_format=output_format)]
    expected = [
        ("good", "[u"),
        ("good", "as at rows.jsonl:1 already"),
        (None, "is not JSON"),
        ("completion", "abcabcabcabcabca"),
        ("hot", "\"temperature\" is 'hot'; it must be a number"),
        ("guided", '"guided_choice" is ["a", "b"]; it is not served yet'),
        ("structured", '"structured_outputs" is {"choice": ["a", "b"]}; it is not served yet'),
        ("parts", "[user]hi\nyo"[:10]),
        ("long", "asks for 100000 more, and the model's context is 2048"),
        ("unknown", 'the nearest is "max_tokens"'),
    ]
    assert [identity for identity, _, _ in found] == [identity for identity, _ in expected]
    assert [index for index, (_, good, _) in enumerate(found) if good] == [0, 3, 7]
    assert [(text, cause) for (*_, text), (_, cause) in zip(found, expected, strict=True) if cause not in text] == []


def test_what_a_line_asks_for_is_no_meta(tmp_path: Path) -> None:
    [row] = run(tmp_path, {**line("a", "hi"), "tag": "x"}, output_format="jsonl")
    assert row["meta"] == {"tag": "x"}


def test_columns_of_other_names_are_answered_under_their_ids(tmp_path: Path) -> None:
    rows = [{"key": f"k{index}", "question": "hi", "answer": 5, "id": 0} for index in range(2)]
    found = run(tmp_path, *rows, column=("prompt=question", "id=key"))
    assert [(row["id"], row["text"], row["meta"]) for row in found] == [
        (f"k{index}", "hihi", {"answer": 5, "id": 0}) for index in range(2)
    ]


def test_a_row_without_a_column_of_the_prompt_template_is_an_error_row(tmp_path: Path) -> None:
    found = run(tmp_path, {"text": "hi"}, {"other": "hi"}, prompt_template="de: {text}")
    assert [row["error"] and row["error"]["kind"] for row in found] == [None, "prompt"]


def test_a_corpus_of_other_columns_is_refused_with_the_flag_before_anything_runs(tmp_path: Path) -> None:
    with pytest.raises(Refusal, match=r'\["question", "answer"\].*--column prompt=question'):
        run(tmp_path, {"question": "hi", "answer": "yo"})


@pytest.mark.parametrize(
    ("rule", "prompt"), [("continue", "[user]hi[assistant]yo"), ("drop", "[user]hi"), ("keep", "[user]hi[assistant]yo")]
)
def test_a_last_turn_of_the_assistant_is_part_of_the_prompt_or_not(tmp_path: Path, rule: Any, prompt: str) -> None:
    turns = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "yo"}]
    [row] = run(tmp_path, {"messages": turns}, last_assistant=rule)
    assert row["usage"]["prompt_tokens"] == len(prompt)


def test_what_is_ignored_is_said_once(tmp_path: Path) -> None:
    lines = [line(str(index), "hi", model="gpt", foo=1, max_tokens=2) for index in range(3)]
    run(tmp_path, *lines, unknown_parameters="ignore")
    log = (tmp_path / "runs/rows/log/0001-00000.log").read_text()
    said = [text for text in log.splitlines() if "2 more rows" in text]
    assert ['"foo"' in text for text in said] == [True, False]
    assert "the model gpt; echo answers them" in said[1]


def test_a_run_begun_with_other_columns_is_refused(tmp_path: Path) -> None:
    run(tmp_path, {"a": "hi", "b": "yo"}, column=("prompt=a",))
    with pytest.raises(Refusal, match="was begun with prompts from"):
        run(tmp_path, {"a": "hi", "b": "yo"}, column=("prompt=b",))


@pytest.mark.parametrize("wrong", [(), ("prompt=c",)])
def test_a_run_that_failed_before_a_row_was_finished_takes_new_columns(tmp_path: Path, wrong: tuple[str, ...]) -> None:
    rows = [{"a": "hi", "c": ""}]
    with contextlib.suppress(Refusal):  # a corpus without prompts is refused; one of empty prompts has errors alone
        run(tmp_path, *rows, column=wrong)
    assert (tmp_path / "runs/rows/state").read_text() == "failed\n"
    assert run(tmp_path, *rows, column=("prompt=a",))[0]["error"] is None


def test_a_run_of_another_chat_template_is_refused(tmp_path: Path) -> None:
    rows = [{"messages": [{"role": "user", "content": "hi"}]}]
    template = tmp_path / "t.jinja"
    for text in ("one", "two"):
        template.write_text(text)
        if text == "one":
            run(tmp_path, *rows, chat_template=str(template))
    with pytest.raises(Refusal, match="was begun with template file:"):
        run(tmp_path, *rows, chat_template=str(template))


def test_a_chat_template_that_is_not_there_is_refused(tmp_path: Path) -> None:
    with pytest.raises(Refusal, match=r'the chat template "t.jinja" cannot be read'):
        run(tmp_path, {"prompt": "hi"}, chat_template="t.jinja")


def test_the_token_store_says_what_prompts_were_made_of(tmp_path: Path) -> None:
    run(tmp_path, {"a": "hi"}, column=("prompt=a",))
    assert json.loads((tmp_path / "runs/rows/store.json").read_text())["inputs"]["prompts"] == {"column": ["prompt=a"]}


KEYS = [
    "prompt", "messages", "prompt_token_ids", "id", "sampling", "conversations", "custom_id", "url", "method", "body",
    "role", "content", "from", "value", "type", "text", "tool_calls", "function", "arguments", "question", *CHAT_KEYS,
]  # fmt: skip
NUMBERS = st.integers(-2, 5000) | st.floats(allow_nan=False, allow_infinity=False)
ANY = st.recursive(
    st.none() | st.booleans() | NUMBERS | st.text(max_size=3),
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(st.sampled_from(KEYS), inner, max_size=3),
    max_leaves=6,
)
ROWS = st.dictionaries(st.sampled_from(KEYS), ANY, max_size=6)
TURNS = st.fixed_dictionaries({"role": st.sampled_from(["user", "assistant"]), "content": st.text(max_size=3) | ANY})
CHATS = st.fixed_dictionaries({"messages": st.lists(TURNS | ANY)}, optional=dict.fromkeys(CHAT_KEYS, ANY))


@settings(deadline=None, max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(rows=st.lists(ROWS | CHATS, min_size=1, max_size=8))
@pytest.mark.parametrize("knobs", [{}, {"last_assistant": "continue", "system": "s", "unknown_parameters": "ignore"}])
def test_any_row_becomes_a_request_or_an_error(tmp_path: Path, knobs: dict[str, Any], rows: list[Any]) -> None:
    columns = Columns.of(Job("m", ("c",), **knobs))
    corpus = write_corpus(tmp_path / "rows.jsonl", rows)
    [block] = Blocks(name_files([corpus]))
    found = make_checker(columns=columns).check_block(block)
    assert len(found["lengths"]) == len(rows)
    assert found["refused"].tolist() == [int(length == 0) for length in found["lengths"]]


@pytest.mark.parametrize("value", [[], {}, [[1]], {"a": [None]}, "x", "\ud800", -1, 0, True, 1e300, 10**30])
@pytest.mark.parametrize("url", [CHAT, COMPLETIONS])
def test_any_value_of_any_parameter_becomes_a_request_or_an_error(tmp_path: Path, url: str, value: Any) -> None:
    plain: dict[str, Any] = {"prompt": "a"} if url == COMPLETIONS else {"messages": [{"role": "user", "content": "a"}]}
    bodies = [{**plain, name: value} for name in sorted(known_parameters(url))]
    lines = [{"custom_id": str(index), "url": url, "body": body} for index, body in enumerate(bodies)]
    odd = [{**lines[0], name: value} for name in ("custom_id", "url", "method", "body")]
    corpus = write_corpus(tmp_path / "rows.jsonl", [*lines, *odd])
    columns = Columns.of(Job("m", ("c",), unknown_parameters="ignore"))
    [block] = Blocks(name_files([corpus]))
    found = make_checker(columns=columns).check_block(block)
    assert found["refused"].tolist() == [int(length == 0) for length in found["lengths"]]
