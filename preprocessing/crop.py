"""From a page's bytes to 80 x 80 crops: the one place where pixels are cut, for training and for reading new pages.

The box in grayscale, its aspect ratio kept, its longer side scaled to 80 pixels, in the middle of a black square.
"""

from collections.abc import Sequence

import cv2
import numpy as np
import simplejpeg
from numpy.typing import NDArray

from preprocessing.records import SIDE

# The scans have 9 megapixels. A page past these bounds is refused from its header, before memory is taken for it.
# Within them a task takes 300 MB of memory, and of progressive pages 500 in gray, 900 in three colours, 1400 in four.
MAX_PAGE_PIXELS = 100_000_000
MAX_PAGE_BYTES = 100_000_000
# A scan of a progressive page may cost a few bytes and yet as much time as the page; encoders write about ten.
MAX_PAGE_SCANS = 100
SCAN = b"\xff\xda"  # the marker that stands before each scan, and within none
SEQUENTIAL = (b"\xff\xc0", b"\xff\xc1")  # markers that say how all that follows is coded
# Tables, restarts, applications' own, comments.
BEFORE_CODING = {bytes([0xFF, marker]) for marker in (0xC4, 0xDB, 0xDD, *range(0xE0, 0xF0), 0xFE)}


class PageFault(Exception):  # noqa: N818 - a loss to be listed, not an error
    """A page or box that can't be cut; the text says why, for the list of losses."""


def decode_page(data: bytes) -> NDArray[np.uint8]:
    """(height, width) uint8 grayscale of a JPEG file.

    Raises:
        PageFault: not a JPEG, cut off, corrupt, or too large.
    """
    if len(data) > MAX_PAGE_BYTES:
        raise PageFault(f"page file over {MAX_PAGE_BYTES} bytes")
    if not data.startswith(b"\xff\xd8"):
        raise PageFault("page is not a JPEG file")
    try:
        height, width, _, _ = simplejpeg.decode_jpeg_header(data, strict=True)
        if height * width > MAX_PAGE_PIXELS:
            raise PageFault(f"page of {width} x {height} pixels is over {MAX_PAGE_PIXELS} pixels")
        if not _is_sequential(data) and (scans := data.count(SCAN)) > MAX_PAGE_SCANS:
            raise PageFault(f"page of {scans} scans is over {MAX_PAGE_SCANS} scans")
        # Crops differ by .3 grey levels from those of the exact transform; pages saved at a quality of 95 on, by .7.
        page: NDArray[np.uint8] = simplejpeg.decode_jpeg(data, colorspace="GRAY", fastdct=True, strict=True)[:, :, 0]
    except ValueError as error:
        raise PageFault(f"page can't be decoded: {error}") from None
    return page


def _is_sequential(data: bytes) -> bool:
    """Whether a JPEG file is surely not progressive. Only its first segments are looked at, not all of its bytes."""
    at = 2
    while data[at : at + 2] in BEFORE_CODING:
        at += 2 + int.from_bytes(data[at + 2 : at + 4])
    return data[at : at + 2] in SEQUENTIAL


def clip_box(box: Sequence[int], page_shape: tuple[int, int]) -> tuple[int, int, int, int]:
    """The part of a box (x, y, width, height) that is on a page of (height, width).

    Raises:
        PageFault: the box has no area, or none of it is on the page.
    """
    x, y, width, height = box
    if width <= 0 or height <= 0:
        raise PageFault("box of no area")
    left, top = max(x, 0), max(y, 0)
    right, bottom = min(x + width, page_shape[1]), min(y + height, page_shape[0])
    if left >= right or top >= bottom:
        raise PageFault(f"box is off its page of {page_shape[1]} x {page_shape[0]} pixels")
    return left, top, right - left, bottom - top


def crop(page: NDArray[np.uint8], box: Sequence[int]) -> NDArray[np.uint8]:
    """(80, 80) uint8 of a box (x, y, width, height) that is wholly on a (height, width) uint8 page.

    Resized to twice the size, of which each 2 x 2 pixels are averaged: it differs from the study's Lanczos by 1.0 grey
    levels on average (INTER_AREA alone by 1.1), and takes two thirds of INTER_AREA's time.
    """
    x, y, width, height = box
    longer = max(width, height)
    # Integer division as in the study: floats give 79 for 77.
    new_width, new_height = max(1, width * SIDE // longer), max(1, height * SIDE // longer)
    # Linear reads two neighbours only: the more it shrinks, the more pixels it leaves out.
    shrink = cv2.INTER_LINEAR if longer <= 4 * SIDE else cv2.INTER_AREA
    how = cv2.INTER_CUBIC if longer <= 2 * SIDE else shrink
    twice = cv2.resize(page[y : y + height, x : x + width], (2 * new_width, 2 * new_height), interpolation=how)
    square = np.zeros((SIDE, SIDE), np.uint8)
    left, top = (SIDE - new_width) // 2, (SIDE - new_height) // 2
    middle = square[top : top + new_height, left : left + new_width]
    cv2.resize(twice, (new_width, new_height), middle, interpolation=cv2.INTER_AREA)
    return square
