"""The cluster that the tests of this folder share."""

import fcntl
import os
import shutil
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.slurm.cluster import Cluster, unavailable

TMP = Path("/tmp")  # one for all users of a host, and short, as the path of a socket must be
PREFIX = "scattergen-slurm-"
LOCK = TMP / "scattergen-slurm.lock"


@contextmanager
def alone_on_this_host(timeout_s: float) -> Iterator[None]:
    """Wait until no other test run has a cluster, and keep them from it; a lock ends with its process."""
    deadline = time.monotonic() + timeout_s
    with LOCK.open("a") as file:
        while True:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() > deadline:
                    pytest.fail(f"another process has held {LOCK} for {timeout_s} s")
                time.sleep(0.2)
        yield


@pytest.fixture(scope="session")
def cluster() -> Iterator[Cluster]:
    """Two idle nodes; skipped where they cannot be had, except in CI, where nobody would notice."""
    if reason := unavailable():
        if os.environ.get("CI") == "true":
            pytest.fail(reason)
        pytest.skip(reason)
    with alone_on_this_host(timeout_s=600):
        for folder in TMP.glob(f"{PREFIX}*"):  # of test runs that were killed
            Cluster(folder).down()
            shutil.rmtree(folder)
        folder = Path(tempfile.mkdtemp(prefix=PREFIX, dir=TMP))
        cluster = Cluster(folder)
        try:
            cluster.up()
            yield cluster
        finally:
            cluster.down()
            shutil.rmtree(folder)
