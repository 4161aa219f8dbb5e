"""The representation of labels of all forms: `Labels`, the boxes of all pages as arrays."""

import itertools
from array import array
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from cluster.errors import InputError, counted

COLUMNS = 5  # of a page's table: code point, x, y, width, height
# Kaggle's labels have 3,881 pages and 683,464 boxes, CODH's 1,086,326 boxes. A million pages like Kaggle's have 176
# million boxes, 3.5 GB as `Labels`.
MAX_PAGES = 2_000_000
MAX_BOXES = 200_000_000
# 1,600 times the boxes of Kaggle's page with the most. While a page is read, its numbers take up to 26 times the size
# of its lines, so a large file with one page would take more than 4 GB.
MAX_PAGE_BOXES = 1_000_000
MAX_PIXELS = 999_999_999  # of a coordinate or a side: nine digits
TOLERANCE = 1e-3  # pixels; a coordinate closer than this to a whole number counts as that number
# The box of a crop: its whole file, whose size is not known before it is read. No label file can contain this box.
WHOLE_FILE = (0, 0, 2**31 - 1, 2**31 - 1)


@dataclass(frozen=True)
class Labels:
    """The contents of label files: P pages sorted by id, and N boxes page by page, in the order of the file."""

    page_ids: list[str]
    """P ids."""
    starts: NDArray[np.int64]
    """(P + 1,); page p has the boxes starts[p]:starts[p + 1]."""
    code_points: NDArray[np.int32]
    """(N,); `UNKNOWN` if the file has no character for the box."""
    boxes: NDArray[np.int32]
    """(N, 4): x, y, width, height in pixels, from the upper left corner of the page; `WHOLE_FILE` for a crop."""
    sha256: str
    """Hex digest of all input of the labels, such as the bytes of the files."""
    books: Mapping[str, str] = field(default_factory=dict)
    """Page id to book, for the pages whose book the form states."""
    page_sizes: Mapping[str, tuple[int, int]] = field(default_factory=dict)
    """Page id to width and height in pixels, for the pages whose size the form states."""
    warnings: Sequence[tuple[str, str]] = ()
    """Page id and text: boxes in fractions of pixels, and characters that were probably lost in another encoding."""

    @property
    def boxes_per_page(self) -> NDArray[np.int64]:
        """(P,)."""
        return np.diff(self.starts)

    def pages_with(self, boxes: NDArray[np.bool_]) -> NDArray[np.bool_]:
        """Return which pages have one of the boxes, (P,). boxes: (N,), True for the boxes in question."""
        before = np.zeros(len(boxes) + 1, np.int32)
        np.cumsum(boxes, out=before[1:])
        return np.diff(before[self.starts]) > 0


NO_BOXES: NDArray[np.int32] = np.empty((0, COLUMNS), np.int32)


class PageBoxes(NamedTuple):
    """The boxes of a page, in the order of the label file."""

    page_id: str
    table: NDArray[np.int32]
    """(n, 5): code point, x, y, width, height."""
    where: str
    """The file, for error messages."""
    book: str | None = None
    size: tuple[int, int] | None = None
    """Width and height of the page, if the file states them."""
    widened: int = 0
    """Number of boxes that had fractions of pixels."""


