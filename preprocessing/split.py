"""Assign each box to training, validation or test. The result depends only on labels, options and random seed.

The unit of the split is a box (`random`, as in the study), a page, or a book. A split by box puts boxes of the same
page, writer and book into several splits: this leakage inflates accuracy. A split by book measures accuracy on books
that the model has not seen. With folds, each page or book is in the test split of one fold.
"""

import heapq
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction

import numpy as np
from numpy.typing import NDArray

from cluster.errors import OptionError
from preprocessing.config import SPLITS
from preprocessing.labels.table import Labels

TRAIN, VALIDATION, TEST = range(3)

log = logging.getLogger("kuzushiji")

# Number of last units over which the subset sum is solved exactly. With no more units than this, the result is optimal.
_EXACT_UNITS = 64


def split_of_boxes(
    labels: Labels,
    by: str,
    seed: int,
    val_fraction: float,
    test_fraction: float,
    books: Sequence[str],
    train_only: NDArray[np.bool_] | None = None,
) -> NDArray[np.int8]:
    """Return the split of each box, (N,) int8 indices into `SPLITS`.

    Test and validation get `floor(F * fraction)` of the F boxes that are not for training only, or as close to that as
    whole units allow; test is filled first.

    Args:
        labels: P pages, N boxes.
        by: `random`, `page` or `book`.
        seed: random seed of the order in which units are chosen.
        val_fraction: fraction of the boxes for validation.
        test_fraction: fraction of the boxes for the test.
        books: P, the book of each page.
        train_only: (P,), which pages are for training only; None: none.

    Raises:
        OptionError: a split would be empty, or there are too few books.
    """
    rng = np.random.default_rng(seed)
    if by == "random":
        splits = _split_of_single_boxes(labels, rng, val_fraction, test_fraction, train_only)
    else:
        units = Units.of(labels, by, books, train_only)
        total = int(units.sizes.sum())
        needed = int(total == len(labels.boxes))  # units that training needs: none if it has pages of its own
        test_boxes, validation_boxes = (int(Fraction(str(f)) * total) for f in (test_fraction, val_fraction))
        if by == "book":
            _check_number_of_books(units, 2 + needed)
        split_of_unit = np.full(len(units.names), TRAIN, np.int8)
        remaining = units.in_seeded_order(rng)
        for split, wanted, leave in ((TEST, test_boxes, 1 + needed), (VALIDATION, validation_boxes, needed)):
            chosen = _fill([int(units.sizes[unit]) for unit in remaining], wanted, leave)
            split_of_unit[[remaining[i] for i in chosen]] = split
            remaining = [unit for i, unit in enumerate(remaining) if i not in chosen]
        splits = np.repeat(split_of_unit[units.of_page], labels.boxes_per_page)
    for split, name in enumerate(SPLITS):
        if not np.any(splits == split):
            raise OptionError(
                f"each split must get at least one box. Received: --split {by} leaves {name} empty "
                f"({len(labels.boxes)} boxes, {len(labels.page_ids)} pages, {len(set(books))} books). "
                "Give more pages, other fractions or a finer --split"
            )
    return splits


def folds_of_boxes(
    labels: Labels,
    by: str,
    seed: int,
    folds: int,
    fold: int,
    books: Sequence[str],
    train_only: NDArray[np.bool_] | None = None,
) -> NDArray[np.int8]:
    """Return the split of each box if one of several folds is the test split, and the next one validation.

    The folds do not depend on `fold`, so each unit that is not for training only is in the test split of one fold. The
    other arguments and the returned array are as in `split_of_boxes`.

    Args:
        folds: number of folds, at least 3.
        fold: the fold that is the test split, from 0.

    Raises:
        OptionError: there are fewer pages or books than folds.
    """
    units = Units.of(labels, by, books, train_only)
    if by == "book":
        _check_number_of_books(units, 3)
    if (number := int(np.count_nonzero(units.sizes))) < folds:
        more = "name the books with --books FILE" if by == "book" else "more pages"
        raise OptionError(
            f"--folds must be at most the number of {by}s with boxes{units.besides}. Received: --folds {folds}, "
            f"{number} {by}s. Give fewer folds, or {more}. See docs/data.md#few-books-folds"
        )
    fold_of_unit = _deal(units, folds, np.random.default_rng(seed))
    split_of_unit = np.full(len(units.names), TRAIN, np.int8)
    split_of_unit[fold_of_unit == fold] = TEST
    split_of_unit[fold_of_unit == (fold + 1) % folds] = VALIDATION
    return np.repeat(split_of_unit[units.of_page], labels.boxes_per_page)


