"""The table of architectures: what its script asks, and that the page is up to date."""

from tests.bench.architectures import FAMILIES, HEADING, PAGE, page, row, verdict
from tests.engine.models import CONFIGS, build_engine, tiny

CELLS = ["BLOOM", "`bloom`", "yes", "no: a reason"]


def test_the_page_has_a_line_for_every_family() -> None:
    lines = PAGE.read_text("utf-8").partition(HEADING)[2].splitlines()
    assert [line.split(" | ")[0].removeprefix("| ") for line in lines if "`" in line and line[0] == "|"][1:] == [
        *FAMILIES
    ]


def test_the_page_has_what_vllm_said_and_keeps_what_stands_above_the_table() -> None:
    made = page([CELLS], {"BLOOM": "no: it has no ALiBi"}, f"Engines.\n\n{HEADING}\n\nan old table")
    assert made.startswith(f"Engines.\n\n{HEADING}\n")
    assert made.endswith("\n| BLOOM | `bloom` | yes | no: a reason | no: it has no ALiBi |\n")


def test_a_family_that_gives_other_tokens_is_not_served() -> None:
    said = verdict([[1], [2], [3]], lambda: build_engine(tiny(CONFIGS["llama"]), "torch"))
    assert said.startswith("no: other tokens")


def test_blooms_line_says_that_native_and_hf_serve_it() -> None:
    assert row("BLOOM, BLOOMZ")[2:] == ["yes", "yes"]
