"""Job and its parts: every knob, its type, default, check and help text, said once.

Knows nothing of files, models or MPI. Values are checked where they are made (`ValueError` with the
value, the rule and the way out), so a job that exists is a job that can be run.
"""

import dataclasses
import functools
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any, Literal

from hpc.allocation import Share, Slurm
from hpc.engine_args import Vllm


class Refusal(Exception):
    """The user asked for what must not be done; the message says what to do instead. Exit code 2."""


DType = Literal["auto", "float32", "bfloat16", "float16"]


_INT_MAX = 2**31 - 1
_MOST_SAMPLES = 10_000
_MOST_LOGPROBS = 20
_FIRST_PARAMETERS = (
    "max_new_tokens", "temperature", "top_p", "top_k", "stop", "stop_token_ids", "ignore_eos", "seed",
)  # fmt: skip


def _require(condition: bool, name: str, value: object, rule: str) -> None:
    if not condition:
        raise ValueError(f'"{name}" is {value!r}; {rule}')


def _moment(date: str) -> str:
    """Return a date, or date and time, as date and time in ISO format; nothing for nothing."""
    try:
        return datetime.fromisoformat(date).isoformat(timespec="seconds") if date else ""
    except (TypeError, ValueError):
        raise ValueError(
            f'"chat_date" is {date!r}; it must be a date such as 2026-11-28, or a date and time such as '
            "2026-11-28T09:30:00"
        ) from None


