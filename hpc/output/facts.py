"""Facts: what a format needs to know of a run besides its rows."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from hpc.corpus.formats import CorpusFile
from hpc.corpus.store import TokenStore
from hpc.job import Job

TokenBytes = Callable[[int], bytes | None]
"""What a token is in a text; None where that is not known."""


@dataclass(frozen=True)
class Facts:
    """What a format needs to know of a run besides its rows."""

    tokens: TokenStore
    inputs: tuple[CorpusFile, ...]
    """The files of the corpus."""
    limit: int | None
    """Rows of the corpus that were read; None for all."""
    model: str
    """What the model is called in responses."""
    created: int
    """When the run was begun, in seconds of the clock."""
    return_token_ids: bool
    logprobs: bool
    """Whether a row may have log probabilities."""
    token_bytes: TokenBytes

    @property
    def several(self) -> bool:
        """Whether a row has several samples."""
        return bool((self.tokens.samples > 1).any())


def facts_of(job: Job, created: int, tokens: TokenStore, token_bytes: TokenBytes) -> Facts:
    """Return the facts of a run."""
    return Facts(
        tokens,
        tokens.files,
        tokens.inputs["limit"],
        Path(job.model).name if Path(job.model).is_absolute() or Path(job.model).exists() else job.model,
        created,
        job.return_token_ids,
        job.sampling.logprobs is not None or tokens.any_request_says("logprobs"),
        token_bytes,
    )
