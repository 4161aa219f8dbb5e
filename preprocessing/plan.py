"""Plan the work of `prepare` before any page is read: classes, splits, groups of pages, file names."""

import logging
import os
import platform
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from typing import Any

import numpy as np
from numpy.typing import NDArray
from upath import UPath

from cluster.errors import OptionError, counted
from preprocessing.books import books_digest, books_of_pages, pages_for_training
from preprocessing.classes import RARE, class_indices, class_names
from preprocessing.config import SPLITS, PrepareConfig
from preprocessing.crop import NO_AREA, NO_FILE
from preprocessing.dataset import Loss
from preprocessing.groups import Groups, group_pages, plan_shards
from preprocessing.input import read_input
from preprocessing.labels.code_points import name_if_known
from preprocessing.labels.table import Labels
from preprocessing.pages import fingerprint
from preprocessing.split import TEST, folds_of_boxes, split_of_boxes

log = logging.getLogger("kuzushiji")

# A record has about 6.5 kB, so the largest shards have about 64 MB, a size that readers of object stores handle well.
BOXES_PER_GROUP = 10_000
# Small datasets get enough groups for the cores of a laptop. A constant: the bytes must not depend on the machine.
MIN_GROUPS = 16
LARGE_SHARE_OF_RARE = 0.2
FEW_BOOKS = 10
# The packages whose versions are recorded: all of these but Ray determine the bytes of the crops and tables.
VERSIONED = ("kuzushiji", "numpy", "opencv-python-headless", "pillow", "pyarrow", "ray", "simplejpeg")


@dataclass(frozen=True)
class Plan:
    """The work of one `prepare`, planned before any page is read. N boxes."""

    labels: Labels
    class_names: list[str]
    splits: NDArray[np.int8]
    """(N,): index into `SPLITS` of each box."""
    books: list[str]
    """P: the book of each page."""
    book_rule: str
    """As in `DatasetManifest`."""
    groups: Groups
    unlabelled: list[str]
    """Ids of pages that have a file and no row in the labels."""
    ignored: dict[str, int]
    """Number of files that are not read, by kind, see `pages.Listing`."""
    losses: list[Loss]
    """Boxes that are lost whatever the scans contain, see `known_losses`."""
    splits_without_crops: list[str]
    """Names of the splits whose boxes are all among them."""
    identity: dict[str, Any]
    """Options, input fingerprint and package versions, as JSON. Equal identities give equal shards and tables.

    The fingerprint has the ids and file sizes of the pages, not their content: it does not change if a page is replaced
    with another one of the same size.
    """


def make_plan(
    pages: UPath, label_places: UPath | Sequence[UPath] | None, config: PrepareConfig, canvases: UPath | None = None
) -> Plan:
    """Read the labels, list the pages, and assign classes, splits and shards.

    Args:
        pages: folder or archive of the pages.
        label_places: label files, see `read_labels`; None: `pages` has crops, see `read_crops`.
        config: the options.
        canvases: see `read_labels`.

    Raises:
        OptionError: a split would be empty, there are too few books or folds, or crops are to be split by page.
        InputError: labels or pages can't be used, or the files of `--books` and `--train-only` do not fit them.
    """
    if label_places is None and config.split == "page":
        raise OptionError("--split must be random or book with --crops, which have no pages. Received: page")
    labels, files, ignored = read_input(pages, label_places, rescale=bool(config.rescale), canvases=canvases)
    books = books_of_pages(labels, files, config.books)
    train_only = pages_for_training(labels, files, books, config.train_only) if config.train_only else None
    splits = _splits(labels, books, config, train_only)
    names = config.classes or class_names(labels.code_points, config.coverage)
    classes = class_indices(names, labels.code_points)
    is_rare = classes == len(names) - 1
    percent, percent_of_test = 100 * np.mean(is_rare), 100 * np.mean(is_rare[splits == TEST])
    hint = ", a large share: see docs/data.md#classes" if percent > 100 * LARGE_SHARE_OF_RARE else ""
    text = "%d classes; %.0f %% of the boxes, and %.0f %% of those of the test, are of the class %s%s"
    log.info(text, len(names), percent, percent_of_test, RARE, hint)
    _log_split(config, books, train_only)
    number = config.shards or number_of_groups(len(labels.boxes), BOXES_PER_GROUP)
    grouped = group_pages(labels, files, number, bool(config.rescale), config.margin)
    groups = plan_shards(grouped, classes, splits)
    identity = config.model_dump(exclude={"max_bad_fraction"})
    versions = {"python": platform.python_version()} | {package: version(package) for package in VERSIONED}
    identity |= {"input": fingerprint(labels.sha256, files), "versions": versions}
    book_rule = f"titles, {books_digest(labels.page_ids, books)}"
    if config.split == "book" or config.train_only:  # otherwise it does not affect the bytes of the shards
        identity |= {"book_rule": book_rule}
    unlabelled = sorted(os.fsencode(page).decode(errors="replace") for page in set(files) - set(labels.page_ids))
    lost, empty = known_losses(labels, files), _splits_without_crops(splits, _known_lost(labels, files))
    return Plan(labels, names, splits, books, book_rule, groups, unlabelled, ignored, lost, empty, identity)


