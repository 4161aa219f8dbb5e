"""Compose drawn pages: random characters in columns, with the frequencies of real books, or a given layout.

All pages of a book have the same handwriting (`Hand`); each volume in the ids of a layout counts as a book. A page
depends only on the seed, its id, its layout, the scale and the fonts.
"""

import itertools
import zlib
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from cluster.errors import InputError, OptionError
from preprocessing.books import volume_of
from preprocessing.crop import MAX_PAGE_PIXELS
from preprocessing.fonts import Font
from preprocessing.labels.kaggle import parse_rows
from preprocessing.sample.hand import Box, Hand, Ink, Tones, draw_glyph, fit, join, new_hand, scan

PAGE_WIDTH, PAGE_HEIGHT = 2400, 3900  # px at full size
PAGES_PER_BOOK = 4
INVENTORY = 4212  # number of distinct characters in the competition's data
# Zipf-Mandelbrot law: the frequency of the character with rank k is proportional to 1 / (k + SHIFT) ** EXPONENT. This
# matches the competition's frequencies within a few percent: 3.6 % for the first character, 0.018 % for the 513th.
SHIFT, EXPONENT = 14.7, 1.5
CROWDING = 1.75  # area per character, with the space around it, in square ems; found by trial
MAX_SIDE = 65_500  # px; libjpeg writes no more
MARGIN = 60  # px at full size between the boxes of a layout and the right and lower edges of its page

# Ordered by their approximate frequency in books of the time. The other hiragana, katakana and kanji follow in the
# order of the JIS table, whose first level has the common kanji.
KANA = "にのしてりをはともなかるらいたへまきれさふつんがうすあやおこよひけばせそゝめだでどみねアわち〱ろずべじほぬゆむ"
KANJI = (
    "一人事見出入大子三二日上中下小十山水手心女五今立名本生月年天気千正王先男目四八六七九百石田町花草村"
    "林森川土金木火空雨夕早白赤青右左口耳足力文字学校糸虫貝犬車玉音円竹休森"
)

Glyph = tuple[int, Box]  # code point, box


@dataclass(frozen=True)
class Page:
    """A page to draw."""

    image_id: str
    layout: tuple[Glyph, ...] | None
    """Boxes in px at full size; None: characters and boxes are random."""


@cache
def inventory() -> tuple[int, ...]:
    """Return the 4,212 code points to draw, from the most to the least frequent."""
    table = [bytes([row, cell]).decode("euc_jp", "ignore") for row in range(0xA1, 0xF5) for cell in range(0xA1, 0xFF)]
    hiragana = [c for c in table if "ぁ" <= c <= "ん"]
    katakana = [c for c in table if "ァ" <= c <= "ヴ"]
    kanji = [c for c in table if "一" <= c <= "龥"]
    order = dict.fromkeys((*KANA, *KANJI[:20], *hiragana, *KANJI, *"ヽ々・○「」", *katakana, *kanji))
    return tuple(ord(c) for c in list(order)[:INVENTORY])


def new_pages(num_pages: int, seed: int) -> list[Page]:
    """Return pages with new ids, about four per book. `100241706_00004_2` is the left half of opening 4 of its book."""
    rng = np.random.default_rng([seed, 0])
    books = max(1, round(num_pages / PAGES_PER_BOOK))
    starts = np.sort(100_000_000 + rng.choice(900_000_000, books, replace=False))
    pages = []
    for start, members in zip(starts.tolist(), np.array_split(np.arange(num_pages), books), strict=True):
        opening = int(rng.integers(3, 30))
        for half in range(len(members)):
            pages.append(Page(f"{start}_{opening + half // 2:05d}_{half % 2 + 1}", None))
    return pages


def read_layouts(layouts: Path, num_pages: int) -> list[Page]:
    """Return the first `num_pages` rows of a label file, in the order of the file.

    Raises:
        OptionError: the file has fewer rows.
        InputError: the file can't be read or is not in Kaggle's format, an id is repeated, a box has no area or a
            negative coordinate, or a page would be too large.
    """
    try:
        rows = list(itertools.islice(parse_rows(layouts.read_bytes(), str(layouts)), num_pages))
    except OSError as error:
        raise InputError(f"--layouts must be a readable file. Received: {layouts} ({error})") from error
    if len(rows) < num_pages:
        raise OptionError(f"--num-pages must be at most {len(rows)}, the rows of {layouts}. Received: {num_pages}")
    pages = [Page(page_id, tuple((row[0], (*row[1:],)) for row in table.tolist())) for page_id, table in rows]
    for page in pages:
        if any(min(x, y, width - 1, height - 1) < 0 for _, (x, y, width, height) in page.layout or ()):
            raise InputError(
                f"a box must have an area and no negative coordinate. Received: others in {page.image_id} of {layouts}"
            )
        width, height = _page_size(page.layout or (), 1.0)
        if max(width, height) > MAX_SIDE or width * height > MAX_PAGE_PIXELS:
            raise InputError(
                f"a page of --layouts must have at most {MAX_SIDE} pixels on a side and {MAX_PAGE_PIXELS} in all. "
                f"Received: {page.image_id} of {layouts}, whose boxes need {width} x {height}. Divide the page"
            )
    repeated = [image_id for image_id, count in Counter(page.image_id for page in pages).items() if count > 1]
    if repeated:
        raise InputError(f"an image_id must have one row only. Received: {repeated[0]} more than once in {layouts}")
    return pages


def draw_page(page: Page, seed: int, scale: float, fonts: tuple[Font, ...]) -> tuple[Image.Image, list[Glyph]]:
    """Draw a page. Return its picture, and its characters with their boxes in px of the picture."""
    rng = np.random.default_rng([seed, 2, zlib.crc32(page.image_id.encode())])
    hand = hand_of(volume_of(page.image_id), seed, fonts)
    if page.layout is None:
        ink, glyphs = _compose(hand, rng, scale)
    else:
        ink, glyphs = _trace(page.layout, hand, rng, scale)
    return scan(ink, hand, rng, _bounding_box(glyphs)), glyphs


