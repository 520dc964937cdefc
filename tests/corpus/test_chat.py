"""Whatever form a chat template takes, the text of every turn is in the prompt, or the row is refused."""

import string
from collections.abc import Callable, Sequence
from typing import Any

import jinja2
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hpc.corpus.chat import ChatOptions, ChatWriter, LostText, Turn, unread

STRINGS = "{% for m in messages %}[{{ m.role }}]{{ m.content }}{% endfor %}"
TRIMMED = "{% for m in messages %}[{{ m.role }}]{{ m.content | trim }}{% endfor %}"
PARTS = "{% for m in messages %}[{{ m.role }}]{% for p in m.content %}{{ p.text }}{% endfor %}{% endfor %}"
EITHER = (
    "{% for m in messages %}[{{ m.role }}]{% if m.content is string %}{{ m.content }}{% else %}"
    "{% for p in m.content %}{{ p.text }}{% endfor %}{% endif %}{% endfor %}"
)
MIXED = (
    "{% for m in messages %}[{{ m.role }}]{% if m.role == 'system' %}{{ m.content + '' }}{% else %}"
    "{% for p in m.content %}{{ p.text }}{% endfor %}{% endif %}{% endfor %}"
)
LATER_SYSTEM_DROPPED = (
    "{% for m in messages %}{% if m.role != 'system' or loop.first %}[{{ m.role }}]{{ m.content }}{% endif %}"
    "{% endfor %}"
)
THINKING_DROPPED = (
    "{% for m in messages %}[{{ m.role }}]{% if m.role == 'assistant' %}"
    "{{ m.content.split('</think>')[-1].lstrip('\n') }}{% else %}{{ m.content }}{% endif %}{% endfor %}"
)
AS_JSON = "{% for m in messages %}[{{ m.role }}]{{ m.content | tojson }}{% endfor %}"
FLAG_TAKEN_OUT = "{% for m in messages %}[{{ m.role }}]{{ m.content.replace('/no_think', '') }}{% endfor %}"
CROPPED = "{% for m in messages %}[{{ m.role }}]{{ m.content[:12] }}{% endfor %}"


def writer(template: str) -> ChatWriter:
    compiled = jinja2.Environment().from_string(template)

    def apply(turns: Sequence[Turn], options: ChatOptions) -> str:
        return compiled.render(messages=turns, begins=options.begins)

    return ChatWriter(apply)


def chat(*contents: Any, roles: str = "u") -> list[Turn]:
    names = {"s": "system", "u": "user", "a": "assistant", "t": "tool"}
    return [{"role": names[role], "content": content} for role, content in zip(roles, contents, strict=True)]


def part(text: str) -> dict[str, str]:
    return {"type": "text", "text": text}


@pytest.mark.parametrize("template", [STRINGS, TRIMMED, PARTS, EITHER, MIXED])
def test_a_template_is_given_the_form_that_it_takes(template: str) -> None:
    messages = chat("be brief", "cat", "ok", "dog", roles="suau")
    assert writer(template).write(messages) == "[system]be brief[user]cat[assistant]ok[user]dog"


@pytest.mark.parametrize("template", [PARTS, EITHER, MIXED])
def test_parts_stay_parts_where_the_template_takes_them(template: str) -> None:
    assert writer(template).write(chat([part("cat"), part("dog")])) == "[user]catdog"


@pytest.mark.parametrize("template", [STRINGS, TRIMMED])
def test_parts_are_joined_by_line_breaks_where_the_template_takes_strings(template: str) -> None:
    assert writer(template).write(chat([part("cat"), part("dog")])) == "[user]cat\ndog"


TEXTS = st.text(st.sampled_from(" \nabcu[]{}'<>/&é"), max_size=12)


@settings(deadline=None)
@given(one=st.lists(TEXTS, min_size=1, max_size=3), other=st.lists(TEXTS, min_size=1, max_size=3))
@pytest.mark.parametrize("template", [STRINGS, PARTS, EITHER, LATER_SYSTEM_DROPPED, CROPPED])
def test_chats_of_different_texts_never_become_equal_prompts(template: str, one: list[str], other: list[str]) -> None:
    written: list[str | None] = []
    for texts in (one, other):
        messages = chat(
            *[f"{text}|" for text in texts], roles="usu"[: len(texts)]
        )  # bars: "a", "b" and "ab", "" are one text
        try:
            written.append(writer(template).write(messages))
        except LostText:
            written.append(None)
    assert one == other or written[0] is None or written[0] != written[1]


@pytest.mark.parametrize("text", ["be brief", "user", "a", "b"])
def test_a_turn_that_the_template_drops_is_refused_even_if_its_text_stands_elsewhere(text: str) -> None:
    with pytest.raises(LostText, match=r'leaves out text of "messages"\[1\], whose role is system; write the whole'):
        writer(LATER_SYSTEM_DROPPED).write(chat("a user b, be brief", text, roles="us"))


def test_an_empty_turn_that_the_template_drops_is_no_loss() -> None:
    assert writer(LATER_SYSTEM_DROPPED).write(chat("a", " ", roles="us")) == "[user]a"


def test_a_text_that_is_cut_off_is_refused() -> None:
    with pytest.raises(LostText, match="leaves out text"):
        writer(CROPPED).write(chat(string.ascii_letters))


