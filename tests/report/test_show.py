"""Rows of a run on the terminal."""

from collections.abc import Callable
from pathlib import Path

import pytest

from hpc.exit import Refusal
from hpc.report.show import MAX_CHARS, printable, show
from tests.conftest import scattergen
from tests.report.echo_run import make_run, unfinish

Shown = Callable[..., str]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_run(tmp_path_factory.mktemp("show"))


@pytest.fixture
def shown(run: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Shown:
    """Shows rows, and returns what was printed."""
    monkeypatch.setenv("COLUMNS", "100")

    def printed(
        *where: str, ids: tuple[str, ...] = (), sample: int | None = None, rows: int = 10, whole: bool = False
    ) -> str:
        assert show(run, where, ids, sample, rows, whole) == 0
        return capsys.readouterr().out

    return printed


def test_input_and_output_stand_beside_each_other(shown: Shown) -> None:
    [line] = [line for line in shown(ids=("a",)).splitlines() if "Say <b>hi</b> & go" in line]
    assert line.split() == ["Say", "<b>hi</b>", "&", "go", "Say", "<b>h"]


def test_a_row_says_its_index_id_place_lengths_and_ending(shown: Shown) -> None:
    printed = shown(ids=("a",))
    for word in ("row 0", "'a'", "c.jsonl:1", "18 tokens", "length", "8 tokens"):
        assert word in printed


def test_the_turns_of_a_chat_have_their_roles(shown: Shown) -> None:
    printed = shown(ids=("17",))
    assert "system: Be kind." in printed
    assert "user: Hello" in printed


def test_all_samples_are_shown(shown: Shown) -> None:
    printed = shown(ids=("3",))
    assert "sample 0, length: thr" in printed
    assert "sample 1, length: hre" in printed


def test_a_refused_row_says_what_was_wrong(shown: Shown) -> None:
    printed = shown("finish_reason=error")
    assert "row 2" in printed
    assert "empty: c.jsonl:3" in printed
    assert "1 shown" in printed


def test_no_more_rows_than_asked_for_are_shown(shown: Shown) -> None:
    printed = shown(rows=2)
    assert [f"row {row}" in printed for row in range(4)] == [True, True, False, False]


def test_a_sample_is_of_the_rows_that_fulfil_the_conditions(shown: Shown) -> None:
    assert "3 shown with meta.lang=de" in shown("meta.lang=de", sample=9)


def test_where_no_row_fulfils_the_conditions_it_says_how_many_there_are(shown: Shown) -> None:
    printed = shown("text=nothing")
    assert "no row with text=nothing" in printed
    assert "6 rows" in printed


def test_a_long_text_is_cut_and_all_of_it_is_there_when_asked_for(shown: Shown) -> None:
    cut, whole = shown("prompt_tokens=2040"), shown("prompt_tokens=2040", whole=True)
    assert f"{2040 - MAX_CHARS:,} more characters (--whole)" in cut.replace("\n", "")
    assert whole.count("x") - cut.count("x") == 2040 - MAX_CHARS


def test_what_would_command_a_terminal_is_shown_as_an_escape(shown: Shown) -> None:
    printed = shown(ids=("4",))
    assert r"a \x1b[31mred \u202eone" in printed
    assert "\x1b" not in printed


@pytest.mark.parametrize("text", ["a\tb\nc", "全角　空白", "👩‍🚀", "é ß"])
def test_text_of_any_script_is_printed_as_it_is(text: str) -> None:
    assert printable(text) == text


def test_a_narrow_terminal_still_gets_two_columns(shown: Shown, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "20")
    assert any("input, 18 tokens" in line and "output" in line for line in shown(ids=("a",)).splitlines())


@pytest.mark.parametrize(("flag", "values"), [("--sample", (0, 10)), ("--rows", (None, 0))])
def test_a_number_below_1_is_refused(run: Path, flag: str, values: tuple[int | None, int]) -> None:
    with pytest.raises(Refusal, match=f"{flag} is 0; it must be at least 1"):
        show(run, (), (), *values, False)


def test_a_row_without_a_completion_yet_is_shown_where_its_id_names_it(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = [{"id": "first", "prompt": "one"}, {"id": "last", "prompt": "two", "sampling": {"max_new_tokens": 9}}]
    run = make_run(tmp_path, rows)
    unfinish(run)
    assert show(run, (), ("first", "last"), None, 10, False) == 0
    printed = capsys.readouterr().out
    assert "2 shown; 2 rows, 1 of them with a completion or an error" in printed
    assert printed.count("no completion yet") == 1


def test_the_verb_shows_rows_without_torch_or_mpi(run: Path) -> None:
    ended = scattergen("show", str(run), "--where", "meta.lang=de", "finish_reason=length", "--sample", "5")
    assert ended.code == 0
    assert "2 shown with meta.lang=de with finish_reason=length" in ended.out
