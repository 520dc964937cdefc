"""Every corpus row gets exactly one output row, in the order of the corpus, or merging says why not."""

import json
from collections.abc import Sequence
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hpc.corpus.errors import RowError
from hpc.corpus.formats import Place
from hpc.output.formats.jsonl import Jsonl
from hpc.output.journal import encode
from hpc.output.merge import MergeError, merge
from hpc.output.row import OutputRow
from hpc.request import Completion, Sample

JSONL = Jsonl()
Record = tuple[int, bytes]
REFUSED = {"kind": "empty", "message": "c:1: empty"}
BROKEN = {"kind": "engine", "message": "out of memory"}


def record(row: int, text: str | None = "text", error: dict[str, str] | None = None) -> Record:
    reason: Any = "error" if error else "stop"
    return row, encode(Completion(bytes(16), row, f"id{row}", () if error else (7, 8), text, reason, error))


def merged(
    rows: Sequence[Any],
    *streams: Sequence[Record],
    errors: Sequence[tuple[int, dict[str, str]]] = (),
    return_token_ids: bool = False,
) -> list[OutputRow]:
    """Merge corpus rows whose prompts have 10, 11, 12, … tokens."""
    given = [(row, Place("c", row + 1), value) for row, value in enumerate(rows)]
    return list(merge(given, errors, streams, range(10, 10 + len(rows)), return_token_ids))


def output(row: OutputRow) -> dict[str, Any]:
    assert row.answer is not None
    value: dict[str, Any] = json.loads(JSONL.entry(row))
    return value


def prompts(number: int) -> list[Any]:
    return [{"prompt": "a", "id": f"id{row}"} for row in range(number)]


@settings(deadline=None)
@given(whose=st.lists(st.sampled_from(["error", "missing", 0, 1, 2]), max_size=20))
def test_every_row_comes_out_once_and_in_order_whoever_answers_it(whose: list[Any]) -> None:
    streams = [[record(row) for row, stream in enumerate(whose) if stream == number] for number in range(3)]
    errors = [(row, REFUSED) for row, answer in enumerate(whose) if answer == "error"]
    rows = merged(prompts(len(whose)), *streams, errors=errors)
    assert [(row.row, row.id) for row in rows] == [(row, f"id{row}") for row in range(len(whose))]
    assert [row.answer is None for row in rows] == [answer == "missing" for answer in whose]
    assert [row.error is not None for row in rows] == [answer == "error" for answer in whose]
    assert all(output(row)["id"] == row.id for row in rows if row.answer is not None)


def test_a_completion_is_written_with_what_it_used() -> None:
    [row] = merged([{"prompt": "a", "id": "x"}], [record(0)])
    assert JSONL.entry(row) == (
        b'{"id": "x", "text": "text", "finish_reason": "stop", '
        b'"usage": {"prompt_tokens": 10, "completion_tokens": 2}, "error": null}\n'
    )


def test_an_output_row_says_how_many_tokens_were_generated_for_it() -> None:
    assert merged(prompts(1), [record(0)])[0].completion_tokens == 2


def test_a_refused_row_is_written_with_what_was_wrong() -> None:
    [row] = merged([{"prompt": "", "id": 3}], errors=[(0, REFUSED)])
    usage = {"prompt_tokens": 0, "completion_tokens": 0}
    assert output(row) == {"id": 3, "text": None, "finish_reason": "error", "usage": usage, "error": REFUSED}


def test_an_engine_error_is_written_without_text() -> None:
    [row] = merged(prompts(1), [record(0, None, BROKEN)])
    found = output(row)
    assert (row.error is not None, found["text"], found["finish_reason"], found["error"]) == (
        True,
        None,
        "error",
        BROKEN,
    )


def test_a_row_that_cannot_be_read_is_written_without_an_id() -> None:
    rows = merged(
        [{"prompt": "a", "id": "id0"}, RowError("not_json", "{ is not JSON")], [record(0)], errors=[(1, REFUSED)]
    )
    assert (rows[1].id, output(rows[1])["id"]) == (None, None)


def test_a_row_with_a_wrong_id_is_written_without_one_and_with_its_meta() -> None:
    [row] = merged([{"prompt": "a", "id": 1.5, "tag": "x"}], errors=[(0, REFUSED)])
    assert (output(row)["id"], output(row)["meta"]) == (None, {"tag": "x"})


def test_every_other_key_of_a_row_is_carried_as_meta() -> None:
    [row] = merged([{"prompt": "a", "sampling": {}, "tag": {"deep": [1, None]}, "null": None}], [record(0)])
    assert output(row)["meta"] == {"tag": {"deep": [1, None]}, "null": None}


def test_the_id_is_the_rows_own_where_it_shares_a_completion() -> None:
    shared = record(0)[1]
    rows = merged(prompts(2), [(0, shared), (1, shared)])
    assert [(output(row)["id"], output(row)["text"]) for row in rows] == [("id0", "text"), ("id1", "text")]


