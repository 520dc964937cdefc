"""The bytes of a line are those that the json module writes of the row's value, however the line is put together."""

import json
from typing import Any

from hypothesis import example, given, settings
from hypothesis import strategies as st

from hpc.corpus.formats import Place
from hpc.output.formats.jsonl import Jsonl
from hpc.output.journal import Spans, encode
from hpc.output.merge import merge
from hpc.output.row import OutputRow
from hpc.request import Completion
from tests.output.test_journal import COMPLETION
from tests.test_quick_json import TEXT, VALUES

JSONL = Jsonl()
SOURCE = st.dictionaries(TEXT, VALUES, max_size=4)


def row_of(completion: Completion, source: dict[str, Any], return_token_ids: bool) -> OutputRow:
    given_rows = [(0, Place("c", 1), source)]
    [row] = merge(given_rows, [], [[(0, encode(completion))]], [7], return_token_ids)
    return row


def by_json(row: OutputRow, completion: Completion, return_token_ids: bool) -> bytes:
    """Return the line of a row by the json module alone."""
    value = OutputRow(0, row.id, row.meta, completion, 7, return_token_ids).value
    try:
        return json.dumps(value, ensure_ascii=False).encode() + b"\n"
    except UnicodeEncodeError:
        return json.dumps(value).encode() + b"\n"


@settings(deadline=None)
@given(COMPLETION, SOURCE, st.booleans())
@example(Completion(bytes(16), 0, '"text":"', (1,), '],"text":"', "stop"), {"id": '"token_ids":['}, True)
@example(Completion(bytes(16), 0, 0, (), "\\u0041 \x7f é\ud800", "length"), {"id": 2**70, "x": 1e-7}, False)
def test_a_line_is_what_the_json_module_writes(
    completion: Completion, source: dict[str, Any], return_token_ids: bool
) -> None:
    row = row_of(completion, source, return_token_ids)
    assert JSONL.entry(row) == by_json(row, completion, return_token_ids)


@settings(deadline=None)
@given(COMPLETION)
def test_a_value_is_the_same_from_the_pieces_of_a_record_as_from_all_of_it(completion: Completion) -> None:
    assert row_of(completion, {"id": 0}, True).value == OutputRow(0, 0, {}, completion, 7, True).value


def test_a_good_completion_of_one_sample_is_not_decoded() -> None:
    row = row_of(Completion(bytes(16), 0, 0, (1, 22), "text", "stop"), {"id": 0}, False)
    assert row.answer == Spans(b"stop", b"1,22", b'"text"', 2)
