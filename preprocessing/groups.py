"""Groups of pages: the input of each task of `prepare` or `predict`.

The command keeps the labels as arrays, and makes a group when it writes it. A task gets the number of its group, and
reads the rows of the group from Parquet files. Each attempt of the command writes these files before its first task:

*-groups-00000.parquet ...  one row group per group, one row per page, `GROUPS_PER_FILE` groups per file
    page                    id
    file                    name in the folder or archive of the pages, as bytes; empty if the page has no file
    file_bytes              see `Page`
    width, height           size in pixels that the boxes were made for; 0 if the labels do not state it
    boxes                   list of x, y, width, height of one box after the other
    code_points             list, one per box
    labels, splits          lists, one per box, as in `Group`; empty for `predict`
"""

import io
import itertools
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray
from upath import UPath

from cluster.errors import DamageError
from cluster.progress import progress
from cluster.storage import list_files, new_file, read_bytes, remove_file
from preprocessing.config import SPLITS
from preprocessing.crop import MAX_PAGE_BYTES
from preprocessing.dataset import shard_name
from preprocessing.labels.table import Labels

# A task reads the whole file, about 1.5 MB: one request, whose checksum is compared. A group's scans have 60 MB.
GROUPS_PER_FILE = 16

_SCHEMA = pa.schema(
    [
        ("page", pa.string()),
        ("file", pa.binary()),
        ("file_bytes", pa.int64()),
        ("width", pa.int32()),
        ("height", pa.int32()),
        ("boxes", pa.list_(pa.int32())),
        ("code_points", pa.list_(pa.int32())),
        ("labels", pa.list_(pa.int32())),
        ("splits", pa.list_(pa.int8())),
    ]
)


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


def write_groups(groups: Groups, folder: UPath, prefix: str, within: UPath | None = None) -> None:
    """Write the files of an attempt.

    Each attempt has its own files: those of another one may have other file names for the same pages, or be damaged.

    Args:
        groups: at least one group.
        folder: folder from which `read_group` reads.
        prefix: prefix of the file names, which differs between attempts.
        within: as in `new_file`.

    Raises:
        KuzushijiError: the folder is full, read-only or missing.
    """
    with progress("groups planned", len(groups), "groups") as advance:
        for first in range(0, len(groups), GROUPS_PER_FILE):
            numbers = range(first, min(first + GROUPS_PER_FILE, len(groups)))
            names = [groups.shard_names[number] for number in numbers] if groups.shard_names else []
            same = {"rescale": groups.rescale, "margin": groups.margin, "shard_names": names}
            schema = _SCHEMA.with_metadata({"groups": json.dumps(same)})
            with (
                new_file(_file_of(folder, prefix, first), within) as local,
                pq.ParquetWriter(local, schema, compression="zstd", write_page_checksum=True) as writer,
            ):
                for number in numbers:
                    rows = _table(groups[number], schema)
                    writer.write_table(rows, row_group_size=len(rows))
            advance(len(numbers))


@contextmanager
def written_groups(groups: Groups, folder: UPath, prefix: str) -> Iterator[Callable[[], None]]:
    """Yield a function that calls `write_groups`, within `folder`. The files are removed when the block ends."""
    try:
        yield lambda: write_groups(groups, folder, prefix, within=folder)
    finally:
        with suppress(Exception):  # the folder itself may have failed
            for name in list_files(folder):
                if name.startswith(f"{prefix}-"):
                    remove_file(folder / name)


def _file_of(folder: UPath, prefix: str, number: int) -> UPath:
    return folder / f"{prefix}-groups-{number // GROUPS_PER_FILE:05d}.parquet"


def _table(group: Group, schema: pa.Schema) -> pa.Table:
    starts = np.cumsum([0, *(page.boxes for page in group.pages)])

    def lists(values: NDArray[Any], of_box: int = 1) -> pa.Array:
        offsets = of_box * starts if len(values) else np.zeros_like(starts)
        return pa.ListArray.from_arrays(pa.array(offsets, pa.int32()), pa.array(values.ravel()))

    columns = {
        "page": group.page_ids,
        "file": [page.file_name.encode(errors="surrogateescape") for page in group.pages],
        "file_bytes": [page.file_bytes for page in group.pages],
        "width": [page.made_for[0] for page in group.pages],
        "height": [page.made_for[1] for page in group.pages],
        "boxes": lists(group.boxes, 4),
        "code_points": lists(group.code_points),
        "labels": lists(group.labels),
        "splits": lists(group.splits),
    }
    return pa.table(columns, schema=schema)


def read_group(folder: UPath, prefix: str, number: int) -> Group:
    """Read a group that `write_groups` wrote.

    Raises:
        FileNotFoundError: this machine sees no such file in the folder.
        DamageError: the file is damaged.
        KuzushijiError: the file can't be read.
    """
    path = _file_of(folder, prefix, number)
    data = io.BytesIO(read_bytes(path))
    try:
        with pq.ParquetFile(data, page_checksum_verification=True) as file:
            rows = file.read_row_group(number % GROUPS_PER_FILE, use_threads=False)
    except (pa.ArrowException, OSError) as error:  # OSError: a wrong checksum
        raise DamageError(
            f"{path} must not change after it was written. Received: {' '.join(str(error).split())}. "
            "Run the same command again"
        ) from error
    same = json.loads(rows.schema.metadata[b"groups"])
    columns = {name: rows[name].combine_chunks() for name in _SCHEMA.names}
    made_for = zip(columns["width"].to_pylist(), columns["height"].to_pylist(), strict=True)
    counts = columns["code_points"].value_lengths().to_pylist()
    fields = (columns["page"].to_pylist(), _names(columns["file"]), columns["file_bytes"].to_pylist(), counts, made_for)
    return Group(
        number=number,
        pages=[Page(*values) for values in zip(*fields, strict=True)],
        boxes=_values(columns["boxes"]).reshape(-1, 4),
        code_points=_values(columns["code_points"]),
        rescale=same["rescale"],
        margin=same["margin"],
        labels=_values(columns["labels"]),
        splits=_values(columns["splits"]),
        shard_names=same["shard_names"][number % GROUPS_PER_FILE] if same["shard_names"] else [],
    )


def _names(column: pa.Array) -> list[str]:
    return [name.decode(errors="surrogateescape") for name in column.to_pylist()]


def _values(column: pa.Array) -> NDArray[Any]:
    values: NDArray[Any] = column.flatten().to_numpy(zero_copy_only=False)
    return values