def test_token_ids_are_written_where_asked_for() -> None:
    [row] = merged(prompts(1), [record(0)], return_token_ids=True)
    assert output(row)["token_ids"] == [7, 8]


LOGPROBS = ((-0.25, ((7, -0.25), (9, -2.5))), (-1.5, ((9, -0.5), (8, -1.5))))
WRITTEN = {
    "token_ids": [7, 8],
    "token_logprobs": [-0.25, -1.5],
    "top_logprobs": [[[7, -0.25], [9, -2.5]], [[9, -0.5], [8, -1.5]]],
}


def several(logprobs: bool = False) -> Record:
    """Return a record of three samples."""
    others = Sample((7,), "two", "length", LOGPROBS[:1] if logprobs else None), Sample((), "", "stop")
    first = LOGPROBS if logprobs else None
    return 0, encode(Completion(bytes(16), 0, "id0", (7, 8), "one", "stop", None, first, others))


def test_all_samples_are_written_and_the_row_says_what_the_first_is() -> None:
    [row] = merged(prompts(1), [several()])
    found = output(row)
    assert (found["text"], found["finish_reason"]) == ("one", "stop")
    assert found["samples"] == [
        {"text": "one", "finish_reason": "stop", "usage": {"completion_tokens": 2}},
        {"text": "two", "finish_reason": "length", "usage": {"completion_tokens": 1}},
        {"text": "", "finish_reason": "stop", "usage": {"completion_tokens": 0}},
    ]


def test_the_tokens_of_all_samples_are_the_rows() -> None:
    [row] = merged(prompts(1), [several()])
    assert output(row)["usage"] == {"prompt_tokens": 10, "completion_tokens": 3}
    assert row.completion_tokens == 3


def test_the_token_ids_of_all_samples_are_written_where_asked_for() -> None:
    [row] = merged(prompts(1), [several()], return_token_ids=True)
    assert (output(row)["token_ids"], [s["token_ids"] for s in output(row)["samples"]]) == ([7, 8], [[7, 8], [7], []])


def test_one_sample_is_no_list_of_samples() -> None:
    assert "samples" not in output(merged(prompts(1), [record(0)])[0])


def test_log_probabilities_are_written_beside_their_tokens() -> None:
    one = Completion(bytes(16), 0, "id0", (7, 8), "one", "stop", logprobs=LOGPROBS)
    [row] = merged(prompts(1), [(0, encode(one))])
    assert output(row)["logprobs"] == WRITTEN


def test_log_probabilities_of_the_chosen_tokens_alone_have_no_others_beside_them() -> None:
    one = Completion(bytes(16), 0, "id0", (7, 8), "one", "stop", logprobs=((-0.25, ()), (-1.5, ())))
    [row] = merged(prompts(1), [(0, encode(one))])
    assert output(row)["logprobs"] == {"token_ids": [7, 8], "token_logprobs": [-0.25, -1.5]}


def test_each_sample_is_written_with_its_log_probabilities() -> None:
    found = output(merged(prompts(1), [several(logprobs=True)])[0])
    assert [found["logprobs"], found["samples"][0]["logprobs"]] == [WRITTEN] * 2
    assert found["samples"][1]["logprobs"]["token_logprobs"] == [-0.25]


def test_text_is_written_as_utf_8() -> None:
    [row] = merged(prompts(1), [record(0, "é€𝄞\u2028")])
    assert "é€𝄞\u2028".encode() in JSONL.entry(row)


@pytest.mark.parametrize("key", ["id", "tag"])
def test_half_of_a_surrogate_pair_is_written_escaped(key: str) -> None:
    [row] = merged([{"prompt": "a", key: "\ud800"}], [record(0, "é")])
    assert rb"\ud800" in JSONL.entry(row)
    assert output(row)["text"] == "é"


def test_a_row_that_is_answered_twice_is_refused() -> None:
    with pytest.raises(MergeError, match="row 1 is answered twice"):
        merged(prompts(3), [record(0), record(1)], [record(1), record(2)])


def test_a_row_that_is_refused_and_answered_is_refused() -> None:
    with pytest.raises(MergeError, match="row 0 is answered twice, or is refused and answered"):
        merged(prompts(1), [record(0)], errors=[(0, REFUSED)])


@pytest.mark.parametrize(("answers", "errors"), [([record(1)], []), ([], [(1, REFUSED)])])
def test_an_answer_behind_the_end_is_refused(answers: list[Record], errors: list[tuple[int, dict[str, str]]]) -> None:
    with pytest.raises(MergeError, match="behind the end of the corpus"):
        merged(prompts(1), [record(0), *answers], errors=errors)


def test_a_damaged_record_is_refused_with_its_row() -> None:
    row, data = record(1)
    with pytest.raises(MergeError, match="row 1: the record's checksum is wrong; run the job again"):
        merged(prompts(2), [record(0), (row, data.replace(b"text", b"tixt", 1))])
