"""A run of the echo engine in this process, for what looks at rows."""

from pathlib import Path
from typing import Any

from hpc.job import Job
from hpc.mpi.comm import Single
from hpc.mpi.signals import Stop
from hpc.pipeline import generate
from hpc.sampling_params import SamplingParams
from tests.conftest import write_corpus
from tests.fakes import EchoLoader

ROWS: list[dict[str, Any]] = [
    {"id": "a", "prompt": "Say <b>hi</b> & go", "lang": "de", "score": 1.5},
    {"id": 17, "messages": [{"role": "system", "content": "Be kind."}, {"role": "user", "content": "Hello"}]},
    {"id": "empty", "prompt": "", "lang": "de"},
    {"prompt": "three", "sampling": {"n": 2, "max_new_tokens": 3, "temperature": 1.0}, "lang": "en", "score": None},
    {"prompt": "a \x1b[31mred \u202eone", "lang": "de"},
    {"prompt": "x" * 2040, "sampling": {"max_new_tokens": 1}},
]
"""Of six rows the third is refused."""


def make_run(folder: Path, rows: list[dict[str, Any]] = ROWS, **job_fields: Any) -> Path:
    """Answer rows, 8 tokens each where they say nothing else; return the run directory."""
    corpus = write_corpus(folder / "c.jsonl", rows)
    sampling = SamplingParams(max_new_tokens=8)
    runs = str(folder / "runs")
    job = Job(model="echo", corpus=(str(corpus),), runs=runs, name="c", show=0, sampling=sampling, **job_fields)
    assert generate(job, Single(), EchoLoader(), Stop()) == 0
    return folder / "runs" / "c"


def unfinish(run: Path) -> None:
    """Leave of a run what it had when its last completion was half written."""
    (run / "completions.jsonl").unlink()
    (run / "state").write_text("running\n")
    [journal] = (run / "journal").iterdir()
    journal.write_bytes(journal.read_bytes()[:-20])
