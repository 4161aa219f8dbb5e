"""Labels to work: all that is known before a page is read. Classes, splits, groups of pages, names of files."""

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

from preprocessing.classes import class_indices, class_names
from preprocessing.config import SPLITS, PrepareConfig
from preprocessing.crop import MAX_PAGE_BYTES
from preprocessing.dataset import shard_name
from preprocessing.labels import Labels, read_labels
from preprocessing.pages import fingerprint, list_pages
from preprocessing.split import split_of_boxes

# A crop makes a record of about 6.5 kB: 64 MB per shard, a size that readers of object stores handle well.
BOXES_PER_GROUP = 10_000
# Small sets are cut into enough groups for the cores of a laptop. A constant: bytes must not depend on the machine.
MIN_GROUPS = 16
# The libraries that decide the bytes of the crops.
VERSIONED = ("kuzushiji", "numpy", "opencv-python-headless", "ray", "simplejpeg")


class Page(NamedTuple):
    """A page of a group, without its boxes."""

    id: str
    file_name: str
    """In the folder or archive of the pages; empty if the page has no file."""
    file_bytes: int
    """How many bytes to read."""
    boxes: int
    """Number of boxes."""


@dataclass
class Group:
    """Consecutive pages and their boxes: what one task of `prepare` or `predict` gets. P pages, N boxes.

    Lists of numbers and strings, so that Ray Data moves groups as Arrow columns.
    """

    number: int
    """Position among all groups, from 0."""
    page_ids: list[str]
    """P ids, sorted."""
    file_names: list[str]
    """P names in the folder or archive of the pages; empty if a page has no file."""
    file_bytes: list[int]
    """P sizes in bytes."""
    boxes_per_page: list[int]
    """P counts that add up to N."""
    box_numbers: list[int]
    """4 N: x, y, width and height of each box in pixels, page by page."""
    code_points: list[int]
    """N code points, `labels.UNKNOWN` where the label file has none."""
    labels: list[int] = field(default_factory=list)
    """N class indices; only for `prepare`."""
    splits: list[int] = field(default_factory=list)
    """N indices into `SPLITS`; only for `prepare`."""
    shard_names: list[str] = field(default_factory=list)
    """One file name for each of `SPLITS`, empty if the group has no box in it; only for `prepare`."""

    @property
    def pages(self) -> list[Page]:
        """P pages."""
        fields = zip(self.page_ids, self.file_names, self.file_bytes, self.boxes_per_page, strict=True)
        return [Page(*values) for values in fields]

    @property
    def boxes(self) -> NDArray[np.int64]:
        """(N, 4) x, y, width, height."""
        return np.asarray(self.box_numbers, np.int64).reshape(-1, 4)


@dataclass(frozen=True)
class Plan:
    """A preparation before any page is read. N boxes."""

    labels: Labels
    class_names: list[str]
    splits: NDArray[np.int8]
    """(N,) index into `SPLITS` of each box."""
    groups: list[Group]
    unlabelled: list[str]
    """Ids of pages that have a file and no row in the labels."""
    identity: dict[str, Any]
    """JSON that is equal for two preparations that write the same bytes: options, input, versions."""


def make_plan(pages: UPath, labels_path: UPath, config: PrepareConfig) -> Plan:
    """Read the labels, list the pages, and decide classes, splits and files.

    Raises:
        OptionError: a split would be empty.
        InputError: labels or pages can't be used.
    """
    labels = read_labels(labels_path)
    files = list_pages(pages)
    splits = split_of_boxes(labels, config.split, config.seed, config.val_fraction, config.test_fraction)
    names = config.classes or class_names(labels.code_points, config.coverage)
    groups = plan_groups(labels, class_indices(names, labels.code_points), splits, files, config.shards)
    identity = config.model_dump(exclude={"max_bad_fraction"})
    versions = {"python": platform.python_version()} | {package: version(package) for package in VERSIONED}
    identity |= {"input": fingerprint(labels.sha256, files), "versions": versions}
    unlabelled = sorted(os.fsencode(page).decode(errors="replace") for page in set(files) - set(labels.page_ids))
    return Plan(labels, names, splits, groups, unlabelled, identity)


def plan_groups(
    labels: Labels,
    classes: NDArray[np.int64],
    splits: NDArray[np.int8],
    files: Mapping[str, tuple[str, int]],
    groups: int | None,
) -> list[Group]:
    """The groups of `prepare`, in the order of their pages.

    classes, splits: (N,) of each box. files: as for `group_pages`. groups: how many; None: by size.
    """
    planned = group_pages(labels, files, groups or number_of_groups(len(labels.boxes), BOXES_PER_GROUP))
    ends = np.cumsum([len(group.code_points) for group in planned])
    for group, of_group, in_split in zip(planned, np.split(classes, ends), np.split(splits, ends), strict=False):
        group.labels, group.splits = of_group.tolist(), in_split.tolist()
        group.shard_names = [""] * len(SPLITS)
    for split, name in enumerate(SPLITS):  # number the files of a split over the groups that have boxes in it
        of_split = [group for group in planned if split in group.splits]
        for index, group in enumerate(of_split):
            group.shard_names[split] = shard_name(name, index, len(of_split))
    return planned


def number_of_groups(boxes: int, per_group: int) -> int:
    """Groups of `per_group` boxes, but at least `MIN_GROUPS`."""
    return max(MIN_GROUPS, -(-boxes // per_group))


def group_pages(labels: Labels, files: Mapping[str, tuple[str, int]], groups: int) -> list[Group]:
    """All pages, sorted by id, in at most `groups` groups of nearly equal numbers of boxes, each with one at least.

    files: page id to file name and size in bytes, for the pages that have a file.
    """
    planned = []
    for number, (first, last) in enumerate(itertools.pairwise(_bounds(labels, groups))):
        boxes = slice(labels.starts[first], labels.starts[last])
        page_ids = labels.page_ids[first:last]
        of_pages = [files.get(page_id, ("", 0)) for page_id in page_ids]
        group = Group(
            number=number,
            page_ids=page_ids,
            file_names=[name for name, _ in of_pages],
            # No reader reads more than that, whatever an archive says.
            file_bytes=[min(size, MAX_PAGE_BYTES + 1) for _, size in of_pages],
            boxes_per_page=labels.boxes_per_page[first:last].tolist(),
            box_numbers=labels.boxes[boxes].ravel().tolist(),
            code_points=labels.code_points[boxes].tolist(),
        )
        planned.append(group)
    return planned


def _bounds(labels: Labels, groups: int) -> Sequence[int]:
    """Numbers of the pages at which groups begin, and the number of pages."""
    total, pages = len(labels.boxes), len(labels.page_ids)
    groups = min(groups, pages)
    targets = np.arange(1, groups) * total / groups
    # The bound nearest to each target; bounds that fall together leave fewer groups.
    after = np.clip(np.searchsorted(labels.starts, targets), 1, pages)
    nearest = np.where(targets - labels.starts[after - 1] <= labels.starts[after] - targets, after - 1, after)
    # One bound is enough for each number of boxes before it, and none where this is 0 or all boxes.
    inner = {int(labels.starts[bound]): int(bound) for bound in nearest}
    return [0, *(bound for boxes, bound in sorted(inner.items()) if 0 < boxes < total), pages]
