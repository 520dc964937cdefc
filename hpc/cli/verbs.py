"""The verbs as dataclasses: their fields are the flags. A verb about a job has a field `job`."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from hpc.cli.flags import Uses
from hpc.job import Job, Output, OutputFormat


@dataclass(frozen=True)
class Run:
    """Generate a completion for every row of a corpus."""

    job: Job


@dataclass(frozen=True)
class Plan:
    """Say what a job will take on 1, 2, 4, … ranks: from its corpus, and from what the steps of earlier runs took."""

    job: Job
    json: bool = False
    """Print it for programs."""
    deadline_min: float | None = None
    """Minutes within which the job is to end: find the cheapest number of ranks that does."""
    calibration: Path | None = None
    """File of a calibration; else one of this model in the user's cache."""
    plot: Path | None = None
    """File for a picture of time and efficiency over ranks: .svg, .png or .pdf."""
    ranks_on_node: int | None = None
    """Ranks that share a node, as when it was calibrated; else --slurm.tasks-per-node."""
    gpu_gib: float | None = None
    """GiB of a GPU of the nodes: says whether it holds the weights, or how many do; else those of one here."""


@dataclass(frozen=True)
class Script:
    """Print the batch script of a job, and write what it needs into the run directory: give it to sbatch."""

    job: Job


@dataclass(frozen=True)
class Submit:
    """Submit a job to Slurm: the bytes that `script` prints; print Slurm's id and the run directory."""

    job: Job
    doctor: bool = False
    """Submit a check of the allocation instead, wait for it, and print what it says."""


@dataclass(frozen=True)
class Doctor:
    """Check the allocation it runs in, under srun or mpirun: every line is ok, or says how to mend it."""

    job: Annotated[Job, Uses(("model", "device", "corpus", "name", "runs", "engine", "replica_gpus", "replica_cpus"))]


@dataclass(frozen=True)
class Calibrate:
    """Measure what the steps of a model cost on this node, for `plan`: with as many ranks as it is to have."""

    job: Annotated[
        Job,
        Uses(
            ("model", "device", "dtype", "context_tokens", "trust_remote_code", "engine", "max_num_seqs", "cache_gib",
             "replica_gpus", "replica_cpus", "deterministic", "drafts", "vllm"),
            instead={"corpus": ("-",)},
        ),
    ]  # fmt: skip
    seconds: float | None = None
    """Measure for so many seconds; else 9 on cores and 2.5 on a GPU."""


@dataclass(frozen=True)
class Settle:
    """The end of a batch script: exit 0 if the run is done, 75 if its job is to be requeued, 1 if not."""

    job: Annotated[Job, Uses(("share",))]


@dataclass(frozen=True)
class Status:
    """Say how far a run is, from its run directory alone."""

    run: Path
    """The run directory."""
    follow: bool = False
    """Keep showing it until it ends."""


@dataclass(frozen=True)
class Verify:
    """Prove the accounting of a run: exit 0 if every row is right, 1 if one is wrong, 75 if it is unfinished."""

    run: Path
    """The run directory."""
    output: str = ""
    """Another output than that of the job, as `merge` wrote it."""
    output_format: OutputFormat = "auto"
    """Its format; auto is what its name says."""
    output_rows_per_file: int = 0
    """Rows of each of its files; 0 is one file."""
    error_file: str = ""
    """openai: the file for the lines that have no completion."""

    @property
    def where(self) -> Output:
        """The output that is looked at."""
        return Output(self.output, self.output_format, self.output_rows_per_file, self.error_file)


@dataclass(frozen=True)
class Merge:
    """Write the completions of a run from its journals, completions.partial.jsonl while rows are missing.

    The run may be going on.
    """

    run: Path
    """The run directory."""
    output: str = ""
    """File or folder to write to instead of where the job says."""
    output_format: OutputFormat = "auto"
    """Format to write in; auto is what the name of the output says."""
    output_rows_per_file: int = 0
    """Write several files of so many rows; 0 is one file."""
    error_file: str = ""
    """openai: file for the lines that have no completion."""
    force: bool = False
    """Write over a file that this run has not written."""

    @property
    def where(self) -> Output:
        """Where the output goes."""
        return Output(self.output, self.output_format, self.output_rows_per_file, self.error_file)


@dataclass(frozen=True)
class Report:
    """Say where the time of a run went, on the terminal, as report.html and trace.json; of two runs, compare them."""

    runs: tuple[Path, ...]
    """The run directory, or two."""
    html: bool = True
    """Write the page and the trace."""


@dataclass(frozen=True)
class Show:
    """Show rows of a run, input and output side by side, while it goes on too: the first ones, or those asked for."""

    run: Path
    """The run directory."""
    where: tuple[str, ...] = ()
    """Rows that fulfil all of these: finish_reason=length, error=engine, id=…, text=…, prompt_tokens=…,
    completion_tokens=…, meta.KEY=…"""
    id: tuple[str, ...] = ()
    """Rows with these ids."""
    sample: int | None = None
    """So many of the rows, drawn anew each time."""
    rows: int = 10
    """At most so many of the rows, from the first on."""
    whole: bool = False
    """Show all of a long text."""


@dataclass(frozen=True)
class Cancel:
    """Stop a run, so that nothing finished is lost, and cancel its Slurm job."""

    run: Path
    """The run directory."""


@dataclass(frozen=True)
class Fetch:
    """Resolve and store a model, on a machine that has a way to the hub; print where it is."""

    model: str
    """A hub id, a model directory or a .gguf file."""
