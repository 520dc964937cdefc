"""Predict the seconds of requests from fixed costs: good enough to share them out evenly. Pure."""

from dataclasses import dataclass

import numpy as np

from hpc.arrays import Floats, Ints


@dataclass(frozen=True)
class CostModel:
    """Costs of one replica. The defaults are priors for any machine: their ratios matter, not their size."""

    prefill_token: float = 1.0e-3
    """a1: seconds per prompt token."""
    prefill_pair: float = 1.0e-7
    """a2: seconds per pair of attending tokens."""
    decode_step: float = 4.0e-3
    """c/B: seconds per generated token: the share of one row in a step of a full batch."""
    decode_kv: float = 1.0e-6
    """e: seconds per token in the KV cache that a step reads."""
    step: float = 5.0e-2
    """c: seconds of a step with few rows, which is the time to read the weights."""

    def requests(self, prompt_tokens: Ints, new_tokens: Ints) -> Floats:
        """Return the seconds that each request takes on a replica that works on full batches.

        Both arguments have shape [requests], in tokens. In k steps a row of n prompt tokens reads
        k*n + k*(k-1)/2 live tokens.
        """
        n = np.asarray(prompt_tokens, dtype=np.float64)
        k = np.asarray(new_tokens, dtype=np.float64)
        prefill = self.prefill_token * n + self.prefill_pair * n * n / 2
        decode = self.decode_step * k + self.decode_kv * (k * n + k * (k - 1) / 2)
        return prefill + decode
