"""Plan the work of `prepare` before any page is read: classes, splits, groups of pages, file names."""

import itertools
import os
import platform
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from importlib.metadata import version
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from upath import UPath

from cluster.errors import OptionError
from preprocessing.books import books_digest, books_of_pages, pages_for_training
from preprocessing.classes import class_indices, class_names
from preprocessing.config import SPLITS, PrepareConfig
from preprocessing.crop import MAX_PAGE_BYTES, NO_AREA, NO_FILE
from preprocessing.dataset import Loss, shard_name
from preprocessing.input import read_input
from preprocessing.labels.code_points import name_if_known
from preprocessing.labels.table import Labels
from preprocessing.pages import fingerprint
from preprocessing.split import folds_of_boxes, split_of_boxes

# A record has about 6.5 kB, so the largest shards have about 64 MB, a size that readers of object stores handle well.
BOXES_PER_GROUP = 10_000
# Small datasets get enough groups for the cores of a laptop. A constant: the bytes must not depend on the machine.
MIN_GROUPS = 16
# The packages whose versions are recorded: all of these but Ray determine the bytes of the crops and tables.
VERSIONED = ("kuzushiji", "numpy", "opencv-python-headless", "pillow", "pyarrow", "ray", "simplejpeg")


class Page(NamedTuple):
    """A page of a group, without its boxes."""

    id: str
    file_name: str
    """Name in the folder or archive of the pages; empty if the page has no file."""
    file_bytes: int
    """Number of bytes to read: the size of the file, at most `MAX_PAGE_BYTES` + 1."""
    boxes: int
    """Number of boxes."""
    made_for: tuple[int, int]
    """Width and height in pixels that the boxes were made for; (0, 0) if the labels do not say it."""


