"""Redirect a library's output to the rank's log, and shield its workers from stop signals. Knows no engine."""

import contextlib
import logging
import os
import signal
import sys
from collections.abc import Iterator

from hpc.mpi.signals import SIGNALS


def log_to_rank(name: str) -> None:
    """Send the log lines of a library to the rank's log file alone."""
    logger = logging.getLogger(name)
    logger.handlers = [*_files()] or [logging.NullHandler()]
    logger.setLevel(logging.INFO)
    logger.propagate = False


@contextlib.contextmanager
def terminal_to_log() -> Iterator[None]:
    """Redirect stdout and stderr to the rank's log file; workers started meanwhile keep that for good."""
    files = _files()
    if not files:
        yield
        return
    sys.stdout.flush()
    sys.stderr.flush()
    kept = [os.dup(1), os.dup(2)]
    log = os.open(files[0].baseFilename, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
    try:
        for number in (1, 2):
            os.dup2(log, number)
        yield
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        for number, old in zip((1, 2), kept, strict=True):
            os.dup2(old, number)
        for file in (log, *kept):
            os.close(file)


@contextlib.contextmanager
def workers_deaf(workers: bool) -> Iterator[None]:
    """Start workers that ignore stop signals: Slurm sends these to all processes of a task, but the rank handles them.

    Signals that arrive meanwhile are delivered to the rank afterwards.
    """
    if not workers:
        yield
        return
    before = signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _files() -> list[logging.FileHandler]:
    """Return the handlers that write the rank's log file; none if there is no such file, as in a test."""
    return [handler for handler in logging.getLogger("hpc").handlers if isinstance(handler, logging.FileHandler)]
