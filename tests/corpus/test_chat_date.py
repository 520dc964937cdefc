"""A chat template that asks for the date is told that of the run, and is otherwise what it was."""

from datetime import datetime
from pathlib import Path

import pytest
from transformers.utils.chat_template_utils import render_jinja_template

from hpc.corpus.chat_date import fix_date, tells_date

DATE = "2026-03-05T07:08:09"


def rendered(template: str) -> str:
    prompts, _ = render_jinja_template([[{"role": "user", "content": "a"}]], chat_template=template)
    return str(prompts[0])


@pytest.mark.parametrize(
    "asked",
    ["%d %b %Y", "%Y-%m-%d", "%H:%M:%S", "%-d/%-m", "%A, %B %d", "%j%%", "%%d %d 100% %", "%", "é", "%F|%T|%c|%p"],
)
def test_every_format_gives_what_strftime_gives(asked: str) -> None:
    template = f"{{% set t = strftime_now('{asked}') %}}{{{{ t }}}}{{{{ strftime_now(format='%d') }}}}"
    assert rendered(fix_date(template, DATE)) == datetime.fromisoformat(DATE).strftime(asked) + "05"


def test_the_date_is_there_inside_of_macros_and_loops_and_for_who_asks_whether_it_is() -> None:
    template = (
        "{% macro day() %}{{ strftime_now('%d') }}{% endmacro %}{% for m in messages %}{{ day() }}"
        "{% if strftime_now is defined %}{{ strftime_now('%m') }}{% endif %}{% endfor %}"
    )
    assert rendered(fix_date(template, DATE)) == "0503"


@pytest.mark.parametrize("begin", ["", "\n", "\n\n", "  ", "  \n  ", "text "])
def test_nothing_else_of_the_template_changes(begin: str) -> None:
    template = begin + "{% if true %}\n a{% endif %}{{ strftime_now('%%') }}\n {% for m in messages %}\nb{% endfor %}\n"
    assert rendered(fix_date(template, DATE)) == rendered(template)


def test_a_template_without_a_date_stays_as_it_is() -> None:
    assert fix_date("{{ messages }}", DATE) == "{{ messages }}"


@pytest.mark.parametrize(
    "name", ["chat_template.jinja", "tokenizer_config.json", "additional_chat_templates/rag.jinja"]
)
def test_a_model_directory_says_whether_its_template_asks_for_the_date(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    path.parent.mkdir(exist_ok=True)
    path.write_text("{{ messages }}")
    before = tells_date(tmp_path)
    path.write_text("{{ strftime_now('%d') }}")
    assert (before, tells_date(tmp_path)) == (False, True)
