"""Trim generated tokens to what was asked for: up to the ending token, stop string or limit. Pure.

Trimming what is trimmed changes nothing. An engine may run past the end, since it batches; where a
completion ends is decided here alone, so it is the same for every engine and batch.
"""

import bisect
from collections.abc import Callable, Collection, Sequence

from hpc.job import SamplingParams
from hpc.records import FinishReason

Decode = Callable[[Sequence[int]], str]


def trim(
    token_ids: Sequence[int], sampling: SamplingParams, eos_token_ids: Collection[int], decode: Decode
) -> tuple[tuple[int, ...], str, FinishReason | None]:
    """Return the tokens up to the end, their text and why they end there.

    Nothing but the limit ends them before `min_new_tokens`: a stop string counts if the token that
    completes it is that one or a later. The ending token is among the tokens and not in the text;
    a stop string is not in the text, and the tokens end with the first that completes one. The reason
    is None where nothing ends it yet.
    """
    reason: FinishReason | None = None
    kept = tuple(token_ids[: sampling.max_new_tokens])
    if len(kept) == sampling.max_new_tokens:
        reason = "length"
    least = sampling.min_new_tokens
    endings = ending_tokens(sampling, eos_token_ids)
    end = next((index for index, token in enumerate(kept) if index >= least and token in endings), None)
    if end is not None:
        kept, reason = kept[: end + 1], "stop"
    text = decode(kept if end is None else kept[:end])
    done = _settled(kept[: max(0, least - 1)], decode) if sampling.stop else 0
    if _find_stop(text, sampling.stop, done) >= 0:
        # The shortest prefix with a stop string in it; so the cut is where a token by token check cuts.
        contains = lambda length: _find_stop(decode(kept[:length]), sampling.stop, done) >= 0  # noqa: E731
        kept, reason = kept[: bisect.bisect_left(range(len(kept)), True, key=contains)], "stop"
        text = decode(kept)
        text = text[: _find_stop(text, sampling.stop, done)]
    return kept, text, reason


def ending_tokens(sampling: SamplingParams, eos_token_ids: Collection[int]) -> frozenset[int]:
    """Return the tokens at which a request ends."""
    return frozenset(sampling.stop_token_ids) | (frozenset() if sampling.ignore_eos else frozenset(eos_token_ids))


def ends_with_stop(token_ids: Sequence[int], stop: Sequence[str], decode: Decode, min_new_tokens: int = 0) -> bool:
    """Say whether a stop string has just been completed, looking at no more tokens than it can span.

    One that was complete before `min_new_tokens` does not count.

    A stop string of b bytes spans at most b tokens that have text; a few more cover special tokens,
    which have none, and the token before, which may share a character. Missing one costs time
    only: `trim` looks at the whole text.
    """
    if not stop or len(token_ids) < min_new_tokens:
        return False
    begin = max(0, len(token_ids) - max(len(text.encode()) for text in stop) - 8)
    done = _settled(token_ids[begin : max(begin, min_new_tokens - 1)], decode)
    return _find_stop(decode(token_ids[begin:]), stop, done) >= 0


def _settled(token_ids: Sequence[int], decode: Decode) -> int:
    """Return how many characters of the text no later token changes: the last may be a part of one."""
    return len(decode(token_ids).rstrip("\ufffd")) if token_ids else 0


def _find_stop(text: str, stop: Sequence[str], done: int) -> int:
    """Return where the first stop string begins that ends behind `done` characters, or -1."""
    found = (text.find(string, max(0, done - len(string) + 1)) for string in stop)
    return min((at for at in found if at >= 0), default=-1)
