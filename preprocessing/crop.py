"""Decode pages and cut 80 x 80 crops. `prepare` and `predict` both use these functions, so their crops are equal.

A crop is the box in grayscale, scaled with its aspect ratio so that the longer side has 80 pixels, and centred on a
black square.
"""

from collections.abc import Sequence

import cv2
import numpy as np
import simplejpeg
from numpy.typing import NDArray

from preprocessing.records import SIDE

# Kaggle's scans have 9 megapixels. A page that exceeds these limits is rejected before it is decoded, so that no memory
# is allocated for it. Within the limits, a task uses up to 300 MB of memory; for progressive JPEGs 500 MB with one
# component, 900 MB with three, 1400 MB with four.
MAX_PAGE_PIXELS = 100_000_000
MAX_PAGE_BYTES = 100_000_000
# In a progressive JPEG, each scan can take as long to decode as the whole page, even if it has only a few bytes.
# Encoders write about ten scans.
MAX_PAGE_SCANS = 100
SCAN = b"\xff\xda"  # marker "start of scan"; these two bytes do not occur inside the data of a scan
SEQUENTIAL = (b"\xff\xc0", b"\xff\xc1")  # markers "start of frame" of the sequential (not progressive) codings
# Markers of segments that may precede the frame: tables, restart interval, application data, comments.
BEFORE_FRAME = {bytes([0xFF, marker]) for marker in (0xC4, 0xDB, 0xDD, *range(0xE0, 0xF0), 0xFE)}


# Faults that are known before the page is read.
NO_FILE = "page has no file"
NO_AREA = "box of no area"


class PageFault(Exception):  # noqa: N818 - reported as a loss, not as an error
    """A page or box that can't be cut. The message becomes the reason in the list of losses."""


def decode_page(data: bytes) -> NDArray[np.uint8]:
    """Decode a JPEG file to grayscale, (height, width) uint8.

    Raises:
        PageFault: the data is not a JPEG file, is truncated, corrupt, or exceeds a limit.
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
        # With `fastdct`, crops differ from those of the exact transform by 0.3 grey levels, and by 0.7 for pages saved
        # with a quality of 95 or higher.
        page: NDArray[np.uint8] = simplejpeg.decode_jpeg(data, colorspace="GRAY", fastdct=True, strict=True)[:, :, 0]
    except ValueError as error:
        raise PageFault(f"page can't be decoded: {error}") from error
    return page


def _is_sequential(data: bytes) -> bool:
    """Return whether a JPEG file is certainly not progressive. Reads only the segments before the frame."""
    offset = 2
    while data[offset : offset + 2] in BEFORE_FRAME:
        offset += 2 + int.from_bytes(data[offset + 2 : offset + 4])
    return data[offset : offset + 2] in SEQUENTIAL


def clip_box(box: Sequence[int], page_shape: tuple[int, int]) -> tuple[int, int, int, int]:
    """Clip a box to its page.

    Args:
        box: x, y, width, height in pixels.
        page_shape: height, width in pixels.

    Returns:
        x, y, width, height of the part of the box that is on the page.

    Raises:
        PageFault: the box has no area, or lies completely off the page.
    """
    x, y, width, height = box
    if width <= 0 or height <= 0:
        raise PageFault(NO_AREA)
    left, top = max(x, 0), max(y, 0)
    right, bottom = min(x + width, page_shape[1]), min(y + height, page_shape[0])
    if left >= right or top >= bottom:
        raise PageFault(f"box is off its page of {page_shape[1]} x {page_shape[0]} pixels")
    return left, top, right - left, bottom - top


def crop(page: NDArray[np.uint8], box: Sequence[int]) -> NDArray[np.uint8]:
    """Cut one crop, (80, 80) uint8.

    The box is resized to twice the target size, then each 2 x 2 pixels are averaged. On average the result differs by
    1.0 grey levels from the study's Lanczos (INTER_AREA alone: by 1.1), and takes two thirds of INTER_AREA's time.

    Args:
        page: (height, width) uint8.
        box: x, y, width, height in pixels; completely on the page, see `clip_box`.
    """
    x, y, width, height = box
    longer = max(width, height)
    # Integer division as in the study. With floats, a side of 77 pixels would scale to 79 instead of 80.
    new_width, new_height = max(1, width * SIDE // longer), max(1, height * SIDE // longer)
    # INTER_LINEAR samples two neighbours per axis: the more it shrinks, the more source pixels it skips.
    shrinking = cv2.INTER_LINEAR if longer <= 4 * SIDE else cv2.INTER_AREA
    interpolation = cv2.INTER_CUBIC if longer <= 2 * SIDE else shrinking
    doubled = cv2.resize(
        page[y : y + height, x : x + width], (2 * new_width, 2 * new_height), interpolation=interpolation
    )
    square = np.zeros((SIDE, SIDE), np.uint8)
    left, top = (SIDE - new_width) // 2, (SIDE - new_height) // 2
    middle = square[top : top + new_height, left : left + new_width]
    cv2.resize(doubled, (new_width, new_height), middle, interpolation=cv2.INTER_AREA)  # writes into `square`
    return square
