"""Load tokenizers, models and engines. The pipeline is given a `Loader`; tests pass a fake with the same methods."""

import contextlib
import logging
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hpc.corpus.columns import Columns
from hpc.corpus.limits import OutputLimits, PromptLimits
from hpc.corpus.tokenize import Checker
from hpc.corpus.translation import Translation
from hpc.engine.bounds import Size, Speed
from hpc.engine.interface import Engine
from hpc.engine.registry import AUTO, ENGINES, Choice, asked_context, check_devices, choose, no_encoder
from hpc.engine.steps import Measured
from hpc.exit import Refusal
from hpc.job import Job
from hpc.model.find import Model, find, read_template, resolve, user_cache
from hpc.model.needs import Needs, needs
from hpc.mpi.binding import Binding
from hpc.trim import Decode

if TYPE_CHECKING:
    import torch

    from hpc.engine.decoder import DecoderRules
    from hpc.model.description import Description
    from hpc.model.tokenizer import Tokenizer

LOGGER = logging.getLogger(__name__)


@dataclass(frozen=True)
class Replica:
    """An engine, and what turns its tokens into text."""

    engine: Engine
    eos_token_ids: tuple[int, ...]
    decode: Decode
    device: str = "cpu"
    """Name of the processor or GPU."""
    size: Size | None = None
    """Size of the model; None if it is not known."""
    engine_name: str = ""
    """Name of the engine, as the flag spells it; empty: that of the job."""
    spent: tuple[tuple[str, float, float], ...] = ()
    """Spans of time not spent on loading: kind as in `hpc.report.timeline`, begin and end in seconds of the clock."""
    goes_on: bool = True
    """A completion's text goes on with the prompt's; that of an encoder-decoder begins anew."""
    gpu: str = ""
    """UUIDs of its GPUs as torch reports them, separated by commas; empty if the binding knows them already."""


@dataclass
class Checkpoint:
    """A model directory, the job, and the place of a rank: see `hpc.engine.registry.Checkpoint`."""

    job: Job
    path: Path
    place: Binding

    @cached_property
    def device(self) -> "torch.device":
        """The device of the rank. If nothing named GPUs and torch sees some, ranks take them in order."""
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
        """Vocabulary, limits and ending tokens, from the configuration."""
        from hpc.model.description import describe

        return describe(self.path, self.job.trust_remote_code, self.job.context_tokens)

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
    def decoder_rules(self) -> "DecoderRules | None":
        """The rules of an encoder-decoder's decoder; None for a causal language model."""
        return self.described.decoder_rules

    @property
    def decode(self) -> Decode:
        """The detokenizer."""
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
        """Return the size of a loaded model, or without one the size it will have; None if it is quantized."""
        from hpc.engine import memory
        from hpc.model import load

        counted = load.weights(model) if model is not None else load.weights_of(self.path, self.job.dtype)
        devices = self.job.replica_gpus if self.device.type == "cuda" else 1
        return counted and Size(*counted, devices * memory.device_bytes(self.device, self.place.ranks_on_node))


class Loader:
    """Loads models with transformers. Libraries are imported on first use: a finished run needs none."""

    def resolve(self, model: str) -> Model:
        """Find the model; see `hpc.model.find.resolve`."""
        return resolve(model)

    def find(self, model: str) -> Path:
        """Find the model's directory; see `hpc.model.find.find`."""
        return find(model)

    def examine(self, job: Job, path: Path) -> None:
        """Raise `Refusal` if the files at `path` show that the model lacks a part or does not generate text."""
        from hpc.model import load

        load.quiet()
        load.examine(path, job.trust_remote_code)

    def dtype(self, job: Job) -> str:
        """Return the dtype that the job's, which may be "auto", means on this machine."""
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
        if kind is not None and kind.optional:
            if problem := no_encoder(kind, checkpoint.config):
                raise Refusal(f"{problem}; leave --engine to auto, or name hf")
            if problem := kind.maker.check(checkpoint):
                raise Refusal(problem)
        if kind is None and job.replica_devices > 1:  # there is no other choice
            self.choose_engine(job, path, place)

    def checker(self, job: Job, path: Path) -> Checker:
        """Return a checker of rows for the model at `path`; raise `Refusal` for languages that it does not have."""
        from hpc.model import load
        from hpc.model.description import describe
        from hpc.model.tokenizer import Tokenizer

        load.quiet()
        described = describe(path, job.trust_remote_code, job.context_tokens)
        with load.refusing(path):
            template = read_template(job.chat_template) if job.chat_template else None
            tokenizer = Tokenizer(path, job.trust_remote_code, job.chat_date, template)
        languages = tokenizer.languages if described.decoder_rules is not None else None
        ending = tokenizer.chat_ending(described.eos_token_ids)
        context = min((n for n in (asked_context(job), described.context_tokens) if n is not None), default=None)
        limits = PromptLimits(described.vocab_size, context, job.truncate_prompts, ending)
        if (rules := described.decoder_rules) is not None:
            limits = replace(
                limits,
                output=OutputLimits(
                    described.output_vocab_size,
                    described.output_tokens,
                    rules.forced_bos is not None or bool(languages and languages.is_language(rules.start)),
                ),
            )
        translation = Translation(
            languages,
            job.source_lang,
            job.target_lang,
            job.instruction if described.decoder_rules is None else "",
            must_name_target=limits.output is not None and not limits.output.begins,
        )
        if problem := translation.problem():
            raise Refusal(f'model "{path}": {problem}')
        return Checker(job.sampling, limits, tokenizer, Columns.of(job), translation)

    def choose_engine(self, job: Job, path: Path, place: Binding) -> Choice:
        """Return the engine that is to generate with the model at `path`, and why."""
        from hpc.model import load

        load.quiet()
        checkpoint = Checkpoint(job, path, place)
        device = "cuda" if job.engine == AUTO and checkpoint.cuda else "cpu"
        if unheeded := checkpoint.described.unheeded:
            LOGGER.warning(
                "the model's generation config asks for %s, which changes nothing: each token is chosen at once, "
                "without beams, as the job's and the rows' sampling parameters say",
                ", ".join(unheeded),
            )
        return choose(
            job.engine,
            device,
            lambda kind: no_encoder(kind, checkpoint.config) or kind.maker.supports(checkpoint),
            job.replica_devices,
        )

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
            (spent, *loaded.spent), described.decoder_rules is None, gpu,
        )  # fmt: skip

    def needs(self, job: Job, path: Path) -> Needs | None:
        """Return what the model at `path` needs of the devices that hold it; None where its files do not tell."""
        return needs(path, job.dtype)

    def gpu_bytes(self) -> int | None:
        """Return the memory of the first GPU that this process sees; None where it sees none."""
        from hpc.model.device import gpu_bytes

        return gpu_bytes()

    def trial(self, replica: Replica, seconds: float) -> tuple[list[Measured], Speed | None]:
        """Measure steps of all shapes, and the device, for about `seconds`. Only for engines that report steps."""
        return ENGINES[replica.engine_name].maker.trial(replica.engine, seconds)


@contextlib.contextmanager
def _refusing() -> Iterator[None]:
    """Turn the `ValueError` for a missing device into a `Refusal`, on rank 0 before the others begin."""
    try:
        yield
    except ValueError as error:
        raise Refusal(str(error)) from error
