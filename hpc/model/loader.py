"""What knows models, handed to the pipeline; an echo or another engine takes its place behind the same methods."""

import contextlib
import logging
import time
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hpc.corpus.columns import Columns
from hpc.corpus.tokenize import Checker, PromptLimits
from hpc.engine.bounds import Size, Speed
from hpc.engine.interface import Engine
from hpc.engine.registry import AUTO, ENGINES, Choice, asked_context, check_devices, choose
from hpc.engine.steps import Measured
from hpc.exit import Refusal
from hpc.job import Job
from hpc.model.find import Model, find, read_template, resolve, user_cache
from hpc.model.needs import Needs, needs
from hpc.mpi.binding import Binding
from hpc.trim import Decode

if TYPE_CHECKING:
    import torch

    from hpc.model.load import Description
    from hpc.model.tokenizer import Tokenizer

LOGGER = logging.getLogger(__name__)


@dataclass(frozen=True)
class Replica:
    """An engine, with what is needed of its model to make text of tokens."""

    engine: Engine
    eos_token_ids: tuple[int, ...]
    decode: Decode
    device: str = "cpu"
    """What computes, by its maker's name."""
    size: Size | None = None
    """What it holds, where that is known."""
    engine_name: str = ""
    """What generates, by the name of its flag; empty: what the job says."""
    spent: tuple[tuple[str, float, float], ...] = ()
    """What the time went to that is not loading: a kind of `hpc.report.timeline`, beginning and end by the clock, s."""
    gpu: str = ""
    """The UUIDs of its GPUs with commas between, as torch says them; nothing where they were known before."""


@dataclass
class Checkpoint:
    """A model directory, the job, and the place of a rank: see `hpc.engine.registry.Checkpoint`."""

    job: Job
    path: Path
    place: Binding

    @cached_property
    def device(self) -> "torch.device":
        """The device of the rank; where nothing named GPUs, torch may still see some: the ranks' in their order."""
        from hpc.model.device import resolve_device

        gpus = self.place.gpus
        # Of several the first, which it sees alone: see `hpc.mpi.binding.bind_process`.
        index = 0 if len(gpus) > 1 else gpus[0] if gpus else self.place.local_rank
        return resolve_device(self.job.device, index)

    @property
    def cuda(self) -> bool:
        """Whether it is for a GPU, which this process need not see."""
        return self.job.device == "cuda" or self.device.type == "cuda"

    @cached_property
    def config(self) -> Any:
        """The model's configuration."""
        from hpc.model import load

        return load.configuration(self.path, self.job.trust_remote_code)

    @cached_property
    def described(self) -> "Description":
        """What the configuration says of the tokens that the model takes."""
        from hpc.model import load

        return load.describe(self.path, self.job.trust_remote_code, self.job.context_tokens)

    @cached_property
    def tokenizer(self) -> "Tokenizer":
        """The tokenizer."""
        from hpc.model.tokenizer import Tokenizer

        return Tokenizer(self.path, self.job.trust_remote_code)

    @property
    def eos_token_ids(self) -> tuple[int, ...]:
        """The end-of-sequence tokens."""
        return self.described.eos_token_ids

    @property
    def context_tokens(self) -> int | None:
        """Most tokens of prompt and completion together; None where the model sets no limit."""
        return self.described.context_tokens

    @property
    def decode(self) -> Decode:
        """What makes text of tokens."""
        return self.tokenizer.decode

    @property
    def kernels(self) -> Path:
        """The folder of compiled kernels."""
        return user_cache() / "kernels"

    def load(self) -> Any:
        """Load the model onto the device of the rank."""
        from hpc.model import load

        job, threads = self.job, self.place.threads
        model = load.load(self.path, self.device, job.dtype, threads, job.trust_remote_code)
        LOGGER.info("loaded %s as %s on %s, %d threads", self.path.name, job.dtype, self.device, threads)
        return model

    def size(self, model: Any = None) -> Size | None:
        """Return what a loaded model holds; of none, what it will hold; None for one that is quantized."""
        from hpc.engine import memory
        from hpc.model import load

        counted = load.weights(model) if model is not None else load.weights_of(self.path, self.job.dtype)
        devices = self.job.replica_gpus if self.device.type == "cuda" else 1
        return counted and Size(*counted, devices * memory.device_bytes(self.device, self.place.ranks_on_node))