@dataclass
class Group:
    """Consecutive pages and their boxes: the input of one task of `prepare` or `predict`. P pages, N boxes.

    The fields are lists of numbers and strings, so that Ray Data transfers groups as Arrow columns.
    """

    number: int
    """Position among all groups, from 0."""
    page_ids: list[str]
    """P ids, sorted."""
    file_names: list[str]
    """P names in the folder or archive of the pages; empty if a page has no file."""
    file_bytes: list[int]
    """P numbers of bytes to read, see `Page`."""
    boxes_per_page: list[int]
    """P counts that add up to N."""
    box_numbers: list[int]
    """4 N: x, y, width and height of each box in pixels, page by page."""
    code_points: list[int]
    """N code points, `labels.UNKNOWN` where the label file has none."""
    made_for: list[int]
    """2 P: width and height that the boxes of each page were made for, see `Page`."""
    rescale: bool
    """Whether boxes that were made for another size of their page are scaled to it."""
    margin: float
    """As `PrepareConfig.margin`."""
    labels: list[int] = field(default_factory=list)
    """N class indices; only for `prepare`."""
    splits: list[int] = field(default_factory=list)
    """N indices into `SPLITS`; only for `prepare`."""
    shard_names: list[str] = field(default_factory=list)
    """One file name for each of `SPLITS`, empty if the group has no box in it; only for `prepare`."""

    @property
    def pages(self) -> list[Page]:
        """P pages."""
        made_for = zip(self.made_for[::2], self.made_for[1::2], strict=True)
        fields = zip(self.page_ids, self.file_names, self.file_bytes, self.boxes_per_page, made_for, strict=True)
        return [Page(*values) for values in fields]

    @property
    def boxes(self) -> NDArray[np.int64]:
        """(N, 4) x, y, width, height."""
        return np.asarray(self.box_numbers, np.int64).reshape(-1, 4)


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
    groups: list[Group]
    unlabelled: list[str]
    """Ids of pages that have a file and no row in the labels."""
    ignored: dict[str, int]
    """Kind of file that is not read to number of such files, see `pages.Listing`."""
    losses: list[Loss]
    """Boxes that are lost whatever the scans show, see `known_losses`."""
    identity: dict[str, Any]
    """Options, input fingerprint and package versions, as JSON. Equal identities give equal bytes.

    The fingerprint has the ids and sizes of the pages, not their content: a page that is replaced by another one of
    the same size is not noticed.
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
        raise OptionError("--split must be random or book with --crops, which are on no page. Received: page")
    labels, files, ignored = read_input(pages, label_places, rescale=bool(config.rescale), canvases=canvases)
    books = books_of_pages(labels, files, config.books)
    splits = _splits(labels, files, books, config)
    names = config.classes or class_names(labels.code_points, config.coverage)
    classes = class_indices(names, labels.code_points)
    groups = plan_groups(labels, classes, splits, files, config.shards, bool(config.rescale), config.margin)
    identity = config.model_dump(exclude={"max_bad_fraction"})
    versions = {"python": platform.python_version()} | {package: version(package) for package in VERSIONED}
    identity |= {"input": fingerprint(labels.sha256, files), "versions": versions}
    book_rule = f"titles, {books_digest(labels.page_ids, books)}"
    if config.split == "book" or config.train_only:  # else it has no part in the bytes of the shards
        identity |= {"book_rule": book_rule}
    unlabelled = sorted(os.fsencode(page).decode(errors="replace") for page in set(files) - set(labels.page_ids))
    lost = known_losses(labels, files)
    return Plan(labels, names, splits, books, book_rule, groups, unlabelled, ignored, lost, identity)


def _splits(
    labels: Labels, files: Mapping[str, tuple[str, int]], books: Sequence[str], config: PrepareConfig
) -> NDArray[np.int8]:
    """Return the split of each box, (N,) int8 indices into `SPLITS`. Raises as `make_plan`."""
    alone = pages_for_training(labels, files, books, config.train_only) if config.train_only else None
    if config.folds is not None and config.fold is not None:
        return folds_of_boxes(labels, config.split, config.seed, config.folds, config.fold, books, alone)
    fractions = config.val_fraction, config.test_fraction
    return split_of_boxes(labels, config.split, config.seed, *fractions, books, alone)


def known_losses(labels: Labels, files: Mapping[str, tuple[str, int]]) -> list[Loss]:
    """Return the boxes that are lost whatever the scans show: on pages without a file, or of no area.

    files: as in `group_pages`.
    """
    pages = np.repeat(np.arange(len(labels.page_ids)), labels.boxes_per_page)
    has_no_file = np.array([page_id not in files for page_id in labels.page_ids])[pages]
    has_no_area = (labels.boxes[:, 2:] <= 0).any(axis=1)
    return [
        {
            "box": labels.boxes[i].tolist(),
            "page": labels.page_ids[pages[i]],
            "unicode": name_if_known(int(labels.code_points[i])),
            "what": NO_FILE if has_no_file[i] else NO_AREA,
        }
        for i in np.flatnonzero(has_no_file | has_no_area)
    ]


def plan_groups(
    labels: Labels,
    classes: NDArray[np.int64],
    splits: NDArray[np.int8],
    files: Mapping[str, tuple[str, int]],
    groups: int | None,
    rescale: bool = False,
    margin: float = 0.0,
) -> list[Group]:
    """Return the groups of `prepare`, in the order of their pages.

    Args:
        labels: P pages, N boxes.
        classes: (N,), class index of each box.
        splits: (N,), index into `SPLITS` of each box.
        files: as in `group_pages`.
        groups: maximum number of groups; None: chosen by the number of boxes.
        rescale, margin: as in `Group`.
    """
    groups = groups or number_of_groups(len(labels.boxes), BOXES_PER_GROUP)
    planned = group_pages(labels, files, groups, rescale, margin)
    ends = np.cumsum([len(group.code_points) for group in planned])
    parts = zip(planned, np.split(classes, ends), np.split(splits, ends), strict=False)  # np.split adds an empty part
    for group, group_classes, group_splits in parts:
        group.labels, group.splits = group_classes.tolist(), group_splits.tolist()
        group.shard_names = [""] * len(SPLITS)
    for split, name in enumerate(SPLITS):  # number the shards of a split over the groups that have boxes in it
        members = [group for group in planned if split in group.splits]
        for index, group in enumerate(members):
            group.shard_names[split] = shard_name(name, index, len(members))
    return planned


def number_of_groups(boxes: int, per_group: int) -> int:
    """Return how many groups of about `per_group` boxes are needed, at least `MIN_GROUPS`."""
    return max(MIN_GROUPS, -(-boxes // per_group))


def group_pages(
    labels: Labels, files: Mapping[str, tuple[str, int]], groups: int, rescale: bool = False, margin: float = 0.0
) -> list[Group]:
    """Divide all pages, sorted by id, into at most `groups` groups with nearly equal numbers of boxes.

    Each group has at least one box.

    Args:
        labels: the pages and their boxes.
        files: page id to file name and size in bytes, for the pages that have a file, see `Listing.files_of`.
        groups: maximum number of groups. There are fewer if there are fewer pages with boxes, or if one page has the
            boxes of several groups.
        rescale, margin: as in `Group`.
    """
    planned = []
    for number, (first, last) in enumerate(itertools.pairwise(_bounds(labels, groups))):
        boxes = slice(labels.starts[first], labels.starts[last])
        page_ids = labels.page_ids[first:last]
        page_files = [files.get(page_id, ("", 0)) for page_id in page_ids]
        group = Group(
            number=number,
            page_ids=page_ids,
            file_names=[name for name, _ in page_files],
            # `page_reader` reads no more than this, even if an archive claims a larger size.
            file_bytes=[min(size, MAX_PAGE_BYTES + 1) for _, size in page_files],
            boxes_per_page=labels.boxes_per_page[first:last].tolist(),
            box_numbers=labels.boxes[boxes].ravel().tolist(),
            code_points=labels.code_points[boxes].tolist(),
            made_for=[side for page_id in page_ids for side in labels.page_sizes.get(page_id, (0, 0))],
            rescale=rescale,
            margin=margin,
        )
        planned.append(group)
    return planned


def _bounds(labels: Labels, groups: int) -> Sequence[int]:
    """Return the index of the first page of each group, and the number of pages."""
    total, pages = len(labels.boxes), len(labels.page_ids)
    groups = min(groups, pages)
    targets = np.arange(1, groups) * total / groups
    # The page boundary nearest to each target. Where targets share a boundary, there are fewer groups.
    after = np.clip(np.searchsorted(labels.starts, targets), 1, pages)
    nearest = np.where(targets - labels.starts[after - 1] <= labels.starts[after] - targets, after - 1, after)
    # Keep one boundary for each number of boxes before it, and none at 0 or all boxes: groups must not be empty.
    inner = {int(labels.starts[bound]): int(bound) for bound in nearest}
    return [0, *(bound for boxes, bound in sorted(inner.items()) if 0 < boxes < total), pages]