@pytest.mark.parametrize(
    ("template", "messages", "prompt"),
    [
        (TRIMMED, chat("  cat\n"), "[user]cat"),
        (
            THINKING_DROPPED,
            chat("1+1", "<think>\nhm\n</think>\n\n2", "2+2", roles="uau"),
            "[user]1+1[assistant]2[user]2+2",
        ),
        (AS_JSON, chat('say "é"'), '[user]"say \\"\\u00e9\\""'),
        (FLAG_TAKEN_OUT, chat("dog /no_think"), "[user]dog "),
    ],
)
def test_what_a_template_changes_on_purpose_is_no_loss(template: str, messages: list[Turn], prompt: str) -> None:
    assert writer(template).write(messages) == prompt


def test_a_question_is_not_taken_for_reasoning() -> None:
    dropping = THINKING_DROPPED.replace("m.role == 'assistant'", "true")
    with pytest.raises(LostText, match=r'"messages"\[0\]'):
        writer(dropping).write(chat("is </think> a tag?"))


def test_what_the_template_raises_is_raised() -> None:
    with pytest.raises(jinja2.UndefinedError):
        writer("{{ messages[0].content.nothing.at_all }}").write(chat("a"))


def counting(calls: list[int]) -> Callable[[Sequence[Turn], ChatOptions], str]:
    def apply(turns: Sequence[Turn], options: ChatOptions) -> str:
        calls.append(1)
        return "".join(f"[{turn['role']}]{turn['content']}" for turn in turns)

    return apply


def test_the_template_is_tried_once_for_each_sequence_of_roles() -> None:
    calls: list[int] = []
    chats = ChatWriter(counting(calls))
    chats.write(chat("a"))
    before = len(calls)
    for text in "bcd":
        chats.write(chat(text))
    assert len(calls) - before == 3


CLOSED = "{% for m in messages %}<{{ m.role }}>{{ m.content }}</>{% endfor %}{% if begins %}<assistant>{% endif %}"
KNOWS_NO_DEVELOPER = (
    "{% for m in messages %}{% if m.role not in ('system', 'user') %}{{ 1 / 0 }}{% endif %}[{{ m.role }}]"
    "{{ m.content }}{% endfor %}"
)
DROPS_DEVELOPER = "{% for m in messages if m.role != 'developer' %}[{{ m.role }}]{{ m.content }}{% endfor %}"
CONTINUED = ChatOptions(begins=False, continues=True)


@pytest.mark.parametrize("template", [CLOSED, CLOSED.replace("m.content", "m.content | trim")])
@pytest.mark.parametrize("text", ["The cat", "The cat ", ""])
def test_a_last_turn_that_is_gone_on_with_is_not_closed(template: str, text: str) -> None:
    assert writer(template).write(chat("say", text, roles="ua"), CONTINUED) == f"<user>say</><assistant>{text}"


def test_a_last_turn_in_parts_is_gone_on_with_too() -> None:
    assert (
        writer(PARTS)
        .write([*chat("say"), *chat([part("The"), part(" cat")], roles="a")], CONTINUED)
        .endswith("[assistant]The cat")
    )


def test_a_last_turn_whose_end_the_template_drops_cannot_be_gone_on_with() -> None:
    with pytest.raises(LostText, match="nothing to go on with"):
        writer(CROPPED).write(chat("say", string.ascii_letters, roles="ua"), CONTINUED)


@pytest.mark.parametrize("template", [KNOWS_NO_DEVELOPER, DROPS_DEVELOPER])
def test_a_developer_is_the_system_where_the_template_knows_none(template: str) -> None:
    turns = [{"role": "developer", "content": "be brief"}, *chat("hi")]
    assert writer(template).write(turns) == "[system]be brief[user]hi"


def test_a_developer_stays_one_where_the_template_takes_any_role() -> None:
    assert writer(STRINGS).write([{"role": "developer", "content": "be brief"}]) == "[developer]be brief"


CALLS = [{"id": "c", "type": "function", "function": {"name": "f", "arguments": '{"a": 1}'}}]
CALLING = (
    "{% for m in messages %}[{{ m.role }}]{% if m.tool_calls %}CALLS{% else %}{{ m.content }}{% endif %}{% endfor %}"
)


@pytest.mark.parametrize(
    ("template", "prompt"),
    [
        (CALLING.replace("CALLS", "{{ m.tool_calls[0].function.arguments | tojson }}"), '[assistant]{"a": 1}'),
        (CALLING.replace("CALLS", "{{ '' + m.tool_calls[0].function.arguments }}"), '[assistant]{"a": 1}'),
        (CALLING.replace("CALLS", "{{ m.content is defined }}"), "[assistant]False"),
        ("{% for m in messages %}[{{ m.role }}]{{ '' + m.content }}{% endfor %}", "[assistant]"),
    ],
)
def test_a_turn_that_calls_tools_is_given_as_the_template_takes_it(template: str, prompt: str) -> None:
    assert writer(template).write([{"role": "assistant", "tool_calls": CALLS}]) == prompt


def test_what_the_template_does_not_read_is_known() -> None:
    turns = [{"role": "user", "content": "a", "name": "kim", "weight": 1}]
    options = ChatOptions(tools=[{}], documents=[{}], variables={"enable_thinking": False, "tone": "calm"})
    assert unread("{{ m.name }}{{ enable_thinking }}{{ tools }}", turns, options) == ["documents", "tone", "weight"]


def test_reasoning_is_read_under_any_of_its_names() -> None:
    turns = [{"role": "assistant", "content": "a", "reasoning_content": "b"}]
    assert unread("{{ m.reasoning }}", turns, ChatOptions()) == []