def _is_int(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_number(value: object) -> bool:
    return _is_int(value) or isinstance(value, float)


def _is_text(value: object) -> bool:
    try:
        return isinstance(value, str) and bool(value.encode())
    except UnicodeEncodeError:  # half of a surrogate pair
        return False


@dataclass(frozen=True)
class SamplingParams:
    """How the tokens of one request are chosen and when it ends."""

    max_new_tokens: int = 256
    """Most tokens to generate for a row; less where the model's context leaves less."""
    temperature: float = 0.0
    """0 is greedy; above 0 the logits are divided by it and a token is drawn."""
    top_p: float = 1.0
    """Draw from the smallest set of tokens whose probability reaches this; 1 is all."""
    top_k: int = 0
    """Draw from this many most probable tokens; 0 is all."""
    min_p: float = 0.0
    """Draw from the tokens whose probability is at least this share of the most probable one's; 0 is all."""
    repetition_penalty: float = 1.0
    """Divides the positive logits of tokens of prompt and completion, multiplies the negative; 1 is off."""
    presence_penalty: float = 0.0
    """Subtracted from the logit of each token that has been generated; 0 is off."""
    frequency_penalty: float = 0.0
    """Subtracted from the logit of a token for each time it has been generated; 0 is off."""
    n: int = 1
    """Samples of each prompt; several need a temperature above 0."""
    min_new_tokens: int = 0
    """Nothing but the limit ends a row before so many tokens: no ending token is chosen, no stop string counts."""
    logprobs: int | None = None
    """Log probabilities of the raw logits: 0 of each chosen token, k (at most 20) of the k most probable too."""
    stop: tuple[str, ...] = ()
    """End where one of these strings appears; the text is cut before it."""
    stop_token_ids: tuple[int, ...] = ()
    """End at one of these tokens, besides the model's own end-of-sequence tokens."""
    ignore_eos: bool = False
    """Do not end at the model's end-of-sequence tokens."""
    seed: int = 0
    """With a row's id this fixes every random number that the row uses."""

    def __post_init__(self) -> None:
        _require(_is_int(self.max_new_tokens), "max_new_tokens", self.max_new_tokens, "it must be an integer")
        _require(self.max_new_tokens >= 1, "max_new_tokens", self.max_new_tokens, "it must be at least 1")
        _require(
            self.max_new_tokens <= _INT_MAX, "max_new_tokens", self.max_new_tokens, f"it must be at most {_INT_MAX}"
        )
        _require(_is_number(self.temperature), "temperature", self.temperature, "it must be a number")
        _require(
            self.temperature == 0 or 1e-4 <= self.temperature <= 1e4,
            "temperature",
            self.temperature,
            "it must be 0 (greedy), or from 0.0001 to 10000",
        )
        _require(_is_number(self.top_p), "top_p", self.top_p, "it must be a number")
        _require(0 < self.top_p <= 1, "top_p", self.top_p, "it must be above 0 and at most 1 (1 is off)")
        _require(_is_int(self.top_k), "top_k", self.top_k, "it must be an integer")
        _require(0 <= self.top_k <= _INT_MAX, "top_k", self.top_k, f"it must be from 0 (off) to {_INT_MAX}")
        for name, least, most, rule in (
            ("min_p", 0, 1, "from 0 (off) to 1"),
            ("repetition_penalty", 0.01, 100, "from 0.01 to 100 (1 is off)"),
            ("presence_penalty", -2, 2, "from -2 to 2 (0 is off)"),
            ("frequency_penalty", -2, 2, "from -2 to 2 (0 is off)"),
        ):
            value = getattr(self, name)
            _require(_is_number(value), name, value, "it must be a number")
            _require(least <= value <= most, name, value, f"it must be {rule}")
        _require(_is_int(self.n), "n", self.n, "it must be an integer")
        _require(1 <= self.n <= _MOST_SAMPLES, "n", self.n, f"it must be from 1 to {_MOST_SAMPLES}")
        _require(
            self.n == 1 or not self.greedy,
            "n",
            self.n,
            "it must be 1 where the temperature is 0, since all samples would be the same; set a temperature above 0",
        )
        _require(_is_int(self.min_new_tokens), "min_new_tokens", self.min_new_tokens, "it must be an integer")
        _require(
            0 <= self.min_new_tokens <= self.max_new_tokens,
            "min_new_tokens",
            self.min_new_tokens,
            f"it must be from 0 (off) to max_new_tokens ({self.max_new_tokens})",
        )
        _require(
            self.logprobs is None or (_is_int(self.logprobs) and 0 <= self.logprobs <= _MOST_LOGPROBS),
            "logprobs",
            self.logprobs,
            f"it must be an integer from 0 (the chosen tokens' alone) to {_MOST_LOGPROBS}, or none at all",
        )
        _require(
            isinstance(self.stop, tuple) and all(_is_text(string) for string in self.stop),
            "stop",
            self.stop,
            "it must be a list of non-empty strings of Unicode text",
        )
        _require(
            isinstance(self.stop_token_ids, tuple)
            and all(_is_int(t) and 0 <= t <= _INT_MAX for t in self.stop_token_ids),
            "stop_token_ids",
            self.stop_token_ids,
            f"it must be a list of token ids (integers from 0 to {_INT_MAX})",
        )
        _require(isinstance(self.ignore_eos, bool), "ignore_eos", self.ignore_eos, "it must be true or false")
        _require(_is_int(self.seed), "seed", self.seed, "it must be an integer")
        # 1 and 1.0, 0.0 and -0.0 are the same and must give the same key.
        for name in ("temperature", "top_p", "min_p", "repetition_penalty", "presence_penalty", "frequency_penalty"):
            object.__setattr__(self, name, float(getattr(self, name)) + 0.0)

    @property
    def greedy(self) -> bool:
        """Whether the most probable token is taken at every step."""
        return self.temperature == 0

    @property
    def penalised(self) -> bool:
        """Whether the tokens so far change the logits of the next."""
        return self.repetition_penalty != 1 or self.presence_penalty != 0 or self.frequency_penalty != 0

    def override(self, values: Mapping[str, Any]) -> "SamplingParams":
        """Return these parameters with some of them replaced.

        `values` comes from JSON: lists stand for tuples, one string for a list of one, null for what is not
        given. Raises `ValueError` for a name that is none of the parameters, or a value that breaks its rule.
        """
        names = [f.name for f in dataclasses.fields(self)]
        changes: dict[str, Any] = {}
        for name, value in values.items():
            if value is None:  # absent; what is not given is as it was
                continue
            if name not in names:
                raise ValueError(f'"{name}" is no sampling parameter; the parameters are {", ".join(names)}')
            if name == "stop" and isinstance(value, str):
                value = [value]
            changes[name] = tuple(value) if isinstance(value, list) else value
        return dataclasses.replace(self, **changes)

    def overridden(self, values: Mapping[str, Any]) -> "SamplingParams":
        """Return `override(values)`; what the last rows asked for is remembered, as most ask for the same."""
        return _overridden(self, json.dumps(values))

    def identity(self) -> dict[str, Any]:
        """Return what a completion depends on: for a greedy request, no parameter of drawing.

        A parameter that is younger than the first journals is left out where it has its default, so
        that their completions are found again.
        """
        values = dict(vars(self))
        if self.greedy:
            for name in ("temperature", "top_p", "top_k", "min_p", "seed"):
                del values[name]
        for younger in dataclasses.fields(self):
            if younger.name not in _FIRST_PARAMETERS and values.get(younger.name) == younger.default:
                values.pop(younger.name, None)
        return values


@functools.lru_cache(maxsize=1 << 14)
def _overridden(defaults: SamplingParams, values: str) -> SamplingParams:
    return defaults.override(json.loads(values))


@dataclass(frozen=True)
class Job:
    """Generate a completion for every row of a corpus."""

    model: str
    """A model directory, a .gguf file or a hub id."""
    corpus: tuple[str, ...]
    """JSONL file, several, a quoted glob, or - for standard input; read in the order given (a glob in sorted order)."""
    name: str = ""
    """Name of the run directory below --runs; default: the corpus' stem."""
    runs: str = "runs"
    """Folder that holds the run directories."""
    limit: int | None = None
    """Only the first so many rows."""
    engine: Literal["native", "hf", "vllm"] = "native"
    """What generates: native is continuous batching; hf is transformers' generate on length buckets, and
    what generates for a model that native does not support; vllm is vLLM, inside each rank."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where the model lives; auto is a GPU where there is one."""
    dtype: DType = "auto"
    """Type of the weights; auto is resolved at the first attempt and kept in job.json."""
    tail: float = 0.5
    """Share of the predicted work that rank 0 keeps back and hands out on demand, but nothing that all ranks can begin
    with at once (hf: 0.15 at most); 0 is static."""
    buckets: int = 16
    """hf: most length buckets; within one, prompts are padded to its longest."""
    batch_tokens: int = 16384
    """hf: most tokens (padded prompt and completion) in one batch; it bounds the memory."""
    max_num_seqs: int = 0
    """native, vllm: most sequences that are generated at a time; 0 is 128 on a CPU, 256 on a GPU."""
    cache_gib: float = 0.0
    """native, vllm: memory of a rank for keys and values; 0 is four fifths of what is left (vllm: what
    --vllm.gpu-memory-utilization leaves; on a CPU 2)."""
    deterministic: bool = False
    """native, bfloat16: the same numbers whatever is computed together, at some cost in speed; on a CPU it is
    always so in float32, and where the kernel multiplies bfloat16."""
    drafts: bool = True
    """native, on a CPU: guess tokens of greedy rows while few rows are left; the output is the same."""
    return_token_ids: bool = False
    """Add the completion's token ids to each output row."""
    truncate_prompts: Literal["none", "left", "right"] = "none"
    """Cut a prompt that does not fit the context at this side; none makes it an error row."""
    context_tokens: int | None = None
    """Most tokens of a prompt and its completion together, in place of what the model's config says."""
    trust_remote_code: bool = False
    """Run the Python code that comes with the model: it can do whatever you can."""
    chat_date: str = ""
    """The date (2026-11-28), or date and time, for chat templates that write it; default: when the run is begun."""
    max_error_rate: float = 1.0
    """End with a fault if a greater share of the rows are error rows."""
    retry_errors: bool = False
    """Generate again the rows that an engine error ended in an earlier attempt."""
    force: bool = False
    """Take the run directory even where its lock cannot be tested, or where it was begun with another corpus: the
    output so far is then kept under another name."""
    share: str = ""
    """I/N: only the rows whose index is I modulo N, generated here alone; the last of the N shares merges."""
    show: int = 0
    """Print so many of the first prompts with their completions at the end."""
    sampling: SamplingParams = field(default_factory=SamplingParams)
    """How tokens are chosen; a row's own "sampling" goes before it."""
    vllm: Vllm = field(default_factory=Vllm)
    """What the vllm engine asks of vLLM."""
    slurm: Slurm = field(default_factory=Slurm)
    """What `submit` asks of Slurm."""

    def __post_init__(self) -> None:
        _require(bool(self.model), "model", self.model, "it must name a directory, a .gguf file or a hub id")
        _require(isinstance(self.corpus, tuple), "corpus", self.corpus, "it must be a tuple of names")
        _require(bool(self.corpus), "corpus", self.corpus, "it must name a JSONL file, several or a quoted glob")
        _require(self.limit is None or self.limit >= 1, "limit", self.limit, "it must be at least 1")
        _require(0 <= self.tail <= 1, "tail", self.tail, "it must be from 0 (static) to 1")
        _require(1 <= self.buckets <= 32, "buckets", self.buckets, "it must be from 1 to 32")
        _require(self.batch_tokens >= 1, "batch_tokens", self.batch_tokens, "it must be at least 1")
        _require(0 <= self.max_num_seqs <= 4096, "max_num_seqs", self.max_num_seqs, "it must be from 0 (auto) to 4096")
        _require(self.cache_gib >= 0, "cache_gib", self.cache_gib, "it must be at least 0 (auto)")
        _require(
            self.context_tokens is None or self.context_tokens >= 1,
            "context_tokens",
            self.context_tokens,
            "it must be at least 1",
        )
        object.__setattr__(self, "chat_date", _moment(self.chat_date))
        _require(0 <= self.max_error_rate <= 1, "max_error_rate", self.max_error_rate, "it must be from 0 to 1")
        Share.of(self.share)
        _require(self.show >= 0, "show", self.show, "it must be at least 0")
        _require(
            self.name not in (".", "..") and "/" not in self.name,
            "name",
            self.name,
            "it must be one folder name (the folder above it is --runs)",
        )

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> "Job":
        """Make the job that `dataclasses.asdict` and JSON have made `values` of: lists stand for tuples."""
        sampling = SamplingParams().override(values["sampling"])
        parts = {"slurm": Slurm(**values.get("slurm", {})), "vllm": Vllm(**values.get("vllm", {}))}
        return cls(**{**values, "corpus": tuple(values["corpus"]), "sampling": sampling, **parts})
