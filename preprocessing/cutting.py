"""The pages of a group, cut into crops: the same crops to train on and to read."""

from collections.abc import Iterator
from dataclasses import dataclass

import cv2
import numpy as np
from numpy.typing import NDArray
from upath import UPath

from cluster.errors import InputError
from preprocessing.crop import PageFault, clip_box, crop, decode_page
from preprocessing.pages import ReadPage, page_reader
from preprocessing.plan import Group, Page


@dataclass(frozen=True)
class Cut:
    """What became of one box."""

    page_id: str
    box: list[int]
    """x, y, width, height, as in the labels."""
    crop: NDArray[np.uint8] | None
    """(80, 80)."""
    clipped: bool = False
    """Only a part of the box is on the page, and in the crop."""
    fault: str = ""
    """Why there is no crop."""


def cut_boxes(group: Group, pages: UPath) -> Iterator[Cut]:
    """The boxes of a group, in its order. Each page is read once.

    Raises:
        InputError: a page is not the file that was listed.
    """
    cv2.setNumThreads(1)  # Ray runs one task on each core
    start, boxes = 0, group.boxes
    with page_reader(pages) as read:
        for page in group.pages:
            image = _read_page(read, page) if page.boxes else PageFault("page without boxes")
            for box in boxes[start : start + page.boxes].tolist():
                yield _cut(page.id, image, box)
            start += page.boxes
            del image  # before the next page takes as much memory


def _cut(page_id: str, image: "NDArray[np.uint8] | PageFault", box: list[int]) -> Cut:
    try:
        if isinstance(image, PageFault):
            raise image
        on_page = clip_box(box, image.shape)
    except PageFault as fault:
        return Cut(page_id, box, None, fault=str(fault))
    return Cut(page_id, box, crop(image, on_page), clipped=list(on_page) != box)


def _read_page(read: ReadPage, page: Page) -> "NDArray[np.uint8] | PageFault":
    """The image of a page, or the fault of its file for which it can't be cut.

    Raises:
        InputError: it is not the file that was listed.
    """
    try:
        if not page.file_name:
            raise PageFault("page has no file")
        data = read(page.file_name)
        if len(data) != page.file_bytes:
            raise FileNotFoundError(f"{page.file_name} with {len(data)} bytes instead of {page.file_bytes}")
        return decode_page(data)
    except PageFault as fault:
        return fault
    except FileNotFoundError as error:
        raise InputError(
            "--pages must stay as they are while they are cut, and be one place for all workers. "
            f"Received: {' '.join(str(error).split())}. Run the same command again"
        ) from None
