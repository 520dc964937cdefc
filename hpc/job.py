"""Job: what is generated, from which corpus, with which model, and where. A frozen dataclass; each field is a flag."""

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from datetime import datetime
from typing import Any, Literal

from hpc.engine_args import Vllm
from hpc.prompts import PromptTemplate, canonical_variables, check_columns
from hpc.sampling_params import SamplingParams, require

EARLY_SIGNAL_S = 60
"""Slurm checks time limits once a minute, so that a signal may come this many seconds early."""


@dataclass(frozen=True)
class Slurm:
    """Options for Slurm; None leaves the choice to the template, then to the site."""

    template: str = "default"
    """Site profile: a folder, or the name of one in ./slurm_templates, of the user's or of the package."""
    nodes: int | None = None
    """Nodes; 1 where the template says nothing."""
    tasks_per_node: int | None = None
    """Ranks on each node; as many as have their GPUs there where the template says nothing, else 1."""
    gpus_per_node: int | None = None
    """GPUs on each node: one, or --replica-gpus, for each rank."""
    cpus_per_task: int | None = None
    """Cores of each rank."""
    time_min: int | None = None
    """Time limit in minutes; 60 where the template says nothing."""
    signal_delay_s: int = 120
    """Seconds from Slurm's signal to stop to the time limit; the signal may come up to a minute earlier."""
    partition: str | None = None
    """Partition, a queue; `sinfo` lists them."""
    account: str | None = None
    """Account that is charged."""
    qos: str | None = None
    """Quality of service."""
    constraint: str | None = None
    """Features that the nodes must have: a100."""
    gres: str | None = None
    """Generic resources of each node: gpu:a100:4."""
    mem: str | None = None
    """Memory of a node, as sbatch writes it: 64G."""
    nodelist: str | None = None
    """Nodes that the job must run on."""
    exclude: str | None = None
    """Nodes that the job must not run on."""
    exclusive: bool = False
    """Share the nodes with no other job."""
    reservation: str | None = None
    """Name of a reservation."""
    dependency: str | None = None
    """Condition for the start, as sbatch writes it: afterok:123."""
    mpi: str | None = None
    """Type for srun --mpi: pmi2 for MPICH and Intel MPI, pmix for Open MPI; the template's otherwise."""
    array: int = 0
    """Number of independent jobs instead of one MPI job, each with its share of the rows."""
    max_requeues: int = 50
    """Maximum number of times that the job puts itself back into the queue."""
    additional_parameters: Mapping[str, str] = field(default_factory=dict)
    """Any other option of sbatch: mail-type END licenses matlab:1; "true" stands for an option without value."""

    def __post_init__(self) -> None:
        for name in ("nodes", "tasks_per_node", "gpus_per_node", "cpus_per_task", "time_min"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f'"slurm.{name}" is {value}; it must be at least 1')
        for name, minimum in (("array", 0), ("max_requeues", 0), ("signal_delay_s", 1)):
            if getattr(self, name) < minimum:
                raise ValueError(f'"slurm.{name}" is {getattr(self, name)}; it must be at least {minimum}')
        if self.time_min is not None:
            check_time(self.time_min, self.signal_delay_s)
        if self.array and (self.nodes or 1) * (self.tasks_per_node or 1) > 1:
            raise ValueError(
                f'"slurm.array" is {self.array} with {self.nodes or 1} nodes of {self.tasks_per_node or 1} tasks; each '
                "job of an array is one rank: leave nodes and tasks_per_node out"
            )


def check_time(time_min: int, signal_delay_s: int) -> None:
    """Raise `ValueError` if Slurm's signal to stop could come in the first minute."""
    min_s = signal_delay_s + 2 * EARLY_SIGNAL_S
    if 60 * time_min < min_s:
        raise ValueError(
            f'"slurm.time_min" is {time_min}, and the signal to stop comes {signal_delay_s} s before the end, or up to '
            f"{EARLY_SIGNAL_S} s earlier; ask for at least {-(-min_s // 60)} minutes, or set a smaller "
            "slurm.signal_delay_s"
        )


