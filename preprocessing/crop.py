"""Cut 80 x 80 crops from a page. `prepare` and `predict` both use these functions, so their crops are equal.

A crop is the box in grayscale, with a margin if requested. It is scaled so that its longer side has 80 pixels, keeps
its aspect ratio, and is centred on a black square.
"""

from collections.abc import Sequence
from fractions import Fraction

import cv2
import numpy as np
from numpy.typing import NDArray

from preprocessing.records import SIDE

# Limits of a page file. A page that exceeds them is rejected before memory for its pixels is allocated. Kaggle's scans
# have 9 megapixels.
MAX_PAGE_BYTES = 100_000_000
MAX_PAGE_PIXELS = 100_000_000
# A JPEG whose pixels are all in one sequential scan is decoded row by row; see `jpeg.py`.
MAX_SEQUENTIAL_PIXELS = 250_000_000
# In a JPEG with several scans, each one can take as long to decode as the whole page, even if it has only a few bytes.
# Encoders write about ten scans.
MAX_PAGE_SCANS = 100

# A crop holds ink if its grey levels, without the black border, have at least this standard deviation. Measured on 107
# real pages of 7 books (3,543 boxes): the lowest is 11.2. With all boxes at half their size and position, 43 % of the
# crops are below 8, and over 5 % of the crops on every page; at a third: 62 %; at 1.25 times: 17 %, over 5 % on 85 % of
# the pages; at twice: 13 %, where three quarters of the boxes are off their page.
LEAST_CONTRAST = 8.0


# Faults that are known before the page is read.
NO_FILE = "page has no file"
NO_AREA = "box of no area"


class PageFault(Exception):  # noqa: N818 - reported as a loss, not as an error
    """A page or box that can't be cut. The message becomes the reason in the list of losses."""


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


def widened(box: Sequence[int], margin: float) -> tuple[int, int, int, int]:
    """Widen a box by `margin` of its longer side on each side, rounded down to whole pixels.

    box: x, y, width, height in pixels.
    """
    x, y, width, height = box
    by = int(Fraction(str(margin)) * max(width, height))  # 0.29 * 100 is less than 29
    return x - by, y - by, width + 2 * by, height + 2 * by


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
    new_width, new_height = _scaled(width, height)
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


def has_ink(square: NDArray[np.uint8], box: Sequence[int]) -> bool:
    """Return whether a crop has the contrast of writing, see `LEAST_CONTRAST`.

    Args:
        square: (80, 80) uint8, as returned by `crop`.
        box: the box that it was cut from.
    """
    width, height = _scaled(box[2], box[3])
    left, top = (SIDE - width) // 2, (SIDE - height) // 2
    _, deviation = cv2.meanStdDev(square[top : top + height, left : left + width])
    return bool(deviation[0, 0] >= LEAST_CONTRAST)


def _scaled(width: int, height: int) -> tuple[int, int]:
    """Return width and height of a box after scaling to its crop."""
    # Integer division as in the study. With floats, a side of 77 pixels would scale to 79 instead of 80.
    longer = max(width, height)
    return max(1, width * SIDE // longer), max(1, height * SIDE // longer)
