"""The log: lines of all modules, in the file of the run directory and on the terminal."""

import logging
from collections.abc import Iterator
from pathlib import Path

import pytest

from hpc.rundir import log


@pytest.fixture
def file(tmp_path: Path) -> Iterator[Path]:
    """Log into a file, and no longer afterwards."""
    path = tmp_path / "0001-00000.log"
    log.configure(0, 2, path)
    yield path
    log.configure(0, 1)


@pytest.mark.parametrize("module", ["hpc.cli", "hpc.executor.root", "hpc.rundir.log"])
def test_a_line_of_any_module_is_in_the_log_and_on_the_terminal(
    file: Path, module: str, capsys: pytest.CaptureFixture[str]
) -> None:
    logging.getLogger(module).info("reading")
    assert file.read_text().endswith(" [0/2] reading\n")
    assert capsys.readouterr().err.endswith(" [0/2] reading\n")
