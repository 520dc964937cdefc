"""The table of architectures: what its script asks, and that the page is up to date."""

from tests.bench.architectures import FAMILIES, HEADING, PAGE, page, row, verdict
from tests.engine.models import CONFIGS, build_engine, tiny

CELLS = ["BLOOM", "`bloom`", "yes", "no: a reason"]


def test_the_page_has_a_line_for_every_family() -> None:
    lines = PAGE.read_text("utf-8").partition(HEADING)[2].splitlines()
    assert [line.split(" | ")[0].removeprefix("| ") for line in lines if "`" in line and line[0] == "|"][1:] == [
        *FAMILIES
    ]


def test_the_page_is_made_anew_with_what_was_known_of_vllm() -> None:
    old = page([CELLS], "")
    assert old.endswith("\n| BLOOM | `bloom` | yes | no: a reason | |\n")
    known = old.replace("a reason | |", "a reason | yes |")
    assert page([CELLS], known) == known


def test_a_family_that_gives_other_tokens_is_not_served() -> None:
    assert (
        verdict([[1], [2], [3]], lambda: build_engine(tiny(CONFIGS["llama"]), "torch")) == "no: its tokens are others"
    )


def test_blooms_line_says_that_native_and_hf_serve_it() -> None:
    assert row("BLOOM, BLOOMZ")[2:] == ["yes", "yes"]
