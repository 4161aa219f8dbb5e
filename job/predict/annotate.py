"""Pictures for checking predictions by eye: a page, and next to it the predicted characters."""

import io
from collections.abc import Sequence
from functools import lru_cache
from typing import NamedTuple

import cv2
import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

from job.colours import BLACK, BLUE, GRAY, VERMILLION
from preprocessing.crop import clip_box
from preprocessing.fonts import coverage, packaged_font
from preprocessing.labels.code_points import code_point_name

LONGER_SIDE = 2400  # pixels of the page, at most
CONFIDENT = 0.5  # minimum probability
LEGEND = "black: probability at least 50 %; blue: less; orange: wrong; 〓: rare or uncertain; gray: the best characters"


class SmallPage(NamedTuple):
    """A page that waits for its predictions. It is scaled down, because several pages may wait."""

    image: NDArray[np.uint8]
    """(height, width), grayscale, upright; the longer side has at most `LONGER_SIDE`."""
    shape: tuple[int, int]
    """Height and width of the page itself."""


def small_page(page: NDArray[np.uint8]) -> SmallPage:
    """Scale a page down for a picture. page: (height, width) uint8, upright."""
    height, width = page.shape
    ratio = min(1.0, LONGER_SIDE / max(height, width))
    size = max(1, round(width * ratio)), max(1, round(height * ratio))
    return SmallPage(cv2.resize(page, size, interpolation=cv2.INTER_AREA), (height, width))


def annotated(
    small: SmallPage,
    boxes: NDArray[np.int64],
    readings: Sequence[Sequence[str]],
    probabilities: NDArray[np.float32],
    wrong: NDArray[np.bool_],
) -> bytes:
    """Draw a JPEG: on the left the page with its boxes, on the right the predicted characters at the same positions.

    Args:
        small: the page.
        boxes: (n, 4) x, y, width, height, on the upright page.
        readings: n lists, the best character first; the others are drawn small next to it.
        probabilities: (n,) of the best character.
        wrong: (n,) True if the labels have another character.
    """
    ratio = min(1.0, LONGER_SIDE / max(small.shape))
    height, width = small.image.shape
    size = max(12, height // 80)
    sheet = Image.new("RGB", (2 * width, height + 2 * size), (255, 255, 255))
    sheet.paste(Image.fromarray(small.image), (0, 0))
    draw = ImageDraw.Draw(sheet)
    for box, shown, probability, is_wrong in zip(boxes.tolist(), readings, probabilities, wrong, strict=True):
        colour = VERMILLION if is_wrong else BLACK if probability >= CONFIDENT else BLUE
        x, y, w, h = (ratio * side for side in clip_box(box, small.shape))
        draw.rectangle((x, y, x + w, y + h), outline=colour, width=2)
        middle = (width + x + w / 2, y + h / 2)
        best, *others = map(_legible, shown)
        draw.text(middle, best, colour, _font(_font_size(w, h) if len(best) == 1 else size), anchor="mm")
        for i, other in enumerate(others):
            third = max(8, _font_size(w, h) // 3)
            draw.text((width + x + w, y + i * third), other, GRAY, _font(third), anchor="lt")
    draw.text((size, height + size), LEGEND, BLACK, _font(size), anchor="lm")
    encoded = io.BytesIO()
    sheet.save(encoded, "JPEG", quality=90)
    return encoded.getvalue()


def _legible(character: str) -> str:
    """Return the character, or its code point (U+XXXX) if the font has no glyph for it."""
    return character if ord(character) in coverage(packaged_font()) else code_point_name(ord(character))


def _font_size(width: float, height: float) -> int:
    """Return the font size in pixels for a character in a box."""
    return max(8, min(200, round(0.8 * max(width, height))))


@lru_cache(maxsize=256)
def _font(size: int) -> ImageFont.FreeTypeFont:
    return ImageFont.truetype(packaged_font().path, size)