def hand_of(book: str, seed: int, fonts: tuple[Font, ...]) -> Hand:
    """Return the hand of a book, which depends only on the book, the seed and the fonts."""
    return new_hand(np.random.default_rng([seed, 1, zlib.crc32(book.encode())]), fonts)


@cache
def _cumulative() -> NDArray[np.float64]:
    """Return (4212,) float64: for each rank, the probability that a character has at most this rank."""
    weights = (np.arange(1, len(inventory()) + 1) + SHIFT) ** -EXPONENT
    cumulative: NDArray[np.float64] = np.cumsum(weights) / weights.sum()
    return cumulative


def _compose(hand: Hand, rng: np.random.Generator, scale: float) -> tuple[Tones, list[Glyph]]:
    """Draw a page of random characters. Columns run from right to left, each from top to bottom.

    Returns:
        The ink, (height, width) uint8, and the characters with their boxes, sorted by height, width, y and x.
    """
    width, height = (max(1, round(scale * (full + rng.integers(-30, 31)))) for full in (PAGE_WIDTH, PAGE_HEIGHT))
    ink = np.zeros((height, width), np.uint8)
    left, right, top, bottom = (round(r * s) for r, s in ((0.1, width), (0.9, width), (0.16, height), (0.92, height)))
    em = max(1.0, ((right - left) * (bottom - top) / (hand.characters * CROWDING)) ** 0.5)
    columns = max(1, round((right - left) / (1.75 * em)))
    glyphs: list[Glyph] = []
    for column in range(columns):
        centre = right - (column + 0.5) * (right - left) / columns
        y, joint = top + abs(rng.normal(0, 0.3)) * em, None
        while True:
            code_point = inventory()[int(np.searchsorted(_cumulative(), rng.random()))]
            glyph = draw_glyph(code_point, hand, rng, em)
            if y + glyph.shape[0] > bottom:
                break
            x = centre + rng.normal(0, 0.06) * em - glyph.shape[1] / 2
            box = _put(ink, glyph, round(x), round(y))
            glyphs.append((code_point, _padded(box, rng, scale, ink.shape)))
            middle = box[0] + box[2] * rng.uniform(0.35, 0.65)
            if joint and rng.random() < hand.joined:
                join(ink, joint, (middle, box[1] + 0.1 * box[3]), em, rng)
            joint = (middle, box[1] + 0.9 * box[3])
            y += glyph.shape[0] + em * max(0.02, rng.normal(0.25, 0.1))
    return ink, sorted(glyphs, key=lambda glyph: (glyph[1][3], glyph[1][2], glyph[1][1], glyph[1][0]))


def _trace(layout: tuple[Glyph, ...], hand: Hand, rng: np.random.Generator, scale: float) -> tuple[Tones, list[Glyph]]:
    """Draw the characters of a layout into its boxes, scaled. The page is larger than usual if the boxes need it.

    Returns:
        The ink, (height, width) uint8, and the characters with their scaled boxes, in the order of the layout.
    """
    glyphs = [(code_point, _scaled(box, scale)) for code_point, box in layout]
    width, height = _page_size(glyphs, scale)
    ink = np.zeros((height, width), np.uint8)
    for code_point, (x, y, w, h) in glyphs:
        _put(ink, fit(draw_glyph(code_point, hand, rng, max(w, h)), w, h), x, y)
    return ink, glyphs


def _page_size(glyphs: Sequence[Glyph], scale: float) -> tuple[int, int]:
    """Return width and height in px of the page for a layout whose boxes are scaled already."""
    width = max([1, round(scale * PAGE_WIDTH), *(x + w + round(scale * MARGIN) for _, (x, _, w, _) in glyphs)])
    height = max([1, round(scale * PAGE_HEIGHT), *(y + h + round(scale * MARGIN) for _, (_, y, _, h) in glyphs)])
    return width, height


def _scaled(box: Box, scale: float) -> Box:
    x, y, width, height = box
    return round(x * scale), round(y * scale), max(1, round(width * scale)), max(1, round(height * scale))


def _put(ink: Tones, glyph: Ink, x: int, y: int) -> Box:
    """Add a glyph to the page's ink, in place, and return its box. The glyph is moved into the page if necessary."""
    height, width = glyph.shape
    x, y = max(0, min(x, ink.shape[1] - width)), max(0, min(y, ink.shape[0] - height))
    region = ink[y : y + height, x : x + width]
    np.maximum(region, (glyph * 255).astype(np.uint8), out=region)
    return x, y, width, height


def _padded(box: Box, rng: np.random.Generator, scale: float, shape: tuple[int, ...]) -> Box:
    """Enlarge a box by up to 3 px (at full size) per side, as annotators do, within a page of shape (height, width)."""
    x, y, width, height = box
    padding = np.round(rng.uniform(0, 3, 4) * scale).astype(int).tolist()
    left, top = max(0, x - padding[0]), max(0, y - padding[1])
    right, bottom = min(shape[1], x + width + padding[2]), min(shape[0], y + height + padding[3])
    return left, top, right - left, bottom - top


def _bounding_box(glyphs: list[Glyph]) -> Box | None:
    """Return the smallest box that contains the boxes of all glyphs; None if there are no glyphs."""
    if not glyphs:
        return None
    boxes = np.array([box for _, box in glyphs])
    left, top = boxes[:, :2].min(0).tolist()
    right, bottom = (boxes[:, :2] + boxes[:, 2:]).max(0).tolist()
    return left, top, right - left, bottom - top
