"""Write a chat with a model's template so that no turn's text is lost.

Most templates take the content of a turn as a string; some walk over a list of parts, and make nothing of a
string. Which it is, a chat of marks tells, in which each mark must come out. Knows nothing of transformers.
"""

import functools
import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

Turn = Mapping[str, Any]
"""`role` and `content`: a string, or a list of `{"type": "text", "text": …}`; and what else a template knows."""


@dataclass(frozen=True)
class ChatOptions:
    """What the prompt of a chat depends on besides its turns."""

    tools: Sequence[Mapping[str, Any]] | None = None
    documents: Sequence[Mapping[str, Any]] | None = None
    variables: Mapping[str, Any] = field(default_factory=dict)
    """What else the template is given, by name."""
    template: str | None = None
    """The chat's own template, in the place of the model's."""
    begins: bool = True
    """Whether a turn of the assistant is begun behind the last one."""
    continues: bool = False
    """Whether the last turn is gone on with: nothing that closes it stands in the prompt."""


PLAIN = ChatOptions()
Apply = Callable[[Sequence[Turn], ChatOptions], str]
Forms = tuple[bool, ...]
"""Of each turn, whether its content is given as parts."""

_MAX_SHAPES = 4096
"""Of so many sequences of roles it is remembered what the template does with them."""
_END = "turnendsmark"
"""Stands at the end of a turn that is gone on with, while its template closes it."""


class LostText(ValueError):
    """The template leaves text of a turn out of the prompt."""


@dataclass(frozen=True)
class _Taken:
    """What a template takes of chats with one sequence of roles."""

    forms: Forms
    suspects: frozenset[int]
    """Turns whose marks did not come out in either form."""
    both: bool
    """Whether it makes the same of a string and of one part with this text."""
    whole: bool = True
    """Whether all marks came out."""


class ChatWriter:
    """A chat template, and what it was found to take."""

    def __init__(self, apply: Apply) -> None:
        """Take the function that makes a prompt of turns; it may raise anything."""
        self._apply = apply
        self._taken: dict[tuple[str, ...], _Taken] = {}

    def write(self, messages: Sequence[Turn], options: ChatOptions = PLAIN) -> str:
        """Return the prompt of a chat; raise `LostText` for text that is not in it, and what the template raises.

        Text counts as kept if it stands in the prompt, white space aside, or if what is put before and behind it
        comes out: then the template changed it on purpose. Of an assistant's turn the end is enough, since
        templates leave out its reasoning. A developer is the system where the template knows no developer.
        """
        messages, taken = self._known_roles(messages, options)
        forms = [form or (taken.both and not isinstance(turn.get("content"), str))
                 for form, turn in zip(taken.forms, messages, strict=True)]  # fmt: skip
        given = [_formed(turn, form) for turn, form in zip(messages, forms, strict=True)]
        prompt, given = self._first_prompt(given, options)
        squeezed: list[str] = []
        for index, turn in enumerate(messages):
            texts = _texts(turn.get("content", ""))
            for number, text in enumerate(texts):
                if not (bare := text.strip()):
                    continue
                found = index not in taken.suspects and (bare in prompt or _stands_in(prompt, squeezed, bare))
                if not (found or self._is_kept(given, index, texts, number, forms[index], options)):
                    raise LostText(
                        f'the model\'s chat template leaves out text of "messages"[{index}], whose role is '
                        f'{turn["role"]}; write the whole prompt as "prompt", or leave this turn out'
                    )
        return prompt

    def _known_roles(self, messages: Sequence[Turn], options: ChatOptions) -> tuple[Sequence[Turn], _Taken]:
        """Return the turns with roles that the template knows, and what it takes of them."""
        taken = self._taken_of(messages, options)
        if not taken.whole and any(turn["role"] == "developer" for turn in messages):
            renamed = [{**turn, "role": "system"} if turn["role"] == "developer" else turn for turn in messages]
            if (other := self._taken_of(renamed, options)).whole:
                return renamed, other
        return messages, taken

    def _taken_of(self, messages: Sequence[Turn], options: ChatOptions) -> _Taken:
        shape = (*(turn["role"] for turn in messages), *_kind(options))
        taken = self._taken.get(shape)
        if taken is None:
            if len(self._taken) >= _MAX_SHAPES:
                self._taken.clear()
            taken = self._taken[shape] = self._find_taken([turn["role"] for turn in messages], options)
        return taken

    def _first_prompt(self, given: list[Turn], options: ChatOptions) -> tuple[str, list[Turn]]:
        """Return the prompt of the first way to give the turns that the template takes, and that way."""
        first: Exception | None = None
        for way in _ways(given):
            try:
                return self._render(way, options), way
            except Exception as error:  # a template is the model's own program, and may raise anything
                first = first or error
        assert first is not None
        raise first

    def _find_taken(self, roles: Sequence[str], options: ChatOptions) -> _Taken:
        """Return the forms in which all marks come out; strings where there are none."""
        marks = [f"turn{index}mark" for index in range(len(roles))]
        turns = [{"role": role, "content": mark} for role, mark in zip(roles, marks, strict=True)]
        strings = (False,) * len(roles)
        suspects: frozenset[int] = frozenset()
        for start in (False, True):
            forms = (start,) * len(roles)
            for _ in range(2):  # as it is, then with the other form where that gave nothing
                prompt = self._try([_formed(*turn) for turn in zip(turns, forms, strict=True)], options)
                if prompt is None or (any(forms) and _prints_parts(prompt)):
                    break
                lost = [mark not in prompt for mark in marks]
                if not any(lost):
                    as_parts = [_formed(turn, True) for turn in turns]
                    return _Taken(forms, frozenset(), self._try(as_parts, options) == prompt)
                if forms == strings:
                    suspects = frozenset(index for index, missing in enumerate(lost) if missing)
                forms = tuple(form ^ missing for form, missing in zip(forms, lost, strict=True))
        return _Taken(strings, suspects, False, whole=False)

    def _is_kept(
        self, given: Sequence[Turn], index: int, texts: list[str], number: int, form: bool, options: ChatOptions
    ) -> bool:
        """Say whether what is put before and behind a text comes out, where the text itself does not."""
        before, behind = "textbeginsmark", "textendsmark"
        marked = [before + text + behind if at == number else text for at, text in enumerate(texts)]
        turn = {**given[index], "content": [{"type": "text", "text": text} for text in marked]}
        prompt = self._try([*given[:index], _formed(turn, form), *given[index + 1 :]], options)
        return prompt is not None and behind in prompt and (before in prompt or turn["role"] == "assistant")

    def _render(self, turns: Sequence[Turn], options: ChatOptions) -> str:
        """Return what the template makes of turns, up to the end of the last one's text if that is gone on with."""
        if not options.continues:
            return self._apply(turns, options)
        prompt, mark, _ = self._apply([*turns[:-1], _ended(turns[-1])], options).rpartition(_END)
        if not mark:
            raise LostText(
                f"the model's chat template leaves out the end of the last turn, whose role is {turns[-1]['role']}: "
                "there is nothing to go on with"
            )
        return prompt

    def _try(self, turns: Sequence[Turn], options: ChatOptions) -> str | None:
        try:
            return self._render(turns, options)
        except Exception:  # a template is the model's own program, and may raise anything
            return None


