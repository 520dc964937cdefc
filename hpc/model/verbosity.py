"""Restore the log level and progress bars of transformers, which belong to the whole process, after a Python call."""

import contextlib
import logging
import os
import sys
from collections.abc import Iterator
from typing import Any


@contextlib.contextmanager
def keeping_verbosity() -> Iterator[None]:
    """Undo at the end what `hpc.model.load.quiet` does within. It does not import transformers itself."""
    before = _state(sys.modules.get("transformers"))
    try:
        yield
    finally:
        module = sys.modules.get("transformers")
        if module is not None and before != _state(module):
            said = module.logging
            asked = os.environ.get("TRANSFORMERS_VERBOSITY", "")
            level, bars = before or (said.log_levels.get(asked, logging.WARNING), True)
            said.set_verbosity(level)
            (said.enable_progress_bar if bars else said.disable_progress_bar)()


def _state(transformers: Any) -> tuple[int, bool] | None:
    """Return the level of its log, and whether it shows progress bars; None while it is not imported."""
    if transformers is None:
        return None
    return transformers.logging.get_verbosity(), transformers.logging.is_progress_bar_enabled()
