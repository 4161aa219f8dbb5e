"""Groups of pages: the input of each task of `prepare` or `predict`.

The command keeps the labels as arrays, and makes a group when it writes it to a file (`group_files.py`).
"""

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from preprocessing.config import SPLITS
from preprocessing.crop import MAX_PAGE_BYTES
from preprocessing.dataset import shard_name
from preprocessing.labels.table import Labels


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
    """Width and height in pixels that the boxes were made for; (0, 0) if the labels do not state them."""


@dataclass
class Group:
    """Consecutive pages and their boxes: the input of one task. P pages, N boxes."""

    number: int
    """Position among all groups, from 0."""
    pages: list[Page]
    """P, sorted by id."""
    boxes: NDArray[np.int32]
    """(N, 4): x, y, width and height of each box in pixels, page by page."""
    code_points: NDArray[np.int32]
    """(N,); `code_points.UNKNOWN` where the label file has none."""
    rescale: bool
    """Whether boxes that were made for another size of their page are scaled to it."""
    margin: float
    """As `PrepareConfig.margin`."""
    labels: NDArray[np.int32]
    """(N,) class indices; empty for `predict`."""
    splits: NDArray[np.int8]
    """(N,) indices into `SPLITS`; empty for `predict`."""
    shard_names: list[str]
    """One file name for each of `SPLITS`, empty if the group has no box in it; no names for `predict`."""

    @property
    def page_ids(self) -> list[str]:
        """The ids of the P pages."""
        return [page.id for page in self.pages]


@dataclass(frozen=True)
class Groups:
    """All pages, sorted by id, in G groups, each of which is made when it is accessed. N boxes."""

    labels: Labels
    files: Mapping[str, tuple[str, int]]
    """Page id to file name and size in bytes, for the pages that have a file, see `Listing.files_of`."""
    bounds: Sequence[int]
    """G + 1: index of the first page of each group, and the number of pages."""
    rescale: bool
    margin: float
    classes: NDArray[np.int32] = field(default_factory=lambda: np.empty(0, np.int32))
    """(N,) class indices; empty for `predict`."""
    splits: NDArray[np.int8] = field(default_factory=lambda: np.empty(0, np.int8))
    """(N,) indices into `SPLITS`; empty for `predict`."""
    shard_names: Sequence[list[str]] = ()
    """G, each as in `Group`; none for `predict`."""

    def __len__(self) -> int:
        return len(self.bounds) - 1

    def page_ids(self, number: int) -> list[str]:
        """Return the ids of the pages of a group."""
        return self.labels.page_ids[self.bounds[number] : self.bounds[number + 1]]

    @property
    def sizes(self) -> list[int]:
        """The number of pages of each of the G groups."""
        return [last - first for first, last in itertools.pairwise(self.bounds)]

    def __getitem__(self, number: int) -> Group:
        first, last = self.bounds[number], self.bounds[number + 1]
        starts = self.labels.starts[first : last + 1]
        boxes = slice(starts[0], starts[-1])
        return Group(
            number=number,
            pages=list(map(self._page, self.labels.page_ids[first:last], np.diff(starts).tolist())),
            boxes=self.labels.boxes[boxes],
            code_points=self.labels.code_points[boxes],
            rescale=self.rescale,
            margin=self.margin,
            labels=self.classes[boxes],
            splits=self.splits[boxes],
            shard_names=self.shard_names[number] if self.shard_names else [],
        )

    def _page(self, page_id: str, boxes: int) -> Page:
        name, size = self.files.get(page_id, ("", 0))
        # `page_reader` reads no more than this, even if an archive claims a larger size.
        return Page(page_id, name, min(size, MAX_PAGE_BYTES + 1), boxes, self.labels.page_sizes.get(page_id, (0, 0)))


def group_pages(
    labels: Labels, files: Mapping[str, tuple[str, int]], groups: int, rescale: bool = False, margin: float = 0.0
) -> Groups:
    """Divide all pages, sorted by id, into at most `groups` groups with nearly equal numbers of boxes.

    Each group has at least one box.

    Args:
        labels: the pages and their boxes.
        files: as in `Groups`.
        groups: maximum number of groups. There are fewer if there are fewer pages with boxes, or if one page has the
            boxes of several groups.
        rescale, margin: as in `Group`.
    """
    return Groups(labels, files, _bounds(labels, groups), rescale, margin)


def plan_shards(groups: Groups, classes: NDArray[np.int32], splits: NDArray[np.int8]) -> Groups:
    """Return the groups with the classes, splits and shard names that `prepare` needs.

    Args:
        groups: groups with N boxes.
        classes: (N,), class index of each box.
        splits: (N,), index into `SPLITS` of each box.
    """
    starts = groups.labels.starts[list(groups.bounds)]
    has = [[bool((splits[a:b] == split).any()) for a, b in itertools.pairwise(starts)] for split in range(len(SPLITS))]
    names = [[""] * len(SPLITS) for _ in range(len(groups))]
    for split, name in enumerate(SPLITS):  # number the shards of a split over the groups that have boxes in it
        members = [number for number, there in enumerate(has[split]) if there]
        for index, number in enumerate(members):
            names[number][split] = shard_name(name, index, len(members))
    return replace(groups, classes=classes, splits=splits, shard_names=names)


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
