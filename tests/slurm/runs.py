"""Runs on the cluster, as a user of its login node makes them."""

import json
import os
import re
import signal
import sys
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tests.conftest import ROOT, Ended, finish, read_rows, start
from tests.slurm.cluster import Cluster, pids_of

ECHO = str(ROOT / "tests" / "echo_job.py")
TWO_BY_TWO = ("--slurm.nodes", "2", "--slurm.tasks-per-node", "2")
AT_ONCE = ("--max-num-seqs", "8")
"""As many as the echo engine has slots: of what all ranks can begin with at once, nothing is kept back."""


@dataclass
class Site:
    """A login node, with a folder that every node sees."""

    cluster: Cluster
    folder: Path
    variables: dict[str, str] = field(default_factory=dict)
    """Of the shell that submits, and so of the job."""

    def call(self, *arguments: str, timeout_s: float = 120) -> Ended:
        """Run Python with arguments."""
        return finish(start(arguments, **{**self.cluster.environment(), **self.variables}), timeout_s)

    def submit(self, *flags: str, program: Sequence[str] = (ECHO,)) -> "Submitted":
        """Submit a job that must be taken."""
        ended = self.call(*program, "submit", *flags, "--runs", str(self.folder / "runs"))
        assert ended.code == 0, ended.err
        first, path = ended.out.splitlines()
        return Submitted(self, first.removeprefix("Slurm job "), Path(path))

    def sbatch(self, script: Path, run: Path) -> "Submitted":
        """Give a script to sbatch by hand."""
        ended = self.cluster.run("sbatch", "--parsable", str(script))
        assert ended.returncode == 0, ended.stderr
        return Submitted(self, ended.stdout.strip(), run)


@dataclass
class Submitted:
    """A job in Slurm and its run directory."""

    site: Site
    job_id: str
    run: Path

    def states(self) -> set[str]:
        """What the queue says of the job, or of the elements of an array."""
        command = ("squeue", "--noheader", "--states=all", "--array", f"--jobs={self.job_id}", "--format=%T")
        return set(self.site.cluster.run(*command).stdout.split())

    def wait(self, condition: Callable[[], bool], timeout_s: float = 120) -> None:
        """Wait until a condition is true; fail with all that is known."""
        end = time.monotonic() + timeout_s
        while not condition():
            assert time.monotonic() < end, f"{timeout_s} s were not enough: {self.states()}\n{self.log}\n{self.state}"
            time.sleep(0.1)

    def wait_for_end(self, timeout_s: float = 180) -> set[str]:
        """Wait until Slurm has nothing more to do with the job; return its states."""
        over = {"COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "OUT_OF_MEMORY"}
        self.wait(lambda: bool(states := self.states()) and states <= over, timeout_s)
        return self.states()

    def wait_for_records(self, count: int) -> None:
        """Wait until so many completions are in the journals."""
        self.wait(lambda: sum(self.records().values()) >= count)

    @property
    def state(self) -> str:
        """What the file `state` says."""
        return (self.run / "state").read_text().strip() if (self.run / "state").exists() else "new"

    @property
    def log(self) -> str:
        """What the job has printed, over all attempts."""
        return "".join(path.read_text() for path in sorted((self.run / "log").glob("slurm-*.log")))

    @property
    def output(self) -> bytes:
        """The completions."""
        return (self.run / "completions.jsonl").read_bytes()

    def records(self) -> Counter[str]:
        """How often each completion has been written down, over all attempts."""
        text = "".join(path.read_text() for path in (self.run / "journal").glob("*.jsonl"))
        return Counter(re.findall(r'^\{"crc":"\w+","key":"(\w+)".*\}$', text, re.MULTILINE))

    def attempts(self) -> int:
        """How many attempts there have been."""
        return max((int(path.stem.split("-")[0]) for path in (self.run / "events").glob("*")), default=0)

    def verify(self) -> Ended:
        """Prove the accounting."""
        return self.site.call("-m", "hpc", "verify", str(self.run))

    def ranks(self, node: str) -> list[int]:
        """Return the processes of this run on a node, apart from srun and the batch script."""
        found = []
        for pid in pids_of(node):
            try:
                command = Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")
            except OSError:
                continue
            if command[:1] == [sys.executable.encode()] and str(self.run / "job.json").encode() in command:
                found.append(pid)
        return found

    def kill_rank(self, node: str) -> None:
        """Kill one rank on a node."""
        os.kill(self.ranks(node)[0], signal.SIGKILL)


def write_long_corpus(folder: Path, rows: int = 60, most: int = 80) -> Path:
    """Write a corpus whose rows end one by one: each has a length of its own, from 2 to `most` tokens."""
    path = folder / "long.jsonl"
    values: list[dict[str, Any]] = [
        {"id": f"row {i}", "prompt": f"prompt {i}", "sampling": {"max_new_tokens": 2 + i * (most - 2) // rows}}
        for i in range(rows)
    ]
    path.write_text("".join(json.dumps(value) + "\n" for value in values))
    return path


def texts(path: Path) -> list[Any]:
    """Return the texts of an output."""
    return [row["text"] for row in read_rows(path)]
