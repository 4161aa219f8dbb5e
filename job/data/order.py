"""Order of the crops: a function of (seed, epoch, partition), and of the labels if classes are drawn equally often.

Any number of workers gets the same global batches.
"""

import numpy as np
from numpy.typing import NDArray


def permutation(crops: int, seed: int, epoch: int, partition: int = 0) -> NDArray[np.int64]:
    """Return the order of the crops of a partition in an epoch, (crops,) int64.

    A step that takes n crops of the partition takes rows [step * n:(step + 1) * n].
    """
    # Partition 0 has the order of releases without partitions, which used [seed, epoch]: NumPy appends zeros to seeds.
    return np.random.default_rng([seed, epoch, partition]).permutation(crops)


def balanced_order(labels: NDArray[np.int64], seed: int, epoch: int, partition: int = 0) -> NDArray[np.int64]:
    """Return an order of the crops of a partition in which each class appears equally often, (crops,) int64.

    The numbers of appearances of two classes differ by at most 1, and so do those of two crops of a class. With
    stochastic gradients, this is better than weights in the loss (arxiv.org/abs/2009.13447).

    labels: (crops,) int64.
    """
    if not len(labels):
        return labels
    chance = np.random.default_rng([seed, epoch, partition])
    crops_of_classes = np.unique(labels, return_counts=True)[1]
    each, remaining = divmod(len(labels), len(crops_of_classes))
    appearances = np.full(len(crops_of_classes), each)
    appearances[chance.permutation(len(appearances))[:remaining]] += 1
    rows_of_classes = np.split(np.argsort(labels, kind="stable"), np.cumsum(crops_of_classes)[:-1])
    order = []
    for rows, count in zip(rows_of_classes, appearances, strict=True):
        rounds = np.tile(rows, (-(-count // len(rows)), 1))
        order.append(chance.permuted(rounds, axis=1).ravel()[:count])
    return chance.permutation(np.concatenate(order))


def share(total: int, part: int, parts: int) -> tuple[int, int]:
    """Divide `total` rows into `parts` of sizes that differ by at most 1. Return first row and end of part `part`.

    A part is a worker's share of a global batch, or a replica's share of its worker's rows.
    """
    return part * total // parts, (part + 1) * total // parts