class Collected:
    """Collects boxes by page, for files in which the boxes have any order."""

    def __init__(self) -> None:
        self.values: dict[str, array[float]] = {}

    def add_page(self, page_id: str) -> None:
        self.values.setdefault(page_id, array("d"))

    def add(self, page_id: str, code_point: int, box: Sequence[float]) -> None:
        """Add a box to a page. box: x, y, width, height, each at most `MAX_PIXELS`. Raises as `check_page`."""
        values = self.values.setdefault(page_id, array("d"))
        values.extend((code_point, *box))
        check_page(page_id, len(values) // COLUMNS)

    def tables(self) -> Iterator[tuple[str, NDArray[np.int32], int]]:
        """Yield each page's id, its table as in `PageBoxes`, and how many of its boxes had fractions of pixels."""
        for page_id, values in self.values.items():
            table = np.array(values, np.float64).reshape(-1, COLUMNS)
            boxes, widened = whole_pixels(table[:, 1:])
            yield page_id, np.column_stack([table[:, :1].astype(np.int32), boxes]), int(widened.sum())


def check_page(page_id: str, boxes: int) -> None:
    """Raise InputError if a page has too many boxes."""
    if boxes > MAX_PAGE_BOXES:
        raise InputError(
            f"a page must have at most {MAX_PAGE_BOXES} boxes. Received: more, on page {page_id}. Fix the label file. "
            "See docs/data.md#limits"
        )


def whole_pixels(boxes: NDArray[np.float64]) -> tuple[NDArray[np.int32], NDArray[np.bool_]]:
    """Round the left and upper edges of boxes down and the right and lower edges up, to whole pixels.

    boxes: (n, 4) x, y, width, height.

    Returns:
        (n, 4) boxes, and (n,) whether an edge was moved. A box without an area stays without one.
    """
    edges = np.concatenate([boxes[:, :2], boxes[:, :2] + boxes[:, 2:]], axis=1)
    nearest = np.rint(edges)
    moved = np.abs(edges - nearest) > TOLERANCE
    outwards = np.concatenate([np.floor(edges[:, :2]), np.ceil(edges[:, 2:])], axis=1)
    edges = np.where(moved, outwards, nearest)
    sides = np.where(boxes[:, 2:] > 0, edges[:, 2:] - edges[:, :2], np.ceil(boxes[:, 2:]))
    return np.concatenate([edges[:, :2], sides], axis=1).astype(np.int32), moved.any(axis=1)


def assemble(pages: Iterable[PageBoxes], digest: Callable[[], str]) -> Labels:
    """Sort pages by id and put their boxes together.

    digest: called after the last page; returns `Labels.sha256`.

    Raises:
        InputError: an id is repeated, there are too many pages or boxes, also on one page, or there is no box.
    """
    found: list[PageBoxes] = []
    counts: list[int] = []
    numbers = array("i")  # of all tables: joining one array per page would copy all of them
    for page in pages:
        check_page(page.page_id, len(page.table))
        numbers.frombytes(np.ascontiguousarray(page.table, np.int32).tobytes())
        counts.append(len(page.table))
        found.append(page._replace(table=NO_BOXES))
        if len(found) > MAX_PAGES or len(numbers) > COLUMNS * MAX_BOXES:
            raise InputError(
                f"labels must have at most {MAX_PAGES} pages and {MAX_BOXES} boxes. Received: more, up to "
                f"{page.where}. Split them into several datasets"
            )
    table, starts = np.frombuffer(numbers, np.int32).reshape(-1, COLUMNS), np.cumsum([0, *counts], dtype=np.int64)
    order = sorted(range(len(found)), key=lambda i: found[i].page_id)
    if order != list(range(len(found))):
        table = np.concatenate([table[:0], *(table[starts[i] : starts[i + 1]] for i in order)])
        found, starts = [found[i] for i in order], np.cumsum([0, *(counts[i] for i in order)], dtype=np.int64)
    for previous, current in itertools.pairwise(found):
        if previous.page_id == current.page_id:
            refuse_repeated(previous, current)
    if len(table) == 0:
        where = f" in {found[0].where}" if found else ""
        raise InputError(
            f"at least one page must have a labelled box. Received: {len(found)} pages without boxes{where}"
        )
    return Labels(
        [page.page_id for page in found],
        starts,
        table[:, 0],
        table[:, 1:],
        digest(),
        books={page.page_id: page.book for page in found if page.book is not None},
        page_sizes={page.page_id: page.size for page in found if page.size is not None},
        warnings=[
            (page.page_id, f"{counted(page.widened, 'box', 'boxes')} in fractions of pixels, rounded outwards")
            for page in found
            if page.widened
        ],
    )


def refuse_repeated(previous: PageBoxes, current: PageBoxes) -> None:
    if previous.where == current.where:
        raise InputError(f"{current.where}: an image_id must have one row only. Received: {current.page_id!r} twice")
    raise InputError(
        f"a page must be in one label file only. Received: {current.page_id!r} in {previous.where} and {current.where}"
    )
