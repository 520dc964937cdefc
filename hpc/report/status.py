"""Show the progress of a run, read from its events: one line, or a live view."""

import json
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rich.console import Group
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from hpc.exit import OK, Refusal
from hpc.output.verify import RecordedRun
from hpc.rundir import terminal
from hpc.rundir.directory import RunDirectory, attempt_and_rank
from hpc.rundir.lock import is_held
from hpc.rundir.progress import Progress, Work, describe, overall
from hpc.slurm.queue import describe_answer

FOLLOW_S = 1.0
SHOWN_RANKS = 32


@dataclass
class Picture:
    """The latest attempt of a run, from its events; `refresh` reads only new ones."""

    directory: RunDirectory
    attempt: int = 0
    work: Work | None = None
    phase: str = "new"
    time: float = 0.0
    """Time of the latest event, as of which counts and rates are."""
    expected_end: float | None = None
    """Predicted end of the attempt."""
    ranks: dict[int, Progress] = field(default_factory=dict)
    _read: dict[Path, int] = field(default_factory=dict)

    def refresh(self) -> None:
        """Read the events written since the last call."""
        paths = {attempt_and_rank(path): path for path in (self.directory.path / "events").glob("*.jsonl")}
        if not paths:
            return
        attempt = max(paths)[0]
        if attempt != self.attempt:
            self.attempt, self.work, self.phase, self.ranks, self._read = attempt, None, "new", {}, {}
            self.expected_end = None
        for (of_attempt, rank), path in sorted(paths.items()):
            if of_attempt == attempt:
                for event in self._new_events(path):
                    self._take(rank, event)

    def _new_events(self, path: Path) -> list[dict[str, Any]]:
        with open(path, "rb") as file:
            file.seek(self._read.get(path, 0))
            data = file.read()
        whole = data[: data.rfind(b"\n") + 1]  # the last line may be half written
        self._read[path] = self._read.get(path, 0) + len(whole)
        return [json.loads(line) for line in whole.splitlines()]

    def _take(self, rank: int, event: dict[str, Any]) -> None:
        phase, when = event.pop("phase"), event.pop("time")
        self.time = max(self.time, when)
        if phase in ("span", "spent"):  # "spent": of an earlier version
            return
        if phase == "load" and "seconds" in event:
            self.expected_end = when + event["seconds"]
        if phase == "plan":
            self.work = Work(**event)
        elif phase in ("generate", "generated"):
            self.ranks[rank] = Progress.from_json(event)
        if rank == 0:
            self.phase = phase


def describe_state(directory: RunDirectory) -> str:
    """Return the state of a run in words."""
    state = directory.state
    if state == "running" and not is_held(directory.path):
        state = "interrupted (its process is gone); run the same command again to go on"
    if state == "drained":
        state = "drained (stopped before the end); run the same command again to go on"
    picture = Picture(directory)
    picture.refresh()
    job = (directory.read_job() or {}).get("job", {})
    engine = f" with --engine {job['engine']}" if "engine" in job else ""
    return f"{directory.path}: {state}; attempt {picture.attempt}{engine}"


def watch(directory: RunDirectory) -> None:
    """Show a run until it ends, or Ctrl-C."""
    picture = Picture(directory)
    try:
        with Live(refresh_per_second=4) as live:
            while True:
                running = directory.state == "running" and is_held(directory.path)
                picture.refresh()
                live.update(draw(picture))
                if not running or terminal.failure(sys.stdout):
                    break
                time.sleep(FOLLOW_S)
    except KeyboardInterrupt:
        pass
    print(describe_state(directory))


def draw(picture: Picture) -> Group:
    """Return the live view: a line for the run, a bar for each rank."""
    title = f"{picture.directory.path.name}, attempt {picture.attempt}: {picture.phase}"
    if picture.work is None:
        return Group(Text(title))
    total = overall(picture.ranks)
    work = picture.work
    table = Table.grid(padding=(0, 2))
    whole = ProgressBar(total=work.rows, completed=work.done + work.refused + total.rows, width=40)
    table.add_row("all", whole, describe(work, total, picture.time, picture.expected_end))
    max_rows = max((progress.rows for progress in picture.ranks.values()), default=0)
    for rank in sorted(picture.ranks)[:SHOWN_RANKS]:
        progress = picture.ranks[rank]
        seconds = progress.ended - progress.began
        rate = progress.generated_tokens / seconds if seconds > 0 else 0.0
        bar = ProgressBar(total=max(1, max_rows), completed=progress.rows, width=40)
        table.add_row(f"rank {rank}", bar, f"{progress.rows:,} rows, {rate:,.0f} tokens/s")
    return Group(Text(title), table)


def status(path: Path, follow: bool) -> int:
    """Print the progress of a run, once or until it ends."""
    RunDirectory(path).recorded_job()
    if follow:
        watch(RunDirectory(path))
    else:
        print(describe_state(RunDirectory(path)))
        if jobs := RunDirectory(path).slurm_jobs():
            print(describe_answer(jobs[-1], RunDirectory(path)))
        try:
            run = RecordedRun.open(path)
        except Refusal:
            return OK
        refused = run.tokens.num_rows - int(run.tokens.good.sum())
        answered = run.answered()
        print(
            f"{answered + refused:,} of {run.tokens.num_rows:,} rows done ({refused:,} refused), "
            f"{run.tokens.num_rows - answered - refused:,} pending"
        )
    return OK
