"""Count what a run has answered: how its rows ended, how long prompts and outputs are, and some rows to look at."""

from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from hpc.arrays import Ints
from hpc.exit import Refusal
from hpc.report.rows import Answered, RunRows

MAX_COUNTED = 20_000
"""Completions that are decoded to be counted, spread over all: 50 us each, so a second."""
EXAMPLES, ERROR_EXAMPLES = 5, 2


@dataclass(frozen=True)
class Contents:
    """What a run has answered."""

    rows: int
    """Of the corpus."""
    answered: int
    """Rows with a completion or an error."""
    endings: dict[str, int]
    """Rows by finish reason, and errors by kind ("error: prompt"), of all that are answered, or of some of these that
    are spread over all; the largest number first."""
    prompt_tokens: Ints
    """Length of each prompt that was not refused, shape [rows]."""
    completion_tokens: Ints
    """Length of each output that was counted, over all samples."""
    examples: list[Answered]


def read_contents(path: Path) -> Contents | None:
    """Return what a run has answered; None where its corpus was not read to its end."""
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
    """Return at most so many of some rows, spread over all of them."""
    if len(rows) <= count:
        return rows
    spread: Ints = rows[np.linspace(0, len(rows) - 1, count).round().astype(np.int64)]
    return spread
