"""Facts of a run that an output format needs besides the rows."""

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
    """Facts of a run that a format needs besides its rows."""

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


def facts_of(job: Job, model: Path, created: int, tokens: TokenStore, token_bytes: TokenBytes) -> Facts:
    """Return the facts of a run, whose model is in a folder."""
    from_hub = "snapshots" in model.parts  # told from a path by where it is: a relative path looks like an id
    return Facts(
        tokens,
        tokens.files,
        tokens.inputs.get("limit"),
        job.model if from_hub else Path(job.model).name,
        created,
        job.return_token_ids,
        job.sampling.logprobs is not None or tokens.any_request_says("logprobs"),
        token_bytes,
    )