class Loader:
    """Loads models with transformers. Nothing is imported before it is needed: a finished run needs none of it."""

    def resolve(self, model: str) -> Model:
        """Find the model; see `hpc.model.find.resolve`."""
        return resolve(model)

    def find(self, model: str) -> Path:
        """Find the model's directory; see `hpc.model.find.find`."""
        return find(model)

    def examine(self, job: Job, path: Path) -> None:
        """Raise `Refusal` if the files at `path` show that they are not all of a causal language model."""
        from hpc.model import load

        load.quiet()
        load.examine(path, job.trust_remote_code)

    def dtype(self, job: Job) -> str:
        """Return the dtype that the job's stands for on this machine."""
        from hpc.model.device import resolve_dtype

        with _refusing():
            return resolve_dtype(job.dtype, job.device)

    def check(self, job: Job, path: Path, place: Binding) -> None:
        """Raise `Refusal` if the engine that the job names would not start, as far as can be told without loading."""
        checkpoint = Checkpoint(job, path, place)
        check_devices(job)
        if job.device == "cuda" and not place.gpus:
            with _refusing():
                _ = checkpoint.device
        kind = ENGINES.get(job.engine)  # none where it is still to be chosen
        if kind is not None and kind.optional and (problem := kind.maker.check(checkpoint)):
            raise Refusal(problem)
        if kind is None and job.replica_devices > 1:  # there is no other choice
            self.choose_engine(job, path, place)

    def checker(self, job: Job, path: Path) -> Checker:
        """Return what checks and tokenizes rows for the model at `path`."""
        from hpc.model import load
        from hpc.model.tokenizer import Tokenizer

        load.quiet()
        described = load.describe(path, job.trust_remote_code, job.context_tokens)
        with load.refusing(path):
            template = read_template(job.chat_template) if job.chat_template else None
            tokenizer = Tokenizer(path, job.trust_remote_code, job.chat_date, template)
        ending = tokenizer.chat_ending(described.eos_token_ids)
        context = min((n for n in (asked_context(job), described.context_tokens) if n is not None), default=None)
        return Checker(
            job.sampling,
            PromptLimits(described.vocab_size, context, job.truncate_prompts, ending),
            tokenizer,
            Columns.of(job),
        )

    def choose_engine(self, job: Job, path: Path, place: Binding) -> Choice:
        """Return the engine that is to generate with the model at `path`, and why."""
        from hpc.model import load

        load.quiet()
        checkpoint = Checkpoint(job, path, place)
        device = "cuda" if job.engine == AUTO and checkpoint.cuda else "cpu"
        return choose(job.engine, device, lambda kind: kind.maker.supports(checkpoint), job.replica_devices)

    def load(self, job: Job, path: Path, place: Binding) -> Replica:
        """Load the model onto the device of the rank at `place`, for the engine that was chosen."""
        began = time.time()
        from hpc.model import endings, load
        from hpc.model.device import cpu_name, device_name, gpu_uuids

        load.quiet()
        maker = ENGINES[job.engine].maker
        spent = ("import", began, time.time())
        checkpoint = Checkpoint(job, path, place)
        device, tokenizer, described = checkpoint.device, checkpoint.tokenizer, checkpoint.described
        of_chats = tokenizer.chat_ending(described.eos_token_ids)
        LOGGER.info("%s", endings.say(described.eos_sources, tokenizer.token, of_chats))
        known = place.gpu_names and all(name.startswith(("GPU-", "MIG-")) for name in place.gpu_names)
        gpu = "" if known else gpu_uuids(device, job.replica_gpus)
        made = device_name(device) if device.type == "cuda" else cpu_name()
        loaded = maker.load(checkpoint)
        return Replica(
            loaded.engine, described.eos_token_ids, tokenizer.decode, made, loaded.size, loaded.name,
            (spent, *loaded.spent), gpu,
        )  # fmt: skip

    def needs(self, job: Job, path: Path) -> Needs | None:
        """Return what the model at `path` needs of the devices that hold it; None where its files do not tell."""
        return needs(path, job.dtype)

    def gpu_bytes(self) -> int | None:
        """Return the memory of the first GPU that this process sees; None where it sees none."""
        from hpc.model.device import gpu_bytes

        return gpu_bytes()

    def trial(self, replica: Replica, seconds: float) -> tuple[list[Measured], Speed | None]:
        """Measure steps of all shapes, and the device, for about so many seconds, of an engine that reports steps."""
        return ENGINES[replica.engine_name].maker.trial(replica.engine, seconds)


@contextlib.contextmanager
def _refusing() -> Iterator[None]:
    """Refuse the job where there is no such device; for rank 0, before the others begin."""
    try:
        yield
    except ValueError as error:
        raise Refusal(str(error)) from error
