"""Write a chat with a model's template so that no turn's text is lost.

Most templates take the content of a turn as a string; some walk over a list of parts, and make nothing of a
string. Which it is, a chat of marks tells, in which each mark must come out. Knows nothing of transformers.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

Turn = Mapping[str, Any]
"""`role` and `content`: a string, or a list of `{"type": "text", "text": …}`."""
Apply = Callable[[Sequence[Turn]], str]
Forms = tuple[bool, ...]
"""Of each turn, whether its content is given as parts."""

_MAX_SHAPES = 4096
"""Of so many sequences of roles it is remembered what the template does with them."""


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


class ChatWriter:
    """A chat template, and what it was found to take."""

    def __init__(self, apply: Apply) -> None:
        """Take the function that makes a prompt of turns; it may raise anything."""
        self._apply = apply
        self._taken: dict[tuple[str, ...], _Taken] = {}

    def write(self, messages: Sequence[Turn]) -> str:
        """Return the prompt of a chat; raise `LostText` for text that is not in it, and what the template raises.

        Text counts as kept if it stands in the prompt, white space aside, or if what is put before and behind it
        comes out: then the template changed it on purpose. Of an assistant's turn the end is enough, since
        templates leave out its reasoning.
        """
        shape = tuple(turn["role"] for turn in messages)
        taken = self._taken.get(shape)
        if taken is None:
            if len(self._taken) >= _MAX_SHAPES:
                self._taken.clear()
            taken = self._taken[shape] = self._find_taken(shape)
        forms = [form or (taken.both and not isinstance(turn["content"], str))
                 for form, turn in zip(taken.forms, messages, strict=True)]  # fmt: skip
        given = [_formed(turn["role"], turn["content"], form) for turn, form in zip(messages, forms, strict=True)]
        prompt = self._apply(given)
        squeezed: list[str] = []
        for index, turn in enumerate(messages):
            texts = _texts(turn["content"])
            for number, text in enumerate(texts):
                if not (bare := text.strip()):
                    continue
                found = index not in taken.suspects and (bare in prompt or _stands_in(prompt, squeezed, bare))
                if not (found or self._is_kept(given, index, texts, number, forms[index])):
                    raise LostText(
                        f'the model\'s chat template leaves out text of "messages"[{index}], whose role is '
                        f'{turn["role"]}; write the whole prompt as "prompt", or leave this turn out'
                    )
        return prompt

    def _find_taken(self, shape: tuple[str, ...]) -> _Taken:
        """Return the forms in which all marks come out; strings where there are none."""
        marks = [f"turn{index}mark" for index in range(len(shape))]
        strings = (False,) * len(shape)
        suspects: frozenset[int] = frozenset()
        for start in (False, True):
            forms = (start,) * len(shape)
            for _ in range(2):  # as it is, then with the other form where that gave nothing
                prompt = self._try([_formed(*turn) for turn in zip(shape, marks, forms, strict=True)])
                if prompt is None:
                    break
                lost = [mark not in prompt for mark in marks]
                if not any(lost):
                    as_parts = [_formed(*turn, True) for turn in zip(shape, marks, strict=True)]
                    return _Taken(forms, frozenset(), self._try(as_parts) == prompt)
                if forms == strings:
                    suspects = frozenset(index for index, missing in enumerate(lost) if missing)
                forms = tuple(form ^ missing for form, missing in zip(forms, lost, strict=True))
        return _Taken(strings, suspects, False)

    def _is_kept(self, given: Sequence[Turn], index: int, texts: list[str], number: int, form: bool) -> bool:
        """Say whether what is put before and behind a text comes out, where the text itself does not."""
        before, behind = "textbeginsmark", "textendsmark"
        marked = [before + text + behind if at == number else text for at, text in enumerate(texts)]
        role = given[index]["role"]
        parts = [{"type": "text", "text": text} for text in marked]
        prompt = self._try([*given[:index], _formed(role, parts, form), *given[index + 1 :]])
        return prompt is not None and behind in prompt and (before in prompt or role == "assistant")

    def _try(self, turns: Sequence[Turn]) -> str | None:
        try:
            return self._apply(turns)
        except Exception:  # a template is the model's own program, and may raise anything
            return None


def _formed(role: str, content: Any, parts: bool) -> Turn:
    """Return a turn in one form or the other; parts are joined by line breaks, as vLLM joins them."""
    if not parts:
        content = "\n".join(_texts(content))
    elif isinstance(content, str):
        content = [{"type": "text", "text": content}]
    return {"role": role, "content": content}


def _texts(content: Any) -> list[str]:
    return [content] if isinstance(content, str) else [part["text"] for part in content]


def _stands_in(prompt: str, squeezed: list[str], text: str) -> bool:
    """Say whether a text is in a prompt, white space aside; `squeezed` keeps the prompt without any."""
    if not squeezed:
        squeezed.append("".join(prompt.split()))
    return "".join(text.split()) in squeezed[0]
