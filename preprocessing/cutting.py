"""Cut the pages of a group into crops, for `prepare` and for `predict`."""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from fractions import Fraction

import cv2
import numpy as np
from numpy.typing import NDArray
from upath import UPath

from cluster.errors import InputError
from preprocessing.crop import NO_FILE, PageFault, clip_box, crop, has_ink, widened
from preprocessing.groups import Group, Page
from preprocessing.labels.table import WHOLE_FILE
from preprocessing.page_results import PageResult
from preprocessing.pages import ReadPage, page_reader
from preprocessing.scan import Scan, decode_scan
from preprocessing.tries import END

MAX_STRETCH = 1.02  # largest change of a box's aspect ratio by --rescale: sizes in labels are rounded


@dataclass(frozen=True)
class Cut:
    """Result for one box: a crop, or the reason why there is none."""

    page_id: str
    box: list[int]
    """x, y, width, height, as in the labels."""
    crop: NDArray[np.uint8] | None
    """(80, 80) uint8; None if the box was lost."""
    clipped: bool = False
    """Whether the box is partly off its page. The crop shows the part that is on the page."""
    fault: str = ""
    """Reason why there is no crop; empty if there is one."""
    page: PageResult | None = None
    """Results of the page; None if it was not decoded. Complete after the last box of the page."""
    placed: list[int] = field(default_factory=list)
    """The box on the upright scan, which differs from `box` if it was scaled. Empty if the box was lost."""


def cut_boxes(
    group: Group,
    pages: UPath,
    begin: Callable[[str], None] = lambda _: None,
    keep: Callable[[str, Scan], None] = lambda *_: None,
) -> Iterator[Cut]:
    """Yield one `Cut` for each box of a group, in the order of `group.boxes`.

    Each page with boxes is read once. From a bucket, pages are read ahead while earlier ones are cut.

    Args:
        group: the pages and boxes.
        pages: folder or archive of the pages.
        begin: called with the id of each page before it is decoded, and with `tries.END` after the last one.
        keep: called with the id and the scan of each page that was decoded, before its boxes are cut.

    Raises:
        InputError: a page file was removed or changed after the pages were listed; or boxes were made for a scan of
            another shape, or of another size without `group.rescale`.
    """
    cv2.setNumThreads(1)  # Ray runs one task per core
    start, boxes = 0, group.boxes
    expected = [(page.file_name, page.file_bytes) for page in group.pages if page.boxes and page.file_name]
    with page_reader(pages, expected=expected) as read:
        for page in group.pages:
            if not page.boxes:
                continue
            begin(page.id)
            scan = _read_page(read, page)
            cutter = None
            if isinstance(scan, Scan):
                cutter = _Cutter(page, scan, group)
                keep(page.id, scan)
            for box in boxes[start : start + page.boxes].tolist():
                if box == list(WHOLE_FILE):  # the size of a file that can't be read is unknown
                    box = [0, 0, 0, 0] if isinstance(scan, PageFault) else [0, 0, *scan.image.shape[::-1]]
                yield cutter.cut(box) if cutter else Cut(page.id, box, None, fault=str(scan))
            start += page.boxes
            del scan, cutter  # free the memory before the next page is decoded
        begin(END)


class _Cutter:
    """Cuts the boxes of a page."""

    def __init__(self, page: Page, scan: Scan, group: Group) -> None:
        """Raises: InputError: as `cut_boxes`."""
        self.image, self.margin = scan.image, group.margin
        height, width = scan.image.shape
        self.scale = _scale_of(page, width, height, group.rescale)
        self.result: PageResult = {
            "page": page.id, "width": width, "height": height, "orientation": scan.orientation, "crops": 0,
            "without_ink": 0, "warnings": scan.warnings,
        }  # fmt: skip

    def cut(self, box: list[int]) -> Cut:
        placed = box if self.scale is None else scaled(box, *self.scale)
        try:
            clipped_box = clip_box(placed, self.image.shape)
        except PageFault as fault:
            return Cut(self.result["page"], box, None, fault=str(fault), page=self.result)
        with_margin = clip_box(widened(placed, self.margin), self.image.shape)
        square = crop(self.image, with_margin)
        self.result["crops"] += 1
        # Check the box without its margin, which has ink of neighbours even if the boxes miss all characters.
        own = square if with_margin == clipped_box else crop(self.image, clipped_box)
        self.result["without_ink"] += not has_ink(own, clipped_box)
        return Cut(self.result["page"], box, square, list(clipped_box) != placed, page=self.result, placed=placed)


def scaled(box: Sequence[int], across: Fraction, down: Fraction) -> list[int]:
    """Scale a box. Left and top edges are rounded down, right and bottom edges up. A box without area stays so.

    Args:
        box: x, y, width, height.
        across: factor of x and width.
        down: factor of y and height.
    """
    x, y, width, height = box
    left, top = math.floor(x * across), math.floor(y * down)
    return [
        left,
        top,
        math.ceil((x + width) * across) - left if width > 0 else width,
        math.ceil((y + height) * down) - top if height > 0 else height,
    ]


def _scale_of(page: Page, width: int, height: int, rescale: bool) -> tuple[Fraction, Fraction] | None:
    """Return the factors from the boxes of a page to its scan; None if the boxes were made for this size.

    Raises:
        InputError: the boxes were made for a scan of another shape, or of another size without `rescale`.
    """
    if page.made_for in ((0, 0), (width, height)):
        return None
    # Fractions, because 750 * (482 / 750) is more than 482.
    across, down = Fraction(width, page.made_for[0]), Fraction(height, page.made_for[1])
    received = f"Received: boxes for {page.made_for[0]} x {page.made_for[1]} pixels, and {page.file_name} of "
    received += f"{width} x {height}"
    if not 1 / MAX_STRETCH <= across / down <= MAX_STRETCH:
        raise InputError(
            f"boxes must be made for a scan of the same shape. {received}. Fix the label file or the scan. "
            "See docs/data.md#boxes-for-another-size-of-the-scan"
        )
    if not rescale:
        raise InputError(
            f"boxes must be made for the size of their scan. {received}. Give --rescale and a new folder to "
            "scale the boxes, or give the scans that they were made for. "
            "See docs/data.md#boxes-for-another-size-of-the-scan"
        )
    return across, down


def _read_page(read: ReadPage, page: Page) -> "Scan | PageFault":
    """Return a page, or the fault that makes all its boxes losses.

    Raises:
        InputError: the page file was removed or changed after the pages were listed.
    """
    try:
        if not page.file_name:
            raise PageFault(NO_FILE)
        data = read(page.file_name)
        if len(data) != page.file_bytes:
            raise FileNotFoundError(f"{page.file_name} with {len(data)} bytes instead of {page.file_bytes}")
        return decode_scan(data)
    except PageFault as fault:
        return fault
    except FileNotFoundError as error:
        raise InputError(
            "--pages must stay unchanged while they are cut, and be the same place for all workers. "
            f"Received: {' '.join(str(error).split())}. Run the same command again"
        ) from error
