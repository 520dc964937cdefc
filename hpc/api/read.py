"""`hpc.read_run`: the rows of a run, finished or not, from its run directory."""

import importlib
import json
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from hpc.output.verify import RecordedRun
from hpc.output.write import what_is_gone

LOGGER = logging.getLogger(__name__)


class RunRows:
    """The rows of a run: iterate over them as often as you like, or take all of them as a table.

    Each is a dictionary with the keys of a JSONL output, whatever the format of the run's own. Of a run that is not
    finished they are those that have ended by then, in the order of the corpus: look again later, and there are more.
    """

    def __init__(self, path: Path) -> None:
        self.path = path

    def __iter__(self) -> Iterator[dict[str, Any]]:
        run = RecordedRun.open(self.path)
        if gone := what_is_gone(run.tokens):
            LOGGER.warning('%s: %s: its rows come without their "meta"', self.path, gone)
        for row in run.rows(not gone):
            if row.answer is not None:
                yield json.loads(json.dumps(row.value))  # lists, where the journal's completions have tuples

    def __repr__(self) -> str:
        return f"<rows of {self.path}>"

    def to_pandas(self) -> Any:
        """Return a pandas DataFrame with a column for each key of the output."""
        return _library("pandas").DataFrame(list(self))

    def to_arrow(self) -> Any:
        """Return a pyarrow Table with a column for each key of the output.

        A column whose values have no common type, such as ids that are numbers and texts, has each as JSON.
        """
        pyarrow, rows = _library("pyarrow"), list(self)
        names = dict.fromkeys(name for row in rows for name in row)
        return pyarrow.table({name: _column(pyarrow, [row.get(name) for row in rows]) for name in names})

    def to_dataset(self) -> Any:
        """Return a Dataset of the library `datasets`, made of `to_arrow`."""
        return _library("datasets").Dataset(self.to_arrow())


def read_run(path: str | Path) -> RunRows:
    """Return the rows of the run in a run directory, finished or running.

    >>> rows = read_run("runs/prompts")
    >>> [row["finish_reason"] for row in rows]
    ['length', 'length']

    Raises `hpc.Refusal` where there is no run directory, or its corpus has not been read to its end yet.
    """
    found = Path(path).expanduser()
    RecordedRun.open(found)
    return RunRows(found)


def _column(pyarrow: Any, values: list[Any]) -> Any:
    try:
        return pyarrow.array(values)
    except UnicodeEncodeError:  # half of a surrogate pair is "?", as in a Parquet output
        return _column(pyarrow, json.loads(json.dumps(values, ensure_ascii=False).encode("utf-8", "replace")))
    except (pyarrow.ArrowException, OverflowError):
        return _column(pyarrow, [None if value is None else json.dumps(value, ensure_ascii=False) for value in values])


def _library(name: str) -> Any:
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise ImportError(f"{name} is not installed ({error}): pip install {name}", name=name) from error