def _log_split(config: PrepareConfig, books: Sequence[str], train_only: NDArray[np.bool_] | None) -> None:
    """Log what may make the accuracy of a split misleading."""
    if config.split == "random":
        log.info("--split random has crops of one page in several splits: see docs/data.md#which-split")
    # With --split book, the whole book of a page for training is in training.
    testable = set(books) - ({*np.array(books)[train_only]} if train_only is not None else set())
    if config.split == "book" and config.folds is None and len(testable) < FEW_BOOKS:
        log.info(
            "only %d books can be in the test, so the accuracy depends on which are. See docs/data.md#few-books-folds",
            len(testable),
        )
    alone = [book for book, count in Counter(books).items() if count == 1]
    if config.split == "book" and len(alone) > max(len(books) / 2, FEW_BOOKS - 1):
        log.warning(
            "--split book: %s of one page only, such as %r. If these are pages of the same titles, name their books, "
            "or the split is by page. See docs/data.md#books",
            counted(len(alone), "book"),
            alone[0],
        )


def _splits(
    labels: Labels, books: Sequence[str], config: PrepareConfig, train_only: NDArray[np.bool_] | None
) -> NDArray[np.int8]:
    """Return the split of each box, (N,) int8 indices into `SPLITS`. Raises as `make_plan`."""
    if config.folds is not None and config.fold is not None:
        return folds_of_boxes(labels, config.split, config.seed, config.folds, config.fold, books, train_only)
    fractions = config.val_fraction, config.test_fraction
    return split_of_boxes(labels, config.split, config.seed, *fractions, books, train_only)


def _splits_without_crops(splits: NDArray[np.int8], lost: NDArray[np.bool_]) -> list[str]:
    """Return the splits that have boxes, all of which are lost. For example, the only title of a test has no scans."""
    return [name for i, name in enumerate(SPLITS) if np.any(splits == i) and np.all(lost[splits == i])]


def _known_lost(labels: Labels, files: Mapping[str, tuple[str, int]]) -> NDArray[np.bool_]:
    """Return which of the N boxes are those of `known_losses`, (N,) bool."""
    has_no_file = np.repeat([page_id not in files for page_id in labels.page_ids], labels.boxes_per_page)
    lost: NDArray[np.bool_] = has_no_file | (labels.boxes[:, 2] <= 0) | (labels.boxes[:, 3] <= 0)
    return lost


def known_losses(labels: Labels, files: Mapping[str, tuple[str, int]]) -> list[Loss]:
    """Return the boxes that are lost whatever the scans contain: those on pages without a file, and those without area.

    Args:
        labels: the pages and their boxes.
        files: as in `Groups`.
    """
    lost = np.flatnonzero(_known_lost(labels, files))
    pages = np.searchsorted(labels.starts, lost, "right") - 1
    return [
        {
            "box": labels.boxes[i].tolist(),
            "page": labels.page_ids[page],
            "unicode": name_if_known(int(labels.code_points[i])),
            "what": NO_AREA if labels.page_ids[page] in files else NO_FILE,
        }
        for i, page in zip(lost, pages, strict=True)
    ]


def number_of_groups(boxes: int, per_group: int) -> int:
    """Return how many groups of about `per_group` boxes are needed, at least `MIN_GROUPS`."""
    return max(MIN_GROUPS, -(-boxes // per_group))
