"""Assign each box to training, validation or test. Labels, options and seed alone decide.

The unit of the split is a box (`random`, as in the study), a page, or a book. A split by box puts boxes of the same
page, writer and book into several splits: this leakage inflates accuracy. A split by book measures accuracy on books
that the model has not seen.
"""

from fractions import Fraction

import numpy as np
from numpy.typing import NDArray

from cluster.errors import OptionError
from preprocessing.config import SPLITS
from preprocessing.labels.table import Labels, book_of

TRAIN, VALIDATION, TEST = range(3)

# Number of last units over which the subset sum is solved exactly. With no more units than this, the result is optimal.
_EXACT_UNITS = 64


def split_of_boxes(labels: Labels, by: str, seed: int, val_fraction: float, test_fraction: float) -> NDArray[np.int8]:
    """Return the split of each box, (N,) int8 indices into `SPLITS`. by: `random`, `page` or `book`.

    Test and validation get `floor(N * fraction)` boxes each, or as close to that as whole units allow; test is filled
    first.

    Raises:
        OptionError: a split would be empty.
    """
    total = len(labels.boxes)
    test_boxes, validation_boxes = (int(Fraction(str(f)) * total) for f in (test_fraction, val_fraction))
    rng = np.random.default_rng(seed)
    splits = np.full(total, TRAIN, np.int8)
    if by == "random":
        order = rng.permutation(total)
        splits[order[:test_boxes]] = TEST
        splits[order[test_boxes : test_boxes + validation_boxes]] = VALIDATION
    else:
        units = labels.page_ids if by == "page" else [book_of(page_id) for page_id in labels.page_ids]
        _, unit_of_page = np.unique(units, return_inverse=True)
        unit_of_box = np.repeat(unit_of_page, labels.boxes_per_page)
        sizes = np.bincount(unit_of_box)
        remaining = [int(unit) for unit in rng.permutation(len(sizes)) if sizes[unit]]
        for split, wanted, leave in ((TEST, test_boxes, 2), (VALIDATION, validation_boxes, 1)):
            chosen = _fill([int(sizes[unit]) for unit in remaining], wanted, leave)
            splits[np.isin(unit_of_box, [remaining[i] for i in chosen])] = split
            remaining = [unit for i, unit in enumerate(remaining) if i not in chosen]
    for split, name in enumerate(SPLITS):
        if not np.any(splits == split):
            raise OptionError(
                f"each split must get at least one box. Received: --split {by} leaves {name} empty "
                f"({total} boxes, {len(labels.page_ids)} pages, {len({book_of(p) for p in labels.page_ids})} books). "
                "Give more pages, other fractions or a finer --split"
            )
    return splits


def _fill(sizes: list[int], wanted: int, leave: int) -> set[int]:
    """Return the indices of units whose sizes add up as closely as possible to `wanted`; on a tie, the smaller sum.

    At least one unit is chosen and at least `leave` units are left for the other splits; if there are too few units,
    none is chosen. With many units, the first ones that fit are taken, and an exact subset sum is solved over the last
    `_EXACT_UNITS`. With few units, only the exact subset sum is solved.
    """
    chosen: set[int] = set()
    first_exact = max(0, len(sizes) - _EXACT_UNITS)
    # The greedy part leaves half the size of the last units for the exact part: there, the subset sums are densest.
    exact_part = sum(sizes[first_exact:]) // 2
    for i in range(first_exact):
        if wanted - sizes[i] >= exact_part:
            chosen.add(i)
            wanted -= sizes[i]
    # reachable[k][s]: bit b is set if some of the first k units add up to b, and s of the k units are not chosen. The
    # last s, `leave`, stands for `leave` or more.
    reachable: list[list[int]] = [[1] + [0] * leave]
    for size in sizes[first_exact:]:
        previous = reachable[-1]
        current = [sums << size for sums in previous]
        for left, sums in enumerate(previous):
            current[min(left + 1, leave)] |= sums
        reachable.append(current)
    final_sums = reachable[-1][leave]
    if not chosen:
        final_sums &= ~1  # at least one unit must be chosen: exclude the empty sum
    if not final_sums:
        return chosen
    total, left = _nearest_bit(final_sums, wanted), leave
    for k in range(len(reachable) - 2, -1, -1):
        size, reached = sizes[first_exact + k], reachable[k]
        if total >= size and reached[left] >> (total - size) & 1:
            chosen.add(first_exact + k)
            total -= size
        elif not (left == leave and reached[left] >> total & 1):
            left -= 1
    return chosen


def _nearest_bit(bits: int, wanted: int) -> int:
    """Return the position of the set bit nearest to `wanted`, the lower one on a tie. `bits` must not be 0."""
    below = (bits & ((1 << wanted + 1) - 1)).bit_length() - 1
    above = bits >> wanted + 1
    lowest_above = wanted + (above & -above).bit_length()
    if below < 0 or (above and lowest_above - wanted < wanted - below):
        return lowest_above
    return below
