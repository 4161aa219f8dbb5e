"""Cut the pages of a group into crops, for `prepare` and for `predict`."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import cv2
import numpy as np
from numpy.typing import NDArray
from upath import UPath

from cluster.errors import InputError
from preprocessing.crop import NO_FILE, PageFault, clip_box, crop, decode_page
from preprocessing.labels.table import WHOLE_FILE
from preprocessing.pages import ReadPage, page_reader
from preprocessing.plan import Group, Page
from preprocessing.tries import END


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
    page_shape: tuple[int, ...] | None = None
    """Height and width of the page in pixels; None if it was not decoded."""


def cut_boxes(group: Group, pages: UPath, begin: Callable[[str], None] = lambda _: None) -> Iterator[Cut]:
    """Yield one `Cut` for each box of a group, in the order of `group.boxes`. Each page with boxes is read once.

    Args:
        group: the pages and boxes.
        pages: folder or archive of the pages.
        begin: called with the id of each page before it is read, and with `tries.END` after the last one.

    Raises:
        InputError: a page file was removed or changed after the pages were listed.
    """
    cv2.setNumThreads(1)  # Ray runs one task per core
    start, boxes = 0, group.boxes
    with page_reader(pages) as read:
        for page in group.pages:
            if page.boxes:
                begin(page.id)
            image = _read_page(read, page) if page.boxes else PageFault("page without boxes")
            for box in boxes[start : start + page.boxes].tolist():
                yield _cut(page.id, image, box)
            start += page.boxes
            del image  # free the memory before the next page is decoded
        begin(END)


def _cut(page_id: str, image: "NDArray[np.uint8] | PageFault", box: list[int]) -> Cut:
    if box == list(WHOLE_FILE):  # of a file that can't be read, no size is known
        box = [0, 0, 0, 0] if isinstance(image, PageFault) else [0, 0, image.shape[1], image.shape[0]]
    try:
        if isinstance(image, PageFault):
            raise image
        clipped_box = clip_box(box, image.shape)
    except PageFault as fault:
        shape = None if isinstance(image, PageFault) else image.shape
        return Cut(page_id, box, None, fault=str(fault), page_shape=shape)
    return Cut(page_id, box, crop(image, clipped_box), list(clipped_box) != box, page_shape=image.shape)


def _read_page(read: ReadPage, page: Page) -> "NDArray[np.uint8] | PageFault":
    """Return the image of a page, (height, width) uint8, or the fault that makes all its boxes losses.

    Raises:
        InputError: the page file was removed or changed after the pages were listed.
    """
    try:
        if not page.file_name:
            raise PageFault(NO_FILE)
        data = read(page.file_name)
        if len(data) != page.file_bytes:
            raise FileNotFoundError(f"{page.file_name} with {len(data)} bytes instead of {page.file_bytes}")
        return decode_page(data)
    except PageFault as fault:
        return fault
    except FileNotFoundError as error:
        raise InputError(
            "--pages must stay unchanged while they are cut, and be the same place for all workers. "
            f"Received: {' '.join(str(error).split())}. Run the same command again"
        ) from error
