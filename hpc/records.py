"""Request and Completion: the two things that travel. Knows nothing of where they come from."""

import hashlib
import json
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from hpc.job import SamplingParams

Tokens = npt.NDArray[np.int32]
RowId = int | str
FinishReason = Literal["stop", "length", "error"]

KEY_BYTES = 16


@dataclass(frozen=True, slots=True)
class Request:
    """One prompt to be completed: what an engine needs to know of a row, and nothing else."""

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

    @property
    def most_tokens(self) -> int:
        """Tokens, padding included, that it holds in memory when it ends at its limit."""
        return self.bucket + self.sampling.max_new_tokens


@dataclass(frozen=True, slots=True)
class Completion:
    """The answer to a request."""

    key: bytes
    row: int
    id: RowId
    token_ids: tuple[int, ...]
    """Generated tokens, the ending one included."""
    text: str | None
    """Text before the end-of-sequence token or the stop string; None with an error."""
    finish_reason: FinishReason
    error: dict[str, str] | None = None
    """`kind` and `message` of what went wrong with this request."""


def completion_key(token_ids: Tokens, sampling: SamplingParams, row_id: RowId) -> bytes:
    """Hash exactly what a completion depends on: `KEY_BYTES` of BLAKE2b.

    Prompt tokens and sampling parameters; for a sampled request its id too, which with the seed
    fixes the random numbers. Equal greedy requests have one key, so they are generated once.
    """
    depends_on: dict[str, Any] = sampling.identity()
    if not sampling.greedy:
        depends_on["id"] = row_id
    digest = hashlib.blake2b(json.dumps(depends_on, sort_keys=True).encode(), digest_size=KEY_BYTES)
    digest.update(b"\0")
    digest.update(np.ascontiguousarray(token_ids, dtype="<i4").tobytes())
    return digest.digest()
