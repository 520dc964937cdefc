"""Write the spans of a run in Chrome's trace format, which https://ui.perfetto.dev and chrome://tracing open.

The format: https://docs.google.com/document/d/1CvAClvFfyA5R-PhYUmn5OOQtYMH4h6I0nSsKchNAySU (Trace Event Format).
"""

import json
from collections.abc import Iterator
from typing import Any

import numpy as np

from hpc.report.timeline import KINDS, AttemptHistory, History

RATES = 240
"""Number of intervals of an attempt for which the tokens/s are given."""


def trace(run: History) -> str:
    """Return the trace of a run: an attempt is a process, a rank a thread; times begin with the first attempt."""
    zero = min((attempt.began for attempt in run.attempts), default=0.0)
    events = [event for attempt in run.attempts for event in _events(attempt, zero)]
    return json.dumps({"traceEvents": events, "displayTimeUnit": "ms"}, separators=(",", ":")) + "\n"


def _events(attempt: AttemptHistory, zero: float) -> Iterator[dict[str, Any]]:
    pid = attempt.number
    yield _name("process_name", pid, 0, f"attempt {attempt.number}, {attempt.ending}")
    for rank in attempt.ranks:
        tid = rank.number + 1  # 0 is the thread of the idle processor in Perfetto
        yield _name("thread_name", pid, tid, f"rank {rank.number}")
        yield {"name": "thread_sort_index", "ph": "M", "pid": pid, "tid": tid, "args": {"sort_index": tid}}
        for span in rank.spans:
            # Integers: one span begins in the microsecond in which the other ends; overlapping ones are not shown.
            began, ended = (round(1e6 * (time - zero)) for time in (span.began, span.ended))
            yield {"name": span.kind, "cat": "rank", "ph": "X", "ts": began, "dur": ended - began, "pid": pid,
                   "tid": tid, "args": {"what": KINDS[span.kind]}}  # fmt: skip
    if attempt.ended > attempt.began:
        edges = np.linspace(0, attempt.ended - attempt.began, RATES + 1)
        for edge, rate in zip(edges, [*attempt.rates(edges).tolist(), 0.0], strict=True):
            yield {"name": "tokens/s", "ph": "C", "ts": round(1e6 * (attempt.began - zero + float(edge))), "pid": pid,
                   "args": {"all ranks": round(rate, 1)}}  # fmt: skip


def _name(kind: str, pid: int, tid: int, name: str) -> dict[str, Any]:
    return {"name": kind, "ph": "M", "pid": pid, "tid": tid, "args": {"name": name}}
