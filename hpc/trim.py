"""Trim generated tokens at the ending token, the stop string or the limit. Pure.

Trimming twice changes nothing. An engine may run past the end, since it batches; this module alone decides where a
completion ends, so that it ends there with every engine and batch.
"""

import bisect
import functools
import re
from collections.abc import Collection, Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

from hpc.arrays import Tokens
from hpc.request import FinishReason
from hpc.sampling_params import SamplingParams

Prompt = Sequence[int] | Tokens


class Decode(Hashable, Protocol):
    """Makes text of tokens; see `hpc.model.detokenizer`."""

    @property
    def special_tokens(self) -> Mapping[str, int]:
        """The tokens that are left out of a text, by how they are written."""

    def __call__(self, token_ids: Sequence[int], before: Prompt = ()) -> str:
        """Return the text that tokens add to that of the tokens before them, as far as no later token changes it."""


def trim(
    token_ids: Sequence[int],
    sampling: SamplingParams,
    eos_token_ids: Collection[int],
    decode: Decode,
    prompt: Prompt = (),
) -> tuple[tuple[int, ...], str, FinishReason | None]:
    """Return the tokens up to the end, their text behind the prompt and why they end there.

    Nothing but the limit ends them before `min_new_tokens`: a stop string counts if the token that
    completes it is that one or a later. The ending token is among the tokens and not in the text;
    a stop string is not in the text, and the tokens end with the first that completes one. The reason
    is None where nothing ends it yet.
    """
    reason: FinishReason | None = None
    kept = tuple(token_ids[: sampling.max_new_tokens])
    if len(kept) == sampling.max_new_tokens:
        reason = "length"
    min_tokens = sampling.min_new_tokens
    endings = ending_tokens(sampling, eos_token_ids)
    end = next((index for index, token in enumerate(kept) if index >= min_tokens and token in endings), None)
    with_text = kept
    if end is not None:
        kept, with_text, reason = kept[: end + 1], kept[:end], "stop"
    if sampling.stop:
        stops = _stops(sampling.stop, decode)
        # An ending token that a stop string names may complete it.
        searched = kept if end is not None and kept[end] in stops.marks else with_text
        found = _first_stop(searched, stops, decode, min_tokens, prompt)
        if found is not None:
            count, begin = found
            return kept[:count], decode(kept[:count], prompt)[:begin], "stop"
    return kept, decode(with_text, prompt), reason


def ending_tokens(sampling: SamplingParams, eos_token_ids: Collection[int]) -> frozenset[int]:
    """Return the tokens at which a request ends."""
    return frozenset(sampling.stop_token_ids) | (frozenset() if sampling.ignore_eos else frozenset(eos_token_ids))


def ends_with_stop(
    token_ids: Sequence[int], stop: tuple[str, ...], decode: Decode, min_new_tokens: int = 0, prompt: Prompt = ()
) -> bool:
    """Say whether a stop string has just been completed, looking at no more tokens than one can span.

    One that was complete before `min_new_tokens` does not count.

    A stop string of b bytes spans at most b tokens that have text; a few more cover special tokens,
    which have none, and the token before, which may share a character. Missing one costs time
    only: `trim` looks at the whole text. It does so here too, once one seems to be there.
    """
    if not stop or len(token_ids) < min_new_tokens:
        return False
    stops = _stops(stop, decode)
    begin = max(0, len(token_ids) - stops.longest - 8)
    last, before = token_ids[begin:], token_ids[max(0, begin - 8) : begin] if begin else prompt
    if _first_stop(last, stops, decode, min_new_tokens - begin, before) is None:
        return False
    return begin == 0 or _first_stop(token_ids, stops, decode, min_new_tokens, prompt) is not None


_UNNAMED = chr(0xDFFF)
"""The mark of special tokens that no stop string names: the last surrogate, the named ones have the first."""


@dataclass(frozen=True)
class _Stops:
    """Stop strings, and how those are looked for that name special tokens, which have no text."""

    strings: tuple[str, ...]
    marks: Mapping[int, str]
    """A character for each special token that a stop string names, and one for all others, if any is named: no text has
    them, and no string may go on across a token that it does not name."""
    marked: tuple[str, ...]
    """The strings that name one, with the marks in place of the names."""
    longest: int
    """Bytes of the longest string."""


@functools.lru_cache(maxsize=1024)
def _stops(stop: tuple[str, ...], decode: Decode) -> _Stops:
    longest = max(len(string.encode()) for string in stop)
    special = decode.special_tokens
    named = sorted((name for name in special if name and any(name in string for string in stop)), key=len, reverse=True)
    marks = {name: chr(0xD800 + index) for index, name in enumerate(named)}  # surrogates, which UTF-8 has not
    pattern = re.compile("|".join(map(re.escape, named)))
    marked = [pattern.sub(lambda match: marks[match[0]], string) for string in stop] if named else []
    other = tuple(string for string, plain in zip(marked, stop, strict=False) if string != plain)
    known = {token: marks.get(name, _UNNAMED) for name, token in special.items()} if named else {}
    return _Stops(stop, known, other, longest)


def _first_stop(
    token_ids: Sequence[int], stops: _Stops, decode: Decode, min_tokens: int, prompt: Prompt
) -> tuple[int, int] | None:
    """Return how many tokens, `min_tokens` or more, complete a stop string, and where in the text it begins."""
    found = []
    for strings, marks in ((stops.strings, {}), (stops.marked, stops.marks)):
        if not strings:
            continue
        text = _read(token_ids, prompt, decode, marks)
        done = len(_read(token_ids[: min_tokens - 1], prompt, decode, marks)) if min_tokens > 1 else 0
        for string in strings:
            at = text.find(string, max(0, done - len(string) + 1))
            if at >= 0:
                length_of = lambda count: len(_read(token_ids[:count], prompt, decode, marks))  # noqa: B023, E731
                count = bisect.bisect_left(range(len(token_ids)), at + len(string), key=length_of)
                found.append((count, at - sum(text.count(mark, 0, at) for mark in set(marks.values()))))
    return min(found, default=None)


def _read(token_ids: Sequence[int], prompt: Prompt, decode: Decode, marks: Mapping[int, str]) -> str:
    """Return the text of tokens with a mark for each special token that has one."""
    places = [at for at, token in enumerate(token_ids) if token in marks] if marks else []
    if not places:
        return decode(token_ids, prompt)
    all_ids, behind = [*map(int, prompt), *token_ids], len(prompt)
    begins, text = [0, *(at + 1 for at in places)], ""
    for begin, end in zip(begins, [*places, len(token_ids)], strict=True):
        text += decode(token_ids[begin:end], all_ids[: behind + begin])
        text += marks[token_ids[end]] if end < len(token_ids) else ""
    return text
