"""Fakes with the real signatures: an echo engine of settable speed, its loader, a source, a broken batch."""

import codecs
import os
import resource
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from hpc.corpus.chat import PLAIN, ChatOptions, ChatWriter, Turn
from hpc.corpus.columns import Columns
from hpc.corpus.limits import PromptLimits
from hpc.corpus.tokenize import Checker
from hpc.engine.interface import OnStep, Source, begin, pull
from hpc.engine.registry import AUTO, Choice
from hpc.engine.sequence import Sequence as Growing
from hpc.engine.steps import StepLog
from hpc.job import Job
from hpc.model.find import Model
from hpc.model.loader import Loader, Replica
from hpc.mpi.binding import Binding
from hpc.request import Request
from hpc.trim import Prompt

VOCABULARY = 256
CONTEXT = 2048


class ByteTokenizer:
    """Tokens are the bytes of the text."""

    has_template = True

    def __init__(self) -> None:
        self._chats = ChatWriter(_in_brackets)

    def render(self, messages: Sequence[Turn], options: ChatOptions = PLAIN) -> str:
        return self._chats.write(messages, options)

    def template_source(self, options: ChatOptions = PLAIN) -> str:
        return "role content"

    def encode(self, texts: Sequence[str], special_tokens: bool) -> list[list[int]]:
        return [list(text.encode()) for text in texts]

    def token(self, token_id: int) -> str:
        return f"token {token_id}"

    @property
    def decode(self) -> "ByteText":
        return ByteText()


def _in_brackets(turns: Sequence[Turn], options: ChatOptions) -> str:
    if "system" in [turn["role"] for turn in turns[1:]]:
        raise ValueError("a system turn comes first")
    return "".join(f"[{turn['role']}]" + turn["content"] for turn in turns)


class ByteText:
    """The text of tokens that are bytes, whole characters alone; ids beyond them have none, or are special."""

    def __init__(self, **special_tokens: int) -> None:
        self.special_tokens = special_tokens

    def __call__(self, token_ids: Sequence[int], before: Prompt = ()) -> str:
        behind = bytes(token for token in map(int, before) if token < VOCABULARY)
        whole = behind + bytes(token for token in token_ids if token < VOCABULARY)
        return _whole_characters(whole)[len(_whole_characters(behind)) :]


class Spelled:
    """What makes text of each token by itself."""

    def __init__(self, spell: Callable[[int], bytes]) -> None:
        self.special_tokens: dict[str, int] = {}
        self._spell = spell

    def __call__(self, token_ids: Sequence[int], before: Prompt = ()) -> str:
        return codecs.utf_8_decode(b"".join(map(self._spell, token_ids)), "replace", False)[0]


class Behind(Spelled):
    """What makes text of a token only where something stands before it."""

    def __init__(self) -> None:
        super().__init__(lambda token: chr(0x4E00 + token).encode())

    def __call__(self, token_ids: Sequence[int], before: Prompt = ()) -> str:
        return super().__call__(token_ids, before)[0 if len(before) else 1 :]


def _whole_characters(data: bytes) -> str:
    return codecs.utf_8_decode(data, "replace", False)[0]


class EchoEngine:
    """Answers a prompt with the prompt, again and again, up to max_new_tokens; one token a slot and step.

    Sample i begins at the i-th token of the prompt; each token has the log probability -0.5, as have its neighbours.
    """

    def __init__(self, steps_per_s: float | None = None, slots: int = 8, raise_at: int | str | None = None) -> None:
        self._pause = 1 / steps_per_s if steps_per_s else 0.0
        self._slots = slots
        self._raise_at = raise_at
        self.steps, self.bounds = StepLog(), None

    def generate(self, source: Source, on_step: OnStep) -> Iterator[list[Growing]]:
        live: list[Growing] = []
        while True:
            if len(live) < self._slots:
                room = self._slots * CONTEXT
                live += begin(source.pull(room) if live else pull(source, room, on_step))
            if not live:
                return
            for growing in live[: self._slots]:
                if growing.request.id == self._raise_at:
                    raise RuntimeError(f"the engine broke on request {growing.request.id!r}")
                prompt = growing.request.token_ids
                token = int(prompt[(len(growing.token_ids) + growing.sample) % len(prompt)])
                growing.token_ids.append(token)
                if (count := growing.request.sampling.logprobs) is not None:
                    growing.logprobs.append((-0.5, tuple((token + near, -0.5) for near in range(count))))
            time.sleep(self._pause)
            ended = [g for g in live[: self._slots] if len(g.token_ids) >= g.request.sampling.max_new_tokens]
            if ended:
                live = [g for g in live if len(g.token_ids) < g.request.sampling.max_new_tokens]
                yield ended
            if on_step():
                return


class EchoLoader(Loader):
    """A loader that needs neither torch nor transformers. Each rank may be given another engine."""

    def __init__(self, engine: EchoEngine | None = None, model: str = "echo") -> None:
        self._engine = engine or EchoEngine()
        self._model = model

    def resolve(self, model: str) -> Model:
        return Model(Path(self._model), f"{self._model}:1", "bytes", "brackets")

    def find(self, model: str) -> Path:
        return self.resolve(model).path

    def examine(self, job: Job, path: Path) -> None:
        pass

    def dtype(self, job: Job) -> str:
        return "float32" if job.dtype == "auto" else job.dtype

    def choose_engine(self, job: Job, path: Path, place: Binding) -> Choice:
        return Choice("native" if job.engine == AUTO else job.engine)

    def checker(self, job: Job, path: Path) -> Checker:
        limits = PromptLimits(VOCABULARY, CONTEXT, job.truncate_prompts)
        return Checker(job.sampling, limits, ByteTokenizer(), Columns.of(job))

    def load(self, job: Job, path: Path, place: Binding) -> Replica:
        if "ECHO_FILE_BYTES" in os.environ:  # not before: MPI's own files must fit
            limit = int(os.environ["ECHO_FILE_BYTES"])
            resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
        return Replica(self._engine, (), ByteTokenizer().decode, gpu=os.environ.get("ECHO_GPU", ""))


def echo_from_environment(rank: int) -> EchoLoader:
    """The loader of tests/echo_job.py: its values come from the environment."""
    steps = float(os.environ.get("ECHO_STEPS_PER_S", "0"))
    slow = float(os.environ.get(f"ECHO_STEPS_PER_S_{rank}", steps))
    raise_at = os.environ.get("ECHO_RAISE_AT") if os.environ.get("ECHO_RAISE_RANK", str(rank)) == str(rank) else None
    return EchoLoader(EchoEngine(slow or None, int(os.environ.get("ECHO_SLOTS", "8")), raise_at))


class ListSource:
    """A source that has everything from the start."""

    def __init__(self, requests: Sequence[Request]) -> None:
        self.requests = list(requests)

    @property
    def exhausted(self) -> bool:
        return not self.requests

    def pull(self, num_tokens: int) -> list[Request]:
        taken: list[Request] = []
        while self.requests and (not taken or self.requests[0].max_tokens <= num_tokens):
            num_tokens -= self.requests[0].max_tokens
            taken.append(self.requests.pop(0))
        return taken