def unread(source: str, turns: Sequence[Turn], options: ChatOptions) -> list[str]:
    """Return what a chat gives its template, besides roles and contents, that stands nowhere in the template's source.

    A template does nothing with it and says nothing.
    """
    names = {name for turn in turns if len(turn) > 2 or "content" not in turn for name in turn} - {"role", "content"}
    given = [name for name, value in (("tools", options.tools), ("documents", options.documents)) if value]
    return [name for name in (*given, *options.variables, *sorted(names)) if not _stands_as_word(source, name)]


@functools.lru_cache(maxsize=1024)
def _stands_as_word(source: str, name: str) -> bool:
    aliases = ("reasoning", "reasoning_content", "thinking") if name in ("reasoning", "reasoning_content") else (name,)
    return any(re.search(rf"\b{re.escape(alias)}\b", source) for alias in aliases)


def _kind(options: ChatOptions) -> tuple[str, ...]:
    """Return what of the options may decide which form of turns a template takes; nothing for a plain chat."""
    if options is PLAIN or options == PLAIN:
        return ()
    variables = json.dumps(options.variables, sort_keys=True, default=str)
    flags = (options.tools is None, options.documents is None, options.begins, options.continues)
    return (repr(flags), variables, options.template or "")


def _formed(turn: Turn, parts: bool) -> Turn:
    """Return a turn with its content in one form or the other; parts are joined by line breaks, as vLLM joins them."""
    content = turn.get("content")
    if content is None:
        return turn
    if not parts:
        content = "\n".join(_texts(content))
    elif isinstance(content, str):
        content = [{"type": "text", "text": content}]
    return {**turn, "content": content}


def _ended(turn: Turn) -> Turn:
    """Return a turn with a mark at the end of its content."""
    content = turn.get("content", "")
    if isinstance(content, str):
        return {**turn, "content": content + _END}
    return {**turn, "content": [*content[:-1], {**content[-1], "text": content[-1]["text"] + _END}]}


def _ways(turns: list[Turn]) -> Iterator[list[Turn]]:
    """Yield the ways to give turns that call tools or have no content, for templates differ; else the one there is.

    Most templates take the arguments of a call as an object, as vLLM gives them, some as the string that they are in
    OpenAI's format; most know a turn without content, some add it to a string.
    """
    if all("content" in turn and "tool_calls" not in turn for turn in turns):
        yield turns
        return
    for arguments in (_with_arguments, dict):
        for empty in ({}, {"content": ""}):
            yield [{**empty, **arguments(turn)} for turn in turns]


def _with_arguments(turn: Turn) -> dict[str, Any]:
    """Return a turn in which the arguments of calls are objects where they are JSON of such."""
    calls = turn.get("tool_calls")
    return {**turn, "tool_calls": [_with_object(call) for call in calls]} if isinstance(calls, list) else dict(turn)


def _with_object(call: Any) -> Any:
    function = call.get("function") if isinstance(call, dict) else None
    if not isinstance(function, dict) or not isinstance(function.get("arguments"), str):
        return call
    try:
        arguments = json.loads(function["arguments"] or "{}")
    except ValueError:
        return call
    return {**call, "function": {**function, "arguments": arguments}} if isinstance(arguments, dict) else call


def _prints_parts(prompt: str) -> bool:
    """Say whether a template has written a list of parts as it stands in a program, and not walked over it."""
    return "'type': 'text'" in prompt or '"type": "text"' in prompt


def _texts(content: Any) -> list[str]:
    return [content] if isinstance(content, str) else [part["text"] for part in content]


def _stands_in(prompt: str, squeezed: list[str], text: str) -> bool:
    """Say whether a text is in a prompt, white space aside; `squeezed` keeps the prompt without any."""
    if not squeezed:
        squeezed.append("".join(prompt.split()))
    return "".join(text.split()) in squeezed[0]
