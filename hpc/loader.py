"""What knows models, handed to the pipeline; an echo or another engine takes its place behind the same methods."""

import logging
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hpc.comm import Place
from hpc.engine import Engine
from hpc.job import Job
from hpc.model import Model, resolve
from hpc.rows import Checker, Limits

LOGGER = logging.getLogger(__name__)


@dataclass(frozen=True)
class Replica:
    """An engine, with what is needed of its model to make text of tokens."""

    engine: Engine
    eos_token_ids: tuple[int, ...]
    decode: Callable[[Any], str]


class Loader:
    """Loads models with transformers. Nothing is imported before it is needed: a finished run needs none of it."""

    def resolve(self, model: str) -> Model:
        """Find the model; see `hpc.model.resolve`."""
        return resolve(model)

    def dtype(self, job: Job) -> str:
        """Return the dtype that the job's stands for on this machine."""
        from hpc.engine import load

        return load.resolve_dtype(job.dtype, job.device)

    def checker(self, job: Job, path: Path, file_names: tuple[str, ...]) -> Checker:
        """Return what checks and tokenizes rows for the model at `path`."""
        from hpc.engine import load
        from hpc.tokenizer import Tokenizer

        load.quiet()
        described = load.describe(path)
        limits = Limits(described.vocab_size, described.context_tokens, job.truncate_prompts)
        return Checker(file_names, job.sampling, limits, Tokenizer(path))

    def load(self, job: Job, path: Path, place: Place) -> Replica:
        """Load the model onto the device of the rank at `place`."""
        from hpc.engine import load
        from hpc.engine.hf import HFEngine
        from hpc.tokenizer import Tokenizer

        load.quiet()
        device = load.resolve_device(job.device, place.local_rank)
        tokenizer, described = Tokenizer(path), load.describe(path)
        model = load.load(path, device, job.dtype, place.threads)
        LOGGER.info("loaded %s as %s on %s, %d threads", path.name, job.dtype, device, place.threads)
        engine = HFEngine(model, described.eos_token_ids, tokenizer.decode, job.batch_tokens)
        return Replica(engine, described.eos_token_ids, tokenizer.decode)
