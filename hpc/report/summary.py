"""Summarise an attempt: `summary.json` for programs, a few lines for people."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from shlex import quote
from typing import Any

from hpc.corpus.columns import Columns
from hpc.job import Job
from hpc.output.row import OutputRow
from hpc.output.write import Counts
from hpc.rundir import atomic
from hpc.rundir.directory import RunDirectory
from hpc.rundir.progress import Progress, Work, duration, overall


def summarise(
    job: Job,
    size: int,
    work: Work,
    counts: Counts,
    ranks: Mapping[int, Progress],
    seconds: Mapping[str, float],
    padding: float,
) -> dict[str, Any]:
    """Return the figures of an attempt that accounted for every row. Times are in seconds."""
    total = overall(ranks)
    engines = {rank: progress.engine or job.engine for rank, progress in ranks.items()}
    ended = max((progress.ended for progress in ranks.values()), default=0.0)
    return {
        "rows": counts.rows,
        "errors": counts.errors,
        "duplicates": work.duplicates,
        "prompt_tokens": counts.prompt_tokens,
        "completion_tokens": counts.completion_tokens,
        "generated_tokens": total.generated_tokens,
        "guessed_tokens": total.guessed_tokens,
        "accepted_tokens": total.accepted_tokens,
        "cached_tokens": total.totals.cached_tokens,
        "ranks": size,
        "engine": " and ".join(sorted(set(engines.values()))) or job.engine,
        "rank_engines": [engines[rank] for rank in sorted(engines)],
        "dtype": job.dtype,
        "device": job.device,
        "seconds": {
            "load": round(max((progress.load_s for progress in ranks.values()), default=0.0), 3),
            "tokenize": round(seconds["tokenize"], 3),
            "generate": round(max(0.0, ended - total.began), 3),
            "gather": round(seconds["gather"], 3),
            "merge": round(seconds["merge"], 3),
            "total": round(seconds["total"], 3),
        },
        "rank_busy_seconds": [round(ranks[rank].busy_s, 3) for rank in sorted(ranks)],
        "padding": round(padding, 4),
        "work": asdict(work),
    }


def write_summary(path: Path, attempt: int, values: dict[str, Any]) -> dict[str, Any]:
    """Write `summary.json`: the figures of this attempt, and under "attempts" those of each; return all of it.

    If no rank of this attempt has generated, the engine is that of the attempt before.
    """
    try:
        before = json.loads(path.read_text())
        attempts = before["attempts"]
    except (FileNotFoundError, ValueError, KeyError):
        before, attempts = {}, []
    if not values["rank_engines"]:
        values = {**values, **{name: before[name] for name in ("engine", "engine_reason") if name in before}}
    own = {name: values[name] for name in ("generated_tokens", "ranks", "engine", "seconds", "rank_busy_seconds")}
    whole = {**values, "attempts": [*attempts, {"attempt": attempt, **own}]}
    atomic.write(path, json.dumps(whole, indent=2) + "\n")
    return whole


def show_summary(
    directory: RunDirectory, output: Path, values: Mapping[str, Any], examples: Sequence[OutputRow], columns: Columns
) -> None:
    """Print the summary, after the prompts of some rows, in these columns, with their completions."""
    for row in examples:
        text = row.samples[0].text if row.samples else (row.error or {}).get("message")
        prompt = "a row that cannot be read" if row.source is None else columns.shown(row.source)
        print(f"\n> {prompt}\n{text}".encode("utf-8", "replace").decode())
    seconds, generated = values["seconds"], values["generated_tokens"]
    lines = [
        f"{values['rows']:,} rows: {values['rows'] - values['errors']:,} completed, {values['errors']:,} errors, "
        f"{values['duplicates']:,} duplicates",
        f"{values['prompt_tokens']:,} prompt and {values['completion_tokens']:,} completion tokens",
    ]
    if generated:
        rate = generated / seconds["generate"] if seconds["generate"] else 0.0
        lines.append(
            f"{generated:,} tokens generated in {duration(seconds['generate'])} on {values['ranks']} "
            f"rank{'s' * (values['ranks'] > 1)}: {rate:,.0f} tokens/s; at most {values['padding']:.1%} padding"
        )
        if values["guessed_tokens"]:
            lines.append(f"{values['guessed_tokens']:,} tokens guessed, {values['accepted_tokens']:,} of them right")
        lines.append("seconds busy per rank: " + _some([f"{busy:.1f}" for busy in values["rank_busy_seconds"]]))
        lines.append("seconds: " + ", ".join(f"{name} {value:.1f}" for name, value in seconds.items()))
    else:
        lines.append(nothing_generated(values["work"]))
    if values["errors"]:
        lines.append(f"errors:      scattergen show {quote(str(directory.path))} --where finish_reason=error")
    lines.append(f"completions: {output}")
    lines.append(f"the rest:    {directory.path}")
    print("\n" + "\n".join(lines), flush=True)


def nothing_generated(work: Mapping[str, int]) -> str:
    """Return the reason for which an attempt generated no token."""
    if work["requests"]:
        return "nothing was generated: every request ended in an error"
    if work["done"]:
        return "nothing to generate: all rows were finished by earlier attempts"
    return "nothing to generate: every row of the corpus was refused"


def _some(texts: list[str]) -> str:
    return " ".join(texts) if len(texts) <= 16 else f"{' '.join(texts[:16])} … ({len(texts)} ranks, see summary.json)"
