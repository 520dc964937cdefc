"""Requests and completions, which travel between ranks. Knows nothing of where they come from."""

import functools
import hashlib
import json
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from hpc.arrays import Tokens
from hpc.sampling_params import SamplingParams

RowId = int | str
FinishReason = Literal["stop", "length", "error"]
TokenLogprobs = tuple[float, tuple[tuple[int, float], ...]]
"""The log probability of a generated token, and the most probable tokens at its place with theirs."""

KEY_BYTES = 16
"""128 bits: among 10^9 completions two have one key with a chance of 10^-21."""


@dataclass(frozen=True, slots=True)
class Request:
    """A prompt to be completed: all that an engine needs to know of a row."""

    row: int
    """Index of the (first) corpus row that asks for it."""
    id: RowId
    token_ids: Tokens
    """Prompt, int32 of shape [n]."""
    sampling: SamplingParams
    key: bytes
    """Identity of its completion, `KEY_BYTES` long; see `completion_key`."""
    bucket: int
    """Length in tokens to which prompts of its bucket are padded, at least n."""
    prefix: int = 0
    """How many of its first tokens it shares with other requests of the corpus; less than n."""

    @property
    def sample_tokens(self) -> int:
        """Tokens, padding included, that one sample holds in memory when it ends at its limit."""
        return self.bucket + self.sampling.max_new_tokens

    @property
    def max_tokens(self) -> int:
        """Tokens, padding included, that all its samples hold in memory when they end at their limit."""
        return self.sampling.n * self.sample_tokens


@dataclass(frozen=True, slots=True)
class Sample:
    """A continuation of a prompt."""

    token_ids: tuple[int, ...]
    """Generated tokens, the ending one included."""
    text: str | None
    """Text before the end-of-sequence token or the stop string; None with an error."""
    finish_reason: FinishReason
    logprobs: tuple[TokenLogprobs, ...] | None = None
    """Of each token, where asked for."""


@dataclass(frozen=True, slots=True)
class Completion:
    """The answer to a request: its first sample, and the others where it asks for several."""

    key: bytes
    row: int
    id: RowId
    token_ids: tuple[int, ...]
    text: str | None
    finish_reason: FinishReason
    error: dict[str, str] | None = None
    """`kind` and `message` of what went wrong with this request."""
    logprobs: tuple[TokenLogprobs, ...] | None = None
    others: tuple[Sample, ...] = ()
    """The samples after the first."""

    @property
    def samples(self) -> tuple[Sample, ...]:
        """All samples, the first too."""
        return (Sample(self.token_ids, self.text, self.finish_reason, self.logprobs), *self.others)

    @property
    def num_tokens(self) -> int:
        """How many tokens were generated, over all samples."""
        return sum(len(sample.token_ids) for sample in self.samples)


@functools.lru_cache(maxsize=1 << 14)
def _identity(sampling: SamplingParams, row_id: RowId | None) -> bytes:
    depends_on: dict[str, Any] = sampling.identity()
    if row_id is not None:
        depends_on["id"] = row_id
    return json.dumps(depends_on, sort_keys=True).encode()


def completion_key(token_ids: Tokens, sampling: SamplingParams, row_id: RowId) -> bytes:
    """Return the BLAKE2b hash of all that a completion depends on, `KEY_BYTES` long.

    That is prompt tokens and sampling parameters, and for a sampled request its id, which with the seed fixes the
    random numbers. Equal greedy requests have one key, so they are generated once.
    """
    digest = hashlib.blake2b(_identity(sampling, None if sampling.greedy else row_id), digest_size=KEY_BYTES)
    digest.update(b"\0")
    digest.update(np.ascontiguousarray(token_ids, dtype="<i4").tobytes())
    return digest.digest()
