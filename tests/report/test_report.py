"""The report of a run: tables on the terminal, a page that needs nothing else."""

import re
import xml.etree.ElementTree as ElementTree
from collections import Counter
from html.parser import HTMLParser
from pathlib import Path

import pytest

from hpc.exit import Refusal
from hpc.report.report import report
from hpc.report.timeline import KINDS
from tests.conftest import ROOT, Ended, Scattergen, finish, start, write_corpus
from tests.report.test_timeline import DONE, Event, attempt_with_steps, counts, event, plan, write_run

REPORT = """
import sys
from pathlib import Path

sys.path[:0] = [sys.argv[1]]
from hpc.report.report import report

code = report([Path(path) for path in sys.argv[2:]])
loaded = sorted({name.split(".")[0] for name in sys.modules} & {"torch", "transformers", "mpi4py", "matplotlib"})
print(code, loaded)
"""

VOID = {"meta", "br", "link", "img", "input", "hr"}


class Page(HTMLParser):
    """A page's elements, ids and what they refer to; raises where one ends that is not the innermost."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: Counter[str] = Counter()
        self.ids: list[str] = []
        self.references: list[str] = []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_startendtag(tag, attrs)
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags[tag] += 1
        for name, value in attrs:
            if name == "id":
                self.ids.append(value or "")
            elif name in ("src", "href", "xlink:href", "action", "data"):
                self.references.append(value or "")

    def handle_endtag(self, tag: str) -> None:
        if self.open.pop() != tag:
            raise ValueError(f"</{tag}> ends something else")


def later(event: Event, seconds: float) -> Event:
    times = {name: event[name] + seconds for name in ("time", "began", "ended") if name in event}
    return {**event, **times}


def make_run(path: Path) -> Path:
    """Write a run of two ranks, begun three times: done, gone on with, killed."""
    files = dict(DONE)
    for number in (2, 3):
        for rank, kept in ((0, 12), (1, 4)):
            events = DONE[f"0001-{rank:05d}"][:kept]
            files[f"{number:04d}-{rank:05d}"] = [later(e, 1000 * number) for e in events]
    return write_run(path, files, padding=0.25)


@pytest.fixture
def run(tmp_path: Path) -> Path:
    return make_run(tmp_path / "run")


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> str:
    run = make_run(tmp_path_factory.mktemp("page") / "run")
    assert report([run]) == 0
    return (run / "report.html").read_text(encoding="utf-8")


def svgs(page: str) -> list[str]:
    return re.findall(r"<svg.*?</svg>", page, re.DOTALL)


def cells(printed: str, first: str) -> list[str]:
    """The cells of the printed line that begins with a cell."""
    (line,) = [line for line in printed.splitlines() if line.split("  ")[1:2] == [first]]
    return re.split(r"\s{2,}", line.strip())


def test_the_tables_say_where_the_time_went(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    report([write_run(tmp_path / "run", DONE)], html=False)
    printed = capsys.readouterr().out
    shares = ["0.0%", "0.0%", "7.3%", "5.5%", "0.0%", "0.0%", "0.0%", "67.3%", "2.7%", "4.5%", "0.0%", "0.0%",
              "7.3%", "5.5%", "100.0%"]  # fmt: skip
    assert cells(printed, "share")[1:] == shares
    assert re.search(r"^  1 +0 +0 +16 +12 +0 +0 +0 +148 +6 +10 +0 +0 +16 +12 +220 *$", printed, re.MULTILINE)


def test_what_was_predicted_stands_beside_what_it_took(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    attempt_with_steps(tmp_path, prefill_s=30.0, decode_s=25.0)
    report([tmp_path / "run"], html=False)
    printed = capsys.readouterr().out
    assert "predicted to take 1 min 20 s (1 min 10 s to 1 min 35 s), and took 1 min 10 s (-12%)" in printed
    assert "the device at its fastest would have needed 18% of the time in steps" in printed
    assert "500 of 4,500 prompt tokens were shared, and not computed (11%)" in printed


def test_the_tables_say_what_each_attempt_did(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    report([run], html=False)
    lines = capsys.readouterr().out.splitlines()
    begun = [line for line in lines if re.match(r"  \d  ", line)][:3]
    assert [re.split(r"\s{2,}", line.strip())[-2:] for line in begun] == [
        ["done", "77"], ["interrupted", "77"], ["interrupted", "77"]
    ]  # fmt: skip


def test_a_table_is_not_cut_on_a_narrow_terminal(run: Path) -> None:
    ended = finish(start(["-c", REPORT, ".", str(run)], COLUMNS="40", PYTHONPATH=str(ROOT)))
    assert "Slurm job" in ended.out
    assert "…" not in ended.out


def test_without_html_there_is_no_page(run: Path) -> None:
    assert report([run], html=False) == 0
    assert not (run / "report.html").exists()


def test_guessed_tokens_and_padding_are_told_where_there_are_any(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    events = [plan(0), counts(9, "generated", 1, 9, guessed_tokens=40, accepted_tokens=30, requests=10)]
    report([write_run(tmp_path / "run", {"0001-00000": [*events, event(9, "done")]}, padding=0.25)], html=False)
    printed = capsys.readouterr().out
    assert "40 tokens guessed, 30 of them right (75%)" in printed
    assert "at most 25.0% padding" in printed
    assert "1 row answered by another row's completion in attempt 1" in printed


def test_the_page_is_well_formed_html(page: str) -> None:
    parsed = Page(page)
    assert (parsed.open, parsed.tags["html"], parsed.tags["h1"]) == ([], 1, 1)


def test_the_page_refers_to_nothing_outside(page: str) -> None:
    outside = re.sub(r'xmlns(:\w+)?="[^"]*"', "", page)
    assert re.findall(r"https?:|@import|url\((?!#)", outside) == []
    assert [reference for reference in Page(page).references if not reference.startswith("#")] == []


def test_the_page_has_no_script(page: str) -> None:
    assert Page(page).tags["script"] == 0
    assert re.findall(r"\son\w+=", page) == []


def test_every_picture_is_well_formed_xml(page: str) -> None:
    pictures = svgs(page)
    assert len(pictures) == 2 + 3
    for picture in pictures:
        ElementTree.fromstring(picture)


def test_the_ids_of_a_page_are_its_own_and_what_refers_to_them_finds_them(page: str) -> None:
    parsed = Page(page)
    wanted = re.findall(r"url\(#([^)]*)\)", page) + [r[1:] for r in parsed.references]
    assert [name for name, count in Counter(parsed.ids).items() if count > 1] == []
    assert wanted
    assert set(wanted) <= set(parsed.ids)


def test_the_page_is_for_light_and_dark(page: str) -> None:
    light, dark = page.split("@media (prefers-color-scheme: dark)")
    for name in ("ink", "paper", *KINDS):
        assert (f"--{name}: #" in light, f"--{name}: #" in dark) == (True, True), name


def test_every_colour_of_a_picture_is_one_of_the_page(page: str) -> None:
    for picture in svgs(page):
        colours = set(re.findall(r"(?:fill|stroke): *([^;\"]*)", picture))
        assert {colour for colour in colours if not colour.startswith("var(--")} <= {"none"}


def test_the_words_of_a_picture_are_text(page: str) -> None:
    words = [text for picture in svgs(page) for text in re.findall(r"<text[^>]*>([^<]*)</text>", picture)]
    assert {"rank 0", "rank 1", "tokens/s", "attempt 3"} <= set(words)


def test_the_page_is_for_phones_too(page: str) -> None:
    assert '<meta name="viewport" content="width=device-width' in page
    assert "overflow-x: auto" in page
    assert page.count('<div class="scroll">') == page.count("<table") + page.count("<svg")


def test_the_figures_of_the_page_are_those_of_the_terminal(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    report([run])
    printed, page = capsys.readouterr().out, (run / "report.html").read_text()
    row = "".join(f"<td>{cell}</td>" for cell in cells(printed, "share"))
    assert row in page


def test_what_stands_in_a_run_is_not_taken_for_html(tmp_path: Path) -> None:
    path = write_run(tmp_path / "a<b>&", DONE)
    report([path])
    page = (path / "report.html").read_text()
    assert "a&lt;b&gt;&amp;" in page
    assert "<b>" not in page


def test_a_run_with_very_many_ranks_has_a_picture_of_some(tmp_path: Path) -> None:
    files = {f"0001-{rank:05d}": DONE["0001-00001"] for rank in range(1, 150)}
    path = write_run(tmp_path / "run", {"0001-00000": DONE["0001-00000"], **files})
    report([path])
    page = (path / "report.html").read_text()
    assert "64 of 150 ranks" in page
    assert len(page) < 1_000_000


def test_two_runs_are_compared_row_by_row(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    one = write_run(tmp_path / "one", DONE)
    slower = [plan(0), counts(100, "generated", 20, 100, load_s=6.0, generated_tokens=900, requests=10)]
    other = write_run(tmp_path / "other", {"0001-00000": [*slower, event(110, "done")]})
    assert report([one, other], html=False) == 0
    printed = capsys.readouterr().out
    assert cells(printed, "tokens") == ["tokens", "1,800", "900", "0.50"]
    assert cells(printed, "total time, s") == ["total time, s", "110", "110", "1.00"]
    assert cells(printed, "loading the model") == ["loading the model", "12", "6", "0.50"]
    assert cells(printed, "reading and tokenizing") == ["reading and tokenizing", "16", "0", "0"]


def test_the_page_of_a_comparison_stands_beside_the_first_runs_own(tmp_path: Path) -> None:
    one, other = (write_run(tmp_path / name, DONE) for name in ("one", "other"))
    assert report([one, other]) == 0
    page = Page((one / "report-versus-other.html").read_text())
    assert (page.open, page.tags["svg"]) == ([], 3)
    assert not (one / "report.html").exists()
    assert not list(other.glob("*.html"))


def test_more_than_two_runs_are_refused(run: Path) -> None:
    with pytest.raises(Refusal, match="one run directory, or two to compare, not 3"):
        report([run, run, run])


@pytest.mark.parametrize("files", [{}, {"0001-00000": []}])
def test_a_run_that_has_said_nothing_is_said_to(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], files: dict[str, list[Event]]
) -> None:
    path = write_run(tmp_path / "run", files)
    assert report([path]) == 0
    printed = capsys.readouterr().out
    assert "nothing to report yet" in printed
    assert str(path / "events") in printed


@pytest.mark.parametrize("length", range(1, 8))
def test_a_run_has_a_page_from_its_first_event_on(tmp_path: Path, length: int) -> None:
    path = write_run(tmp_path / "run", {"0001-00000": DONE["0001-00000"][:length]}, "running")
    assert report([path]) == 0
    assert Page((path / "report.html").read_text()).open == []


def test_a_run_that_fails_to_take_the_page_still_has_its_tables(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (run / "report.html").mkdir()
    assert report([run]) == 1
    captured = capsys.readouterr()
    assert "cannot write" in captured.err
    assert "rank-seconds" in captured.out


def with_path(folder: Path, *runs: Path) -> Ended:
    return finish(start(["-c", REPORT, str(folder), *map(str, runs)], PYTHONPATH=str(ROOT)))


def test_without_matplotlib_the_tables_come_and_a_line_says_how_to_get_the_page(tmp_path: Path, run: Path) -> None:
    (tmp_path / "hidden" / "matplotlib").mkdir(parents=True)
    (tmp_path / "hidden" / "matplotlib" / "__init__.py").write_text("raise ImportError('no matplotlib')")
    ended = with_path(tmp_path / "hidden", run)
    assert "rank-seconds" in ended.out
    [line] = [line for line in ended.out.splitlines() if "pip install 'scattergen[report]'" in line]
    assert "matplotlib" in line
    assert (ended.out.splitlines()[-1], (run / "report.html").exists(), ended.err) == ("0 []", False, "")


def test_neither_torch_nor_mpi_is_loaded_for_a_report(tmp_path: Path, run: Path) -> None:
    ended = with_path(tmp_path, run)
    assert ended.out.splitlines()[-1] == "0 ['matplotlib']", ended.err


def test_matplotlib_is_loaded_for_the_page_alone() -> None:
    loaded = "import hpc.report.report, sys; print('matplotlib' in sys.modules)"
    assert finish(start(["-c", loaded], PYTHONPATH=str(ROOT))).out == "False\n"


def test_a_real_run_of_two_ranks_has_a_report(
    tmp_path: Path, echo: Scattergen, capsys: pytest.CaptureFixture[str]
) -> None:
    corpus = write_corpus(tmp_path / "c.jsonl", [{"prompt": f"row {i}"} for i in range(30)])
    assert echo(corpus, ranks=2).code == 0
    assert report([tmp_path / "runs" / "c"]) == 0
    assert "echo with the native engine in float32; 1 attempt, the last of them done" in capsys.readouterr().out
    assert Page((tmp_path / "runs" / "c" / "report.html").read_text()).tags["svg"] == 4
