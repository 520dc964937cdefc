"""Whatever is done to an output, verify names the row."""

import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hpc.corpus.store import TokenStore
from hpc.output.compare import compare
from hpc.output.formats.jsonl import Jsonl
from hpc.output.journal import JournalIndex, JournalWriter
from hpc.output.write import journal_records, output_rows
from hpc.request import Completion
from tests.conftest import write_corpus
from tests.stores import read_store

JSONL = Jsonl()
ROWS = [
    {"prompt": "a"},
    {"prompt": "b", "id": "x", "tag": "é"},
    {"prompt": "", "id": "bad"},
    {"prompt": "a", "id": 7.0},
    {"prompt": "a", "id": "shares the completion of row 0"},
    {"prompt": "c", "id": "x"},
    "{",
    {"prompt": "d", "id": "\ud800"},
    {"prompt": "e"},
]

SAME_ID = 5
"""A refused row whose id an earlier row has: an id alone does not tell its line."""


@dataclass(frozen=True)
class Run:
    """A finished run: its corpus, store and journals, and the lines of its output."""

    corpus: Path
    tokens: TokenStore
    index: JournalIndex
    lines: tuple[bytes, ...]

    def problems(self, path: Path, lines: list[bytes]) -> list[str]:
        """What verify says of an output."""
        path.write_bytes(b"".join(lines))
        records = [journal_records(self.tokens, self.index)]
        rows = output_rows(self.tokens, self.tokens.files, None, records, False)
        return list(compare(JSONL.read(path), rows, self.tokens, JSONL))


def make_run(folder: Path, missing: tuple[int, ...] = ()) -> Run:
    corpus = write_corpus(folder / "corpus.jsonl", ROWS)
    tokens = read_store(folder, [corpus])
    writer = JournalWriter(folder / "journal")
    writer.append(
        Completion(tokens.key(row), row, row, (1, 2), f"text of {row}", "stop")
        for row in range(tokens.num_rows)
        if tokens.good[row] and row not in missing
    )
    writer.close()
    index = JournalIndex([folder / "journal"])
    rows = output_rows(tokens, tokens.files, None, [journal_records(tokens, index)], False)
    path = folder / "completions.jsonl"
    JSONL.write(path, (row for row in rows if row.answer is not None))
    return Run(corpus, tokens, index, tuple(path.read_bytes().splitlines(keepends=True)))


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    return make_run(tmp_path_factory.mktemp("run"))


def names(problems: list[str], row: int) -> bool:
    return any(re.search(rf"\brow {row}\b", problem) for problem in problems)


def test_an_undamaged_output_has_no_problems(run: Run, tmp_path: Path) -> None:
    assert len(run.lines) == len(ROWS)
    assert run.problems(tmp_path / "out", list(run.lines)) == []


def edit(change: Callable[[bytes], bytes]) -> Callable[[list[bytes], int], None]:
    """Make a damage out of a change of one line."""

    def damage(lines: list[bytes], row: int) -> None:
        lines[row] = change(lines[row])

    return damage


DAMAGES: dict[str, Callable[[list[bytes], int], None]] = {
    "missing": lambda lines, row: lines.__delitem__(row),
    "moved to the end": lambda lines, row: lines.append(lines.pop(row)),
    "changed text": edit(lambda line: line.replace(b'"text": ', b'"text": 0', 1)),
    "changed id": edit(lambda line: line.replace(b'{"id": ', b'{"id": 99', 1)),
    "changed reason": edit(lambda line: re.sub(rb'"finish_reason": "\w+"', b'"finish_reason": "length"', line)),
    "changed usage": edit(lambda line: re.sub(rb'"prompt_tokens": \d', b'"prompt_tokens": 5', line)),
    "added key": edit(lambda line: line.replace(b"{", b'{"more": 1, ', 1)),
    "other bytes": edit(lambda line: line.replace(b'": ', b'":  ', 1)),
    "not JSON": edit(lambda line: b"oops\n"),
    "not an object": edit(lambda line: b"[]\n"),
    "not UTF-8": edit(lambda line: b"\xff\n"),
    "blank": edit(lambda line: b"\n"),
    "cut": edit(lambda line: line[:20] + b"\n"),
    "joined to the next": edit(lambda line: line.removesuffix(b"\n")),
    "the file ends within it": lambda lines, row: lines.__setitem__(slice(row, None), [lines[row][:20]]),
    "the file ends before it": lambda lines, row: lines.__delitem__(slice(row, None)),
}


