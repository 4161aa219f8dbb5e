"""Which crops a worker sees at a step: a pure function of (seed, epoch, step), the same batches for any number of
workers.
"""

import numpy as np
from numpy.typing import NDArray


def permutation(crops: int, seed: int, epoch: int) -> NDArray[np.int64]:
    """(crops,) int64: the order of an epoch; step s of global batch size B takes [s * B:(s + 1) * B] of it."""
    return np.random.default_rng([seed, epoch]).permutation(crops)


def share(total: int, part: int, parts: int) -> tuple[int, int]:
    """First row and end of a worker's part of a batch, or of a replica's part of a worker's: unequal by one at most."""
    return part * total // parts, (part + 1) * total // parts
