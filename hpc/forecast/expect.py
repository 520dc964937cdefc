"""Predict how long an attempt will take from calibrated step costs, and update the calibration from its steps."""

import logging
from dataclasses import asdict
from typing import Any

import numpy as np

from hpc.corpus.store import TokenStore
from hpc.executor.attempt import Attempt
from hpc.executor.scatter import Dispatcher
from hpc.forecast import calibration
from hpc.forecast.calibration import Kind
from hpc.forecast.estimate import Demand, Estimator
from hpc.model.find import user_cache
from hpc.model.loader import Replica
from hpc.output.journal import JournalIndex
from hpc.plan.pending import lengths_seen

LOGGER = logging.getLogger(__name__)


LOOKED_AT, SIMULATED = 40_000, 10_000
"""Max requests that a run samples, and simulates, for its prediction: rank 0 has other ranks to answer meanwhile."""


def predict_attempt(
    attempt: Attempt, tokens: TokenStore, earlier: JournalIndex, dispatcher: Dispatcher
) -> dict[str, Any]:
    """Return the predicted seconds of this attempt and the device's size and speed; empty without a calibration."""
    place, job = attempt.place, attempt.job
    folder = user_cache() / "calibrations"
    found = calibration.find_calibration(
        folder,
        attempt.model.revision,
        job.dtype,
        (job.engine,),
        place.ranks_on_node,
        place.threads,
        job.replica_devices,
    )
    known = found is not None and (found.kind.threads, found.kind.ranks_on_node) == (place.threads, place.ranks_on_node)
    if found is None or not known:
        return {}
    seen, _ = lengths_seen(job, tokens, earlier)
    # Of many requests a few: rank 0 has others to answer, and holds enough.
    every = -(-len(dispatcher.rows) // LOOKED_AT)
    begins = np.arange(0, len(dispatcher.rows), every)
    chosen = np.minimum(begins + np.random.default_rng(0).integers(0, every, len(begins)), len(dispatcher.rows) - 1)
    cut, group = dispatcher.shared
    prompts = tokens.prompts(dispatcher.rows[chosen])
    demand = Demand(prompts, (cut[chosen], group[chosen]), seen, tokens.num_rows, every)
    predicted = Estimator(job, demand, found, SIMULATED).predict(attempt.crew.world.size)
    values = {"low_s": predicted.low_s, "seconds": predicted.seconds, "high_s": predicted.high_s}
    device = {"size": asdict(found.size), "speed": asdict(found.speed) if found.speed else None}
    return {**values, **device, "token_bytes": found.engine.token_bytes}


def record_steps(attempt: Attempt, replica: Replica, load_s: float) -> None:
    """Update the calibration with the steps of this rank; a run with too few steps changes nothing."""
    if replica.engine.bounds is None or replica.size is None:
        return
    place, bounds = attempt.place, replica.engine.bounds
    kind = Kind(
        attempt.model.revision,
        attempt.job.dtype,
        replica.device,
        place.threads,
        place.ranks_on_node,
        attempt.job.engine,
        attempt.job.replica_devices,
    )
    try:
        calibration.add_steps(
            user_cache() / "calibrations", kind, bounds, replica.size, load_s, replica.engine.steps.samples
        )
    except (OSError, ValueError) as error:
        LOGGER.debug("no calibration: %s", error)
