"""Types of the arrays that travel between modules."""

import numpy as np
import numpy.typing as npt

Ints = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float64]
Tokens = npt.NDArray[np.int32]
Keys = npt.NDArray[np.bytes_]
Record = tuple[int, bytes]
"""Index of a row, and a line of a journal."""
