"""Order of the crops: a pure function of (seed, epoch, step). Any number of workers gets the same global batches."""

import numpy as np
from numpy.typing import NDArray


def permutation(crops: int, seed: int, epoch: int) -> NDArray[np.int64]:
    """Return the order of an epoch, (crops,) int64. Step s with global batch size B takes rows [s * B:(s + 1) * B]."""
    return np.random.default_rng([seed, epoch]).permutation(crops)


def share(total: int, part: int, parts: int) -> tuple[int, int]:
    """Return the first row and the end of part `part` of `parts` of `total` rows. Sizes of parts differ by at most 1.

    A part is a worker's share of a global batch, or a replica's share of its worker's rows.
    """
    return part * total // parts, (part + 1) * total // parts
