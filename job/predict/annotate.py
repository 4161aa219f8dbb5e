"""A page beside what was read on it, for the eye."""

import io
from collections.abc import Sequence
from functools import lru_cache

import cv2
import numpy as np
import simplejpeg
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

from job.colours import BLACK, ORANGE, VERMILLION
from preprocessing.crop import clip_box
from preprocessing.fonts import coverage, packaged_font
from preprocessing.labels import code_point_name

MOST_PIXELS = 2400  # of the longer side of the page
SURE = 0.5  # at least so probable
LEGEND = "black: at least 50 % sure; orange: less; red: wrong; 〓: a rare character, beside it what else it may be"


def annotated(
    data: bytes,
    boxes: NDArray[np.int64],
    readings: Sequence[Sequence[str]],
    probabilities: NDArray[np.float32],
    wrong: NDArray[np.bool_],
) -> bytes:
    """A JPEG: the page with its boxes, and to its right the characters where they stand.

    data: the page's JPEG file, which was read before. boxes: (n, 4) x, y, width, height. readings: of each box the
    best character first, then what it may be else, shown where there is more than one. wrong: (n,) what is known to be
    another character.
    """
    page: NDArray[np.uint8] = simplejpeg.decode_jpeg(data, colorspace="RGB")
    ratio = min(1.0, MOST_PIXELS / max(page.shape[:2]))
    height, width = (max(1, round(side * ratio)) for side in page.shape[:2])
    small = cv2.resize(page, (width, height), interpolation=cv2.INTER_AREA)
    size = max(12, height // 80)
    sheet = Image.new("RGB", (2 * width, height + 2 * size), (255, 255, 255))
    sheet.paste(Image.fromarray(small), (0, 0))
    draw = ImageDraw.Draw(sheet)
    for box, shown, probability, is_wrong in zip(boxes.tolist(), readings, probabilities, wrong, strict=True):
        colour = VERMILLION if is_wrong else BLACK if probability >= SURE else ORANGE
        x, y, w, h = (ratio * side for side in clip_box(box, page.shape[:2]))
        draw.rectangle((x, y, x + w, y + h), outline=colour, width=2)
        middle = (width + x + w / 2, y + h / 2)
        best, *others = map(_legible, shown)
        draw.text(middle, best, colour, _font(_fitting(w, h) if len(best) == 1 else size), anchor="mm")
        for i, other in enumerate(others):
            third = max(8, _fitting(w, h) // 3)
            draw.text((width + x + w, y + i * third), other, colour, _font(third), anchor="lt")
    draw.text((size, height + size), LEGEND, BLACK, _font(size), anchor="lm")
    encoded = io.BytesIO()
    sheet.save(encoded, "JPEG", quality=90)
    return encoded.getvalue()


def _legible(character: str) -> str:
    """The character, or its code point where the font has no shape for it."""
    return character if ord(character) in coverage(packaged_font()) else code_point_name(ord(character))


def _fitting(width: float, height: float) -> int:
    """Of a font, in pixels, for a character in a box."""
    return max(8, min(200, round(0.8 * max(width, height))))


@lru_cache(maxsize=256)
def _font(size: int) -> ImageFont.FreeTypeFont:
    return ImageFont.truetype(packaged_font().path, size)
