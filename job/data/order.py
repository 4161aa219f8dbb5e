"""Order of the crops: a function of (seed, epoch, partition). Any number of workers gets the same global batches."""

import numpy as np
from numpy.typing import NDArray


def permutation(crops: int, seed: int, epoch: int, partition: int = 0) -> NDArray[np.int64]:
    """Return the order of the crops of a partition in an epoch, (crops,) int64.

    A step that takes n crops of the partition takes rows [step * n:(step + 1) * n].
    """
    # Partition 0 has the order of releases without partitions, which used [seed, epoch]: NumPy appends zeros to seeds.
    return np.random.default_rng([seed, epoch, partition]).permutation(crops)


def share(total: int, part: int, parts: int) -> tuple[int, int]:
    """Divide `total` rows into `parts` of sizes that differ by at most 1. Return first row and end of part `part`.

    A part is a worker's share of a global batch, or a replica's share of its worker's rows.
    """
    return part * total // parts, (part + 1) * total // parts
