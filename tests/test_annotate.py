"""Pictures of predictions: where a box is drawn, in which colour, and what stands next to the page."""

import io

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageColor

from job.colours import BLACK, BLUE, GRAY, VERMILLION
from job.predict.annotate import LONGER_SIDE, annotated, small_page
from preprocessing.fonts import coverage, packaged_font

BOXES = np.array([[40, 60, 200, 160], [40, 300, 200, 160], [40, 540, 200, 160]])
WHITE_PAGE = np.full((800, 600), 255, np.uint8)


def drawn(
    page: NDArray[np.uint8],
    boxes: NDArray[np.int64],
    readings: list[str],
    probabilities: list[float],
    wrong: list[bool],
) -> Image.Image:
    """Return the decoded picture of a page. readings: the candidates of each box, one character each."""
    given = np.array(probabilities, np.float32), np.array(wrong)
    return Image.open(io.BytesIO(annotated(small_page(page), boxes, readings, *given)))


def ink(picture: Image.Image, box: tuple[int, int, int, int]) -> tuple[float, str]:
    """Return how much of a box (x, y, width, height) is inked, from 0 to 1 for black, and the colour of its ink."""
    x, y, width, height = box
    missing = 255 - np.asarray(picture.crop((x, y, x + width, y + height)), float).mean(axis=(0, 1))
    full = {colour: 255 - np.array(ImageColor.getrgb(colour), float) for colour in (BLACK, BLUE, VERMILLION)}
    nearest = max(full, key=lambda colour: missing @ full[colour] / np.linalg.norm(full[colour]))
    return float(missing.max() / 255), nearest


def test_each_box_and_its_character_have_the_colour_of_the_prediction() -> None:
    picture = drawn(WHITE_PAGE, BOXES, ["の", "の", "の"], [0.5, 0.49, 0.9], [False, False, True])
    assert picture.size[0] == 2 * 600
    for (x, y, w, h), colour in zip(BOXES.tolist(), (BLACK, BLUE, VERMILLION), strict=True):
        for edge in ((x, y, w, 2), (x, y + h - 1, w, 2), (x, y, 2, h), (x + w - 1, y, 2, h)):
            share, found = ink(picture, edge)
            assert share > 0.6
            assert found == colour
        assert ink(picture, (x + 8, y + 8, w - 16, h - 16))[0] < 0.01
        share, found = ink(picture, (600 + x, y, w, h))
        assert share > 0.05
        assert found == colour


def test_other_candidates_are_small_and_gray_and_a_character_without_a_glyph_is_its_code_point() -> None:
    missing = next(chr(code) for code in range(0x20000, 0x2A6E0) if code not in coverage(packaged_font()))
    alone, more = (
        drawn(WHITE_PAGE, BOXES[:2], [readings, missing], [0.9, 0.9], [False, False]) for readings in ("の", "のしに")
    )
    beside = (600 + 240, 60, 80, 160)
    assert ink(alone, beside)[0] == 0
    darkest = np.asarray(more.crop((beside[0], 60, beside[0] + 80, 220)), int).min(axis=(0, 1))
    assert np.abs(darkest - ImageColor.getrgb(GRAY)).max() < 60
    x, y, width, height = BOXES[1].tolist()
    rows, columns = np.nonzero(np.asarray(alone.convert("L").crop((600, y, 1200, y + height))) < 128)
    assert len(set(rows.tolist())) < 20  # a line of small letters
    assert len(set(columns.tolist())) > 30
    assert abs(columns.mean() - (x + width / 2)) < 10


def test_a_large_page_is_scaled_down_with_its_boxes() -> None:
    page = np.full((2 * LONGER_SIDE, LONGER_SIDE), 255, np.uint8)
    picture = drawn(page, 4 * BOXES[:1], ["の"], [0.9], [False])
    x, y, width, height = (2 * BOXES[0]).tolist()
    assert picture.size[0] == LONGER_SIDE
    assert ink(picture, (x, y, width, 2))[0] > 0.6
    assert ink(picture, (LONGER_SIDE // 2 + x, y, width, height))[0] > 0.05