@dataclass(frozen=True)
class Share:
    """The rows of a corpus that one of several independent jobs generates: their index is this, modulo the count."""

    index: int
    count: int

    @classmethod
    def of(cls, text: str) -> "Share | None":
        """Parse a share such as "3/8"; return None for an empty text; raise `ValueError` for any other."""
        if not text:
            return None
        index, _, count = text.partition("/")
        if not (index.isdigit() and count.isdigit() and int(index) < int(count)):
            raise ValueError(f'"share" is {text!r}; it must be an index and a count, from 0/8 to 7/8 for eight shares')
        return cls(int(index), int(count))


OutputFormat = Literal["auto", "jsonl", "csv", "parquet", "openai"]
DType = Literal["auto", "float32", "bfloat16", "float16"]


def _moment(date: str) -> str:
    """Return a date, with or without a time, as date and time in ISO format; an empty text stays empty."""
    try:
        return datetime.fromisoformat(date).isoformat(timespec="seconds") if date else ""
    except (TypeError, ValueError):
        raise ValueError(
            f'"chat_date" is {date!r}; it must be a date such as 2026-11-28, or a date and time such as '
            "2026-11-28T09:30:00"
        ) from None


@dataclass(frozen=True)
class Output:
    """Where an output goes, and in which format: fields of a job."""

    output: str = ""
    output_format: OutputFormat = "auto"
    output_rows_per_file: int = 0
    error_file: str = ""


