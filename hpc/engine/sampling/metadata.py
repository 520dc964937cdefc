"""What the parameters of the requests in some slots ask of the sampler, as tensors, until a slot changes."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from hpc.engine.sampling.constraint import Constraint
from hpc.engine.sampling.draw import BY_MASS
from hpc.sampling_params import SamplingParams

MIN_RANKED = 128
"""The most probable tokens that are ranked for the smallest top_k: eight times as many make few sizes of all top_k."""
_DRAWING = ("temperature", "top_p", "top_k", "min_p")
_PENALTIES = ("repetition_penalty", "presence_penalty", "frequency_penalty")

Upload = Callable[[npt.NDArray[Any]], torch.Tensor]
"""Copies an array to the device without waiting for it."""


@dataclass(frozen=True)
class DrawnRows:
    """Rows whose tokens are drawn in one call; their parameters are [rows, 1] float64."""

    rows: torch.Tensor
    part: slice
    """Where their uniform numbers stand among those of all drawn rows."""
    temperature: torch.Tensor
    top_p: torch.Tensor
    top_k: torch.Tensor
    min_p: torch.Tensor
    ranked: int
    """See `draw`."""


@dataclass(frozen=True)
class PenalisedRows:
    """Rows with penalties, which are [rows, 1] float32."""

    rows: torch.Tensor
    slots: torch.Tensor
    slot_numbers: tuple[int, ...]
    repeats: bool
    """Whether any has a repetition penalty."""
    counts: bool
    """Whether any has a presence or frequency penalty."""
    repetition_penalty: torch.Tensor
    presence_penalty: torch.Tensor
    frequency_penalty: torch.Tensor


@dataclass(frozen=True)
class SamplingMetadata:
    """What is to be done for the rows of a batch, a row for each slot."""

    slots: list[int]
    at: npt.NDArray[np.int64]
    """The slots again, as an index."""
    drawn: list[DrawnRows]
    drawn_slots: npt.NDArray[np.int64]
    penalised: PenalisedRows | None
    constrained: list[tuple[int, Constraint]]
    """Rows with a constraint."""
    asked: tuple[int, ...]
    """The rows that ask for log probabilities."""
    asked_rows: torch.Tensor
    asked_counts: tuple[int, ...]


def make_metadata(
    slots: list[int],
    sampling: Sequence[SamplingParams],
    constraints: Sequence[Constraint | None],
    upload: Upload,
    rows_at_once: int,
) -> SamplingMetadata:
    """Return the metadata of rows with these slots, parameters and constraints; `rows_at_once` are drawn in a call."""
    groups: dict[int, list[int]] = {}
    for row, params in enumerate(sampling):
        if not params.greedy:
            groups.setdefault(_ranked(params), []).append(row)
    drawn: list[DrawnRows] = []
    drawn_slots: list[int] = []
    for ranked, rows in groups.items():
        for own in (rows[at : at + rows_at_once] for at in range(0, len(rows), rows_at_once)):
            part = slice(len(drawn_slots), len(drawn_slots) + len(own))
            columns = _columns([sampling[row] for row in own], _DRAWING, np.float64, upload)
            drawn.append(DrawnRows(rows=_indices(own, upload), part=part, ranked=ranked, **columns))
            drawn_slots += [slots[row] for row in own]
    asked = [row for row, params in enumerate(sampling) if params.logprobs is not None]
    return SamplingMetadata(
        slots=slots,
        at=np.array(slots, dtype=np.int64),
        drawn=drawn,
        drawn_slots=np.array(drawn_slots, dtype=np.int64),
        penalised=_penalised(slots, sampling, upload),
        constrained=[(row, constraint) for row, constraint in enumerate(constraints) if constraint is not None],
        asked=tuple(asked),
        asked_rows=_indices(asked, upload),
        asked_counts=tuple(sampling[row].logprobs or 0 for row in asked),
    )


def _ranked(params: SamplingParams) -> int:
    """Return how many of the most probable tokens are ranked to cut the others; see `draw`.

    It follows from the row's own parameters, so that its sums are the same whatever rows are beside it.
    """
    if not params.top_k:
        return BY_MASS if params.top_p < 1 or params.min_p > 0 else 0
    ranked = MIN_RANKED
    while ranked <= params.top_k:
        ranked *= 8
    return ranked


def _penalised(slots: list[int], sampling: Sequence[SamplingParams], upload: Upload) -> PenalisedRows | None:
    rows = [row for row, params in enumerate(sampling) if params.penalised]
    if not rows:
        return None
    own = [sampling[row] for row in rows]
    return PenalisedRows(
        rows=_indices(rows, upload),
        slots=_indices([slots[row] for row in rows], upload),
        slot_numbers=tuple(slots[row] for row in rows),
        repeats=any(params.repetition_penalty != 1 for params in own),
        counts=any(params.presence_penalty or params.frequency_penalty for params in own),
        **_columns(own, _PENALTIES, np.float32, upload),
    )


def _columns(
    sampling: Sequence[SamplingParams], names: tuple[str, ...], dtype: type, upload: Upload
) -> dict[str, torch.Tensor]:
    table = upload(np.array([[getattr(params, name) for name in names] for params in sampling], dtype=dtype))
    return {name: table[:, at : at + 1] for at, name in enumerate(names)}


def _indices(values: list[int], upload: Upload) -> torch.Tensor:
    return upload(np.array(values, dtype=np.int64))
