"""Count what a run has answered: how its rows ended, how long prompts and outputs are, and some rows to look at."""

from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from hpc.arrays import Ints
from hpc.exit import Refusal
from hpc.report.rows import Answered, RunRows

MAX_COUNTED = 20_000
"""Number of completions to decode and count, evenly spread over all: decoding one takes 50 us, so all take a second."""
EXAMPLES, ERROR_EXAMPLES = 5, 2


@dataclass(frozen=True)
class Contents:
    """The answers of a run, counted."""

    rows: int
    """Of the corpus."""
    answered: int
    """Rows with a completion or an error."""
    endings: dict[str, int]
    """Number of counted rows by finish reason, of errors by kind ("error: prompt"); the largest first."""
    prompt_tokens: Ints
    """Length of each prompt that was not refused, shape [rows]."""
    completion_tokens: Ints
    """Length of each output that was counted, over all samples."""
    examples: list[Answered]


def read_contents(path: Path) -> Contents | None:
    """Count the answers of a run; return None if its corpus was not read to the end."""
    try:
        rows = RunRows(path)
    except Refusal:
        return None
    answered = rows.answered
    counted = _spread(answered, MAX_COUNTED)
    endings: Counter[str] = Counter()
    lengths, errors = [], []
    for row in rows.outputs(counted):
        endings[row.finish_reason if row.error is None else f"error: {row.error['kind']}"] += 1
        if row.error is not None:
            errors.append(row.row)
        elif row.completion is not None:
            lengths.append(row.completion.num_tokens)
    chosen = {*_spread(answered, EXAMPLES).tolist(), *errors[:ERROR_EXAMPLES]}
    tokens = rows.run.tokens
    return Contents(
        tokens.num_rows, len(answered), dict(endings.most_common()), tokens.prompt_tokens[tokens.good],
        np.array(lengths, dtype=np.int64), rows.read(sorted(chosen)),
    )  # fmt: skip


def _spread(rows: Ints, count: int) -> Ints:
    """Return at most `count` of the rows, evenly spread."""
    if len(rows) <= count:
        return rows
    spread: Ints = rows[np.linspace(0, len(rows) - 1, count).round().astype(np.int64)]
    return spread