@pytest.mark.parametrize("row", range(1, len(ROWS) - 1))
@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_row_is_named(run: Run, tmp_path: Path, damage: str, row: int) -> None:
    lines = list(run.lines)
    DAMAGES[damage](lines, row)
    assert names(run.problems(tmp_path / "out", lines), row)


@pytest.mark.parametrize("row", range(len(ROWS) - 1))
def test_of_two_lines_that_are_swapped_one_is_named(run: Run, tmp_path: Path, row: int) -> None:
    lines = [*run.lines[:row], run.lines[row + 1], run.lines[row], *run.lines[row + 2 :]]
    problems = run.problems(tmp_path / "out", lines)
    assert names(problems, row) or names(problems, row + 1)


@pytest.mark.parametrize("row", [row for row in range(len(ROWS)) if row + 1 != SAME_ID])
def test_behind_a_missing_line_nothing_else_is_wrong(run: Run, tmp_path: Path, row: int) -> None:
    [problem] = run.problems(tmp_path / "out", [*run.lines[:row], *run.lines[row + 1 :]])
    assert problem.startswith(f"row {row} ")


@pytest.mark.parametrize("row", [row for row in range(len(ROWS)) if row != SAME_ID])
def test_behind_a_doubled_line_nothing_else_is_wrong(run: Run, tmp_path: Path, row: int) -> None:
    [problem] = run.problems(tmp_path / "out", [*run.lines[: row + 1], *run.lines[row:]])
    assert f"(row {row}) stands here again" in problem


def test_a_difference_is_said_with_both_values(run: Run, tmp_path: Path) -> None:
    lines = list(run.lines)
    lines[1] = lines[1].replace(b"text of 1", b"another text")
    assert run.problems(tmp_path / "out", lines) == [
        'row 1 (id \'x\'), line 2: "text" is "another text" and must be "text of 1"'
    ]


@pytest.mark.parametrize("row", range(len(ROWS)))
def test_a_line_that_is_doubled_at_the_end_is_named_by_its_number(run: Run, tmp_path: Path, row: int) -> None:
    [problem] = run.problems(tmp_path / "out", [*run.lines, run.lines[row]])
    assert problem.startswith(f"line {len(ROWS) + 1}: ")


@pytest.mark.parametrize("extra", [b'{"id": "stranger"}\n', b"\n", b"oops"])
def test_an_extra_line_at_the_end_is_named_by_its_number(run: Run, tmp_path: Path, extra: bytes) -> None:
    [problem] = run.problems(tmp_path / "out", [*run.lines, extra])
    assert problem.startswith(f"line {len(ROWS) + 1}: ")


def test_a_row_without_a_completion_is_named_where_the_output_has_one(run: Run, tmp_path: Path) -> None:
    unfinished = make_run(tmp_path, missing=(1,))
    [problem] = unfinished.problems(tmp_path / "out", list(run.lines))
    assert problem == "row 1 (id 'x'), line 2: no journal has its completion"


def test_a_row_without_a_completion_is_named_where_the_output_leaves_it_out(tmp_path: Path) -> None:
    unfinished = make_run(tmp_path, missing=(1,))
    [problem] = unfinished.problems(tmp_path / "out", list(unfinished.lines))
    assert problem.startswith("row 1 ")


@settings(deadline=None)
@given(order=st.lists(st.integers(0, len(ROWS) - 1), max_size=len(ROWS) + 2))
def test_every_row_that_is_not_there_once_and_in_order_is_named(
    run: Run, tmp_path_factory: pytest.TempPathFactory, order: list[int]
) -> None:
    problems = run.problems(tmp_path_factory.mktemp("out") / "out", [run.lines[row] for row in order])
    absent = [row for row in range(len(ROWS)) if row not in order]
    assert [row for row in absent if not names(problems, row)] == []
    assert (problems == []) == (order == list(range(len(ROWS))))