def _split_of_single_boxes(
    labels: Labels,
    rng: np.random.Generator,
    val_fraction: float,
    test_fraction: float,
    train_only: NDArray[np.bool_] | None,
) -> NDArray[np.int8]:
    splits = np.full(len(labels.boxes), TRAIN, np.int8)
    if train_only is None:
        order = rng.permutation(len(splits))
    else:
        order = rng.permutation(np.flatnonzero(~np.repeat(train_only, labels.boxes_per_page)))
    test_boxes, validation_boxes = (int(Fraction(str(f)) * len(order)) for f in (test_fraction, val_fraction))
    splits[order[:test_boxes]] = TEST
    splits[order[test_boxes : test_boxes + validation_boxes]] = VALIDATION
    return splits


@dataclass(frozen=True)
class Units:
    """The units that a split keeps whole: U pages or books."""

    names: list[str]
    """U, sorted."""
    of_page: NDArray[np.int64]
    """(P,): the unit of each page."""
    sizes: NDArray[np.int64]
    """(U,): number of boxes of each unit; 0 for units that are for training only."""
    for_training: NDArray[np.bool_]
    """(U,): which units are for training only."""
    besides: str
    """Addition to the words `books with boxes` in an error message."""

    @classmethod
    def of(cls, labels: Labels, by: str, books: Sequence[str], train_only: NDArray[np.bool_] | None) -> "Units":
        """Return the units of a label file. The arguments are as in `split_of_boxes`.

        With `by="book"`, a page that is for training only makes its whole book so.
        """
        units = labels.page_ids if by == "page" else books
        names, of_page = np.unique(units, return_inverse=True)
        sizes = np.bincount(of_page, weights=labels.boxes_per_page).astype(np.int64)
        if train_only is None:
            return cls(names.tolist(), of_page, sizes, np.zeros(len(names), bool), "")
        for_training = np.bincount(of_page, weights=train_only) > 0
        if added := int(np.count_nonzero(for_training[of_page] & ~train_only)):
            log.warning("--train-only: %d more pages belong to the same books, which --split book keeps whole", added)
        besides = " besides those of --train-only"
        return cls(names.tolist(), of_page, np.where(for_training, 0, sizes), for_training, besides)

    def in_seeded_order(self, rng: np.random.Generator) -> list[int]:
        """Return the indices of the units that may be for validation or test, in an order that depends on the seed.

        Units that are for training only do not change this order.
        """
        others = np.flatnonzero(~self.for_training)
        with_boxes = np.flatnonzero(self.sizes[others])
        last = int(with_boxes[-1]) if len(with_boxes) else -1
        return [int(unit) for unit in others[rng.permutation(last + 1)] if self.sizes[unit]]


def _check_number_of_books(units: Units, least: int) -> None:
    """Raise OptionError if fewer books than `least` may be for validation or test."""
    found = [units.names[unit] for unit in np.flatnonzero(units.sizes)]
    if len(found) < least:
        which = f" ({', '.join(name[:40] for name in found)})" if found else ""
        raise OptionError(
            f"--split book must find at least {least} books with boxes{units.besides}. Received: {len(found)}{which}. "
            "Name the book of each page with --books FILE, or use --split page. See docs/data.md#books"
        )


def _deal(units: Units, folds: int, rng: np.random.Generator) -> NDArray[np.int64]:
    """Return the fold of each of U units, (U,), from 0; -1 for units that are for training only or have no boxes.

    The largest units are dealt first, each to the fold with the fewest boxes, so that the sums of two folds differ by
    at most the size of one unit. The seed decides the order of units of similar size (of the same power of two).
    """
    order = sorted(units.in_seeded_order(rng), key=lambda unit: -int(units.sizes[unit]).bit_length())
    by_boxes = [(0, int(place), fold) for fold, place in enumerate(rng.permutation(folds))]
    heapq.heapify(by_boxes)
    fold_of_unit = np.full(len(units.names), -1, np.int64)
    for unit in order:
        boxes, place, fold = by_boxes[0]
        heapq.heapreplace(by_boxes, (boxes + int(units.sizes[unit]), place, fold))
        fold_of_unit[unit] = fold
    return fold_of_unit


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
    # last s, `leave`, means `leave` or more.
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