@dataclass(frozen=True)
class Job:
    """Generate a completion for every row of a corpus."""

    model: str
    """A model directory, a .gguf file or a hub id."""
    corpus: tuple[str, ...]
    """File, several, a folder, a quoted glob, or - for standard input; read in the order given (a folder or glob in
    sorted order). JSONL, JSON, CSV, TSV, plain text, Parquet, Arrow; text may be packed (.gz .zst .bz2 .xz)."""
    format: Literal["auto", "jsonl", "json", "csv", "tsv", "text", "parquet", "arrow"] = "auto"
    """How the corpus' files are read; auto looks at their content. text is plain text, whose lines are prompts."""
    text_per: Literal["line", "file"] = "line"
    """What one prompt is in plain text; a line, or a whole file of the corpus."""
    name: str = ""
    """Name of the run directory below --runs; default: the corpus' stem."""
    runs: str = "runs"
    """Folder that holds the run directories."""
    limit: int | None = None
    """Only the first so many rows."""
    engine: Literal["auto", "native", "hf", "vllm"] = "auto"
    """What generates: native is continuous batching; hf is transformers' generate on length buckets, and
    what generates for a model that native does not support; vllm is vLLM, inside each rank. auto is, on a GPU,
    vllm where it is installed and has the model; else native where it supports the model; else hf."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where the model lives; auto is a GPU where there is one."""
    dtype: DType = "auto"
    """Type of the weights; auto is resolved at the first attempt and kept in job.json."""
    tail: float = 0.5
    """Share of the predicted work that rank 0 hands out on demand; 0 is static. What all ranks can begin with at
    once is not kept back, nor more than 0.15 for hf."""
    buckets: int = 16
    """Maximum number of length buckets for hf; within one, prompts are padded to its longest."""
    batch_tokens: int = 16384
    """Maximum tokens (padded prompt and completion) in one batch of hf; it bounds the memory."""
    max_num_seqs: int = 0
    """Maximum number of sequences at a time, with native or vllm; 0 is 128 on a CPU, 256 on a GPU."""
    cache_gib: float = 0.0
    """Memory of a rank for keys and values, with native or vllm; 0 is four fifths of what is left (vllm: what
    --vllm.gpu-memory-utilization leaves; on a CPU 2)."""
    replica_gpus: int = 1
    """GPUs of a node on which each rank keeps its model, for one that a GPU does not hold; more than 1: vllm alone."""
    replica_cpus: int = 1
    """Processes on which each rank keeps its model with --device cpu, for tests; more than 1: vllm alone."""
    deterministic: bool = False
    """The same numbers whatever is computed together, in bfloat16; at some cost in speed. On a CPU it is always so
    in float32, and where the kernel multiplies bfloat16."""
    drafts: bool = True
    """On a CPU, guess tokens of greedy rows while few rows are left; the output is the same."""
    source_lang: str = ""
    """Language of the prompts, as a multilingual encoder-decoder calls it (eng_Latn); a row's "source_lang" goes before
    it. Default: the tokenizer's."""
    target_lang: str = ""
    """Language to translate into, as a multilingual encoder-decoder calls it (deu_Latn); a row's "target_lang" goes
    before it."""
    instruction: str = ""
    """What a model without an encoder is asked to do; a text with {prompt} in it, and {source_lang} or {target_lang}.
    It becomes a user's turn if the model has a chat template."""
    output: str = ""
    """File, or folder, that the output goes to; its name says the format: .jsonl or .csv, .gz or .zst behind them for
    packed ones, or .parquet. Default: completions.jsonl in the run directory."""
    output_format: OutputFormat = "auto"
    """Format of the output; auto is what the name of the output says, and of JSON lines openai (responses of its batch
    API) where the corpus is such a batch."""
    output_rows_per_file: int = 0
    """Write several files of so many rows, NAME-00000-of-00012.jsonl; 0 is one file."""
    error_file: str = ""
    """File for lines without a completion, in the openai format alone."""
    return_token_ids: bool = False
    """Add the completion's token ids to each output row."""
    truncate_prompts: Literal["none", "left", "right"] = "none"
    """Cut a prompt that does not fit the context at this side; none makes it an error row."""
    context_tokens: int | None = None
    """Maximum tokens of a prompt and its completion together; in place of what the model's config says. Of an
    encoder-decoder, maximum tokens of a prompt."""
    trust_remote_code: bool = False
    """Run the Python code that comes with the model: it can do whatever you can."""
    chat_date: str = ""
    """The date (2026-11-28), or date and time, for chat templates that write it; default: when the run is begun."""
    chat_template: str = ""
    """File with a chat template, in the place of the model's."""
    chat_template_kwargs: str = ""
    """JSON object of variables for the chat template, '{"enable_thinking": false}'; a row's own go before them."""
    row_chat_templates: bool = False
    """Let rows bring a "chat_template" of their own: it cannot run code, and may never end."""
    column: tuple[str, ...] = ()
    """Which column holds what, prompt=question id=key; left of the = stands prompt, messages, prompt_token_ids, id,
    sampling, tools, documents, chat_template_kwargs or chat_template, right of it a column, or nothing for none."""
    prompt_template: str = ""
    """Prompt of each row, with names of its columns in braces; 'Translate to German: {text}'; a brace itself is written
    twice."""
    system: str = ""
    """First turn for chats that have no system turn; a text prompt becomes a chat of it and the text."""
    last_assistant: Literal["refuse", "continue", "drop", "keep"] = "refuse"
    """What becomes of chats that end with the assistant's turn; refuse makes error rows, continue goes on with that
    turn, drop leaves it out, keep lets a new turn of the assistant follow it."""
    unknown_parameters: Literal["refuse", "ignore"] = "refuse"
    """What becomes of OpenAI batch lines with unknown parameters; refuse makes them error rows, ignore leaves the
    parameters out."""
    max_error_rate: float = 1.0
    """End with a fault if a greater share of the rows are error rows."""
    retry_errors: bool = False
    """Generate again the rows that an engine error ended in an earlier attempt."""
    force: bool = False
    """Take the run directory although its lock cannot be tested, or another corpus began it; the output so far is
    then kept under another name."""
    share: str = ""
    """Only the rows whose index is I modulo N, as I/N; generated here alone, and the last of the N shares merges."""
    show: int = 0
    """Print so many of the first prompts with their completions at the end."""
    sampling: SamplingParams = field(default_factory=SamplingParams)
    """How tokens are chosen; a row's own "sampling" goes before it."""
    vllm: Vllm = field(default_factory=Vllm)
    """What the vllm engine asks of vLLM."""
    slurm: Slurm = field(default_factory=Slurm)
    """What `submit` asks of Slurm."""

    def __post_init__(self) -> None:
        require(bool(self.model), "model", self.model, "it must name a directory, a .gguf file or a hub id")
        require(
            isinstance(self.corpus, tuple), "corpus", self.corpus, 'it must be a tuple of names: ("prompts.jsonl",)'
        )
        require(bool(self.corpus), "corpus", self.corpus, "it must name a file, several, a folder or a quoted glob")
        require(self.limit is None or self.limit >= 1, "limit", self.limit, "it must be at least 1")
        require(0 <= self.tail <= 1, "tail", self.tail, "it must be from 0 (static) to 1")
        require(1 <= self.buckets <= 32, "buckets", self.buckets, "it must be from 1 to 32")
        require(self.batch_tokens >= 1, "batch_tokens", self.batch_tokens, "it must be at least 1")
        require(0 <= self.max_num_seqs <= 4096, "max_num_seqs", self.max_num_seqs, "it must be from 0 (auto) to 4096")
        require(self.cache_gib >= 0, "cache_gib", self.cache_gib, "it must be at least 0 (auto)")
        on_cpu = self.device == "cpu"
        for name, allowed, others in (("replica_gpus", not on_cpu, "cpus"), ("replica_cpus", on_cpu, "gpus")):
            count = getattr(self, name)
            require(count >= 1, name, count, "it must be at least 1")
            where = "with" if on_cpu else "without"
            require(count == 1 or allowed, name, count, f"it must be 1 {where} --device cpu; say --replica-{others}")
        gpus = self.slurm.gpus_per_node
        require(
            not self.slurm.array or gpus in (None, self.replica_gpus),
            "slurm.gpus_per_node", gpus, f"with an array, whose jobs are one rank each, it must be {self.replica_gpus}",
        )  # fmt: skip
        require(
            self.text_per == "line" or self.format in ("auto", "text"),
            "format",
            self.format,
            "with --text-per file it must be text",
        )
        require(
            self.context_tokens is None or self.context_tokens >= 1,
            "context_tokens",
            self.context_tokens,
            "it must be at least 1",
        )
        object.__setattr__(self, "chat_date", _moment(self.chat_date))
        require(
            not self.instruction or "{prompt}" in self.instruction,
            "instruction",
            self.instruction,
            "it must have {prompt} in it, where the text of a row goes",
        )
        require(0 <= self.max_error_rate <= 1, "max_error_rate", self.max_error_rate, "it must be from 0 to 1")
        check_columns(self.column)
        if self.prompt_template:
            PromptTemplate.of(self.prompt_template)
            prompts = [text for text in self.column if text.startswith(("prompt=", "messages=", "prompt_token_ids="))]
            require(not prompts, "prompt_template", self.prompt_template, f"it makes the prompt, and so does {prompts}")
        object.__setattr__(self, "chat_template_kwargs", canonical_variables(self.chat_template_kwargs))
        Share.of(self.share)
        rows = self.output_rows_per_file
        require(rows >= 0, "output_rows_per_file", rows, "it must be at least 0 (one file)")
        require(self.show >= 0, "show", self.show, "it must be at least 0")
        require(
            self.name not in (".", "..") and "/" not in self.name,
            "name",
            self.name,
            "it must be one folder name (the folder above it is --runs)",
        )

    @property
    def replica_devices(self) -> int:
        """How many devices of a node each rank keeps its model on."""
        return max(self.replica_gpus, self.replica_cpus)

    def prompt_values(self) -> dict[str, Any]:
        """Return the fields that prompts depend on, by name, where they differ from the defaults."""
        return {name: value for name in PROMPT_FIELDS if (value := _as_json(getattr(self, name))) != _DEFAULTS[name]}

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> "Job":
        """Rebuild a job from `dataclasses.asdict` after JSON: lists stand for tuples."""
        sampling = SamplingParams().override(values["sampling"])
        parts = {"slurm": Slurm(**values.get("slurm", {})), "vllm": Vllm(**values.get("vllm", {}))}
        lists = {"corpus": tuple(values["corpus"]), "column": tuple(values.get("column", ()))}
        return cls(**{**values, **lists, "sampling": sampling, **parts})


REFUSING_FIELDS = ("row_chat_templates", "unknown_parameters")
"""Fields that decide only which rows are error rows."""
PROMPT_FIELDS = ("column", "prompt_template", "system", "last_assistant", "chat_template_kwargs", *REFUSING_FIELDS)
"""Fields that prompts depend on; the chat template is not one, since it counts as the model's."""


def _as_json(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value


_DEFAULTS = {each.name: _as_json(each.default) for each in fields(Job)}
