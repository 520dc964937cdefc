"""The rules of an encoder-decoder's decoder: how its output begins, what it ends with, what it must not contain."""

from collections.abc import Collection
from dataclasses import dataclass
from typing import Any

from hpc.sampling_params import SamplingParams


@dataclass(frozen=True)
class DecoderRules:
    """What a model's generation config says of its decoder, as token ids. They are a part of the model.

    How tokens are chosen (beams, length penalties) is not among them: job and row alone say that.
    """

    start: int
    """The token before the first generated one; it is no part of the output."""
    forced_bos: int | None = None
    """The first generated token: the target language, say. A request's `forced_bos_token_id` goes before it."""
    forced_eos: int | None = None
    """The token at the limit of a completion."""
    banned: tuple[int, ...] = ()
    """Tokens that are never generated, as the padding of a Marian model."""

    def forced(self, sampling: SamplingParams, position: int, endings: Collection[int]) -> int | None:
        """Return the token that a request must have at a position, counted from 0; None if it may choose.

        An ending token is not forced where the request may not end: before `min_new_tokens`, or with `ignore_eos`.
        """
        token = None
        if position == 0:
            token = self.forced_bos if sampling.forced_bos_token_id is None else sampling.forced_bos_token_id
        if token is None and self.cuts(sampling, position, endings):
            token = self.forced_eos
        return None if token in endings and position < sampling.min_new_tokens else token

    def cuts(self, sampling: SamplingParams, position: int, endings: Collection[int]) -> bool:
        """Return whether an ending token stands at a position only because the completion is at its limit."""
        return position == sampling.max_new_tokens - 1 and self.forced_eos in endings


def rules_of(generation_config: Any) -> DecoderRules | None:
    """Return the rules of a generation config of transformers; None if it names no token to start with."""
    start = _token(generation_config.decoder_start_token_id)
    if start is None:
        start = _token(generation_config.bos_token_id)
    if start is None:
        return None
    words = generation_config.bad_words_ids or ()
    banned = {int(word[0]) for word in words if len(word) == 1} | set(generation_config.suppress_tokens or ())
    forced_bos, forced_eos = generation_config.forced_bos_token_id, generation_config.forced_eos_token_id
    return DecoderRules(start, _token(forced_bos), _token(forced_eos), tuple(sorted(banned)))


def _token(value: Any) -> int | None:
    """Return a token id of a generation config, the first of a list."""
    if isinstance(value, list | tuple):
        value = value[0] if value else None
    return None if value is None else int(value)
