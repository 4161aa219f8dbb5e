"""Draw the characters and the paper of one book, with the parameters of its `Hand`. Used by `sample`.

All randomness comes from numpy generators that the caller seeds: the same seed and fonts give the same pixels. The ink
of a glyph is float32 in 0..1 (1 is full ink). The ink of a page is uint8 (255 is full ink). The tones of a page are
uint8 (0 is ink, 255 would be pure white); the colours of the hand turn them into RGB in the last step.
"""

from dataclasses import dataclass
from functools import cache, lru_cache

import cv2
import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

from preprocessing.fonts import Font, coverage, packaged_font

Ink = NDArray[np.float32]
Tones = NDArray[np.uint8]
Box = tuple[int, int, int, int]  # x, y, width, height in px from the upper left

CANVASES = (48, 96, 192)  # sides in px of the squares that glyphs are drawn on
EM = 0.6  # em as a fraction of the canvas; the rest is space for the distortions
HAIRLINE = 0.7  # minimum coverage after the blur, as a fraction of the coverage before it; see `_written`
BLANK_TONE = 240  # tone of paper without shade and grain
USUAL_TONE = 220  # tone of paper with both
FULL_SIZE = 2400  # page width in px at full size; blur and frame scale with the width


@dataclass(frozen=True)
class Hand:
    """The parameters that the glyphs and pages of one book share. Lengths are fractions of the em unless stated."""

    fonts: tuple[Font, ...]  # the book's font first; the others only draw characters that it lacks
    characters: float  # approximate number per page
    slant: float  # shear; positive leans to the right
    narrow: float  # ratio of height to width, relative to the font's
    wobble: float  # standard deviation of the elastic warp's displacements
    weight: float  # of strokes; positive is bolder; in units of blurred coverage
    pressure: float  # variation of the weight within a glyph, in the same units
    dryness: float  # 0..1: how much ink is missing in dry spots
    joined: float  # probability that a stroke connects a character with the next one
    blur: float  # standard deviation in px at full size
    bleed: float  # 0..1: how strongly the reverse side shows through
    ink: tuple[int, int, int]  # RGB
    paper: tuple[int, int, int]  # RGB
    framed: bool  # a printed frame surrounds the text


def new_hand(rng: np.random.Generator, fonts: tuple[Font, ...]) -> Hand:
    """Return the random hand of a book. The packaged font draws the characters that `fonts` lack.

    Args:
        rng: the generator of the book.
        fonts: at least one; the book's font is chosen from them.
    """
    own = int(rng.integers(len(fonts)))
    grey = rng.uniform(25, 75)
    light = rng.uniform(210, 240)
    yellow = rng.uniform(15, 50)
    return Hand(
        fonts=(fonts[own], *fonts[:own], *fonts[own + 1 :]),
        characters=float(np.clip(rng.lognormal(5.25, 0.25), 90, 360)),
        slant=float(rng.normal(0, 0.05)),
        narrow=float(rng.uniform(1.0, 1.25)),
        wobble=float(rng.uniform(0.015, 0.03)),
        weight=float(rng.uniform(-0.03, 0.12)),
        pressure=float(rng.uniform(0.04, 0.09)),
        dryness=float(rng.uniform(0.1, 0.4)),
        joined=float(rng.uniform(0, 0.35)),
        blur=float(rng.uniform(0.5, 1.2)),
        bleed=float(rng.uniform(0.02, 0.16)),
        ink=(round(grey + 4), round(grey + 2), round(grey - 6)),
        paper=(round(light + 12), round(light), round(light - yellow)),
        framed=bool(rng.random() < 0.5),
    )


def draw_glyph(code_point: int, hand: Hand, rng: np.random.Generator, em: float) -> Ink:
    """Draw one character with random variations, cropped to its ink.

    Args:
        code_point: the character.
        hand: the hand of the book.
        rng: the source of the variations.
        em: the size of the em in px.

    Returns:
        (height, width) float32 in 0..1, both sides at least 1.
    """
    side = next((side for side in CANVASES if side * EM >= em), CANVASES[-1])
    ink = _tight(_written(_warped(_template(code_point, hand.fonts, side), hand, rng), hand, rng))
    ratio = em / (side * EM)
    return fit(ink, max(1, round(ink.shape[1] * ratio)), max(1, round(ink.shape[0] * ratio)))


def fit(ink: Ink, width: int, height: int) -> Ink:
    """Resize ink to (height, width): by area averages if neither side grows, otherwise linearly."""
    shrinks = width <= ink.shape[1] and height <= ink.shape[0]
    resized: Ink = cv2.resize(ink, (width, height), interpolation=cv2.INTER_AREA if shrinks else cv2.INTER_LINEAR)
    return resized


def _warped(template: Tones, hand: Hand, rng: np.random.Generator) -> Tones:
    """Return the template after a random rotation, shear, stretch, scaling and elastic warp about its centre."""
    side = template.shape[0]
    angle = rng.normal(0, 0.035)
    slant = hand.slant + rng.normal(0, 0.03)
    stretch = np.sqrt(hand.narrow) * np.exp(rng.normal(0, 0.08))
    size = np.exp(rng.normal(0, 0.17))
    rotation = np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])
    forward = rotation @ np.array([[1, -slant], [0, 1]]) @ np.diag([size / stretch, size * stretch])
    inverse = np.linalg.inv(forward)
    centred = np.arange(side, dtype=np.float32) - (side - 1) / 2
    bend = rng.normal(0, hand.wobble * EM * side, (4, 4, 2)).astype(np.float32)
    source = cv2.resize(bend, (side, side), interpolation=cv2.INTER_CUBIC) + np.float32((side - 1) / 2)
    source[..., 0] += np.float32(inverse[0, 0]) * centred + np.float32(inverse[0, 1]) * centred[:, None]
    source[..., 1] += np.float32(inverse[1, 0]) * centred + np.float32(inverse[1, 1]) * centred[:, None]
    warped: Tones = cv2.remap(template, source, None, cv2.INTER_LINEAR)
    return warped


def _written(coverage: Tones, hand: Hand, rng: np.random.Generator) -> Ink:
    """Turn coverage, uint8, into ink with rounded corners, the hand's weight, varying pressure, and dry spots.

    The blur alone would remove the hairlines of brush fonts. Full coverage therefore stays at `HAIRLINE` or more.
    """
    side = coverage.shape[0]
    sharp = coverage.astype(np.float32) / np.float32(255)
    soft = np.maximum(cv2.GaussianBlur(sharp, (0, 0), 0.012 * side), sharp * np.float32(HAIRLINE))
    field = rng.normal(0, 1, (4, 4, 2)).astype(np.float32)
    pressure, dry = cv2.split(cv2.resize(field, (side, side), interpolation=cv2.INTER_CUBIC))
    limit = np.float32(0.4 - hand.weight) + np.float32(hand.pressure) * pressure
    limit = np.clip(limit, 0.15, HAIRLINE - 0.15)
    ink: Ink = np.clip((soft - limit) * np.float32(4) + np.float32(0.5), 0, 1)
    ink *= np.float32(1) - np.clip(np.float32(hand.dryness) * (np.float32(0.4) + dry * np.float32(0.5)), 0, 0.6)
    return ink


def _tight(ink: Ink) -> Ink:
    """Crop ink to the rows and columns with more than 0.2; unchanged if there are none."""
    marked = ink > 0.2
    rows, columns = np.flatnonzero(marked.any(1)), np.flatnonzero(marked.any(0))
    if not len(rows):
        return ink
    return ink[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]


@cache
def _face(font: Font, size: int) -> ImageFont.FreeTypeFont:
    return ImageFont.truetype(font.path, size, index=font.index, layout_engine=ImageFont.Layout.BASIC)


@lru_cache(maxsize=2048)
def _template(code_point: int, fonts: tuple[Font, ...], side: int) -> Tones:
    """Return the undistorted, centred shape of a character, (side, side) uint8, 255 is full ink.

    It comes from the first of `fonts` and the packaged font that has the character, or from `_strokes` if none has.
    """
    for font in (*fonts, packaged_font()):
        if code_point not in coverage(font):
            continue
        face = _face(font, round(side * EM))
        left, top, right, bottom = face.getbbox(chr(code_point))
        image = Image.new("L", (side, side))
        corner = ((side - left - right) / 2, (side - top - bottom) / 2)
        ImageDraw.Draw(image).text(corner, chr(code_point), 255, font=face)
        if image.getbbox():  # some fonts have blank glyphs for characters that they lack
            return np.asarray(image)
    return _strokes(code_point, side)


def _strokes(code_point: int, side: int) -> Tones:
    """Return three to six curved strokes, (side, side) uint8, that depend only on the code point, not on the book."""
    rng = np.random.default_rng([0x6B7A, code_point])
    canvas = np.zeros((side, side), np.uint8)
    time = np.linspace(0, 1, 24)[:, None]
    for _ in range(int(rng.integers(3, 7))):
        start, bend, end = ((0.5 + EM * rng.uniform(-0.5, 0.5, 2)) * side for _ in range(3))
        curve = (1 - time) ** 2 * start + 2 * time * (1 - time) * bend + time**2 * end
        points = np.round(curve * 16).astype(np.int32)  # with shift=4, cv2 expects sixteenths of a px
        cv2.polylines(canvas, [points], False, 255, max(1, round(0.035 * side)), cv2.LINE_AA, shift=4)
    return canvas


def join(ink: Tones, start: tuple[float, float], end: tuple[float, float], em: float, rng: np.random.Generator) -> None:
    """Draw a thin curved stroke from one point (x, y) of a page's ink, (height, width) uint8, to another, in place."""
    first, last = np.array(start), np.array(end)
    bend = (first + last) / 2 + rng.normal(0, 0.08 * em, 2)
    time = np.linspace(0, 1, 10)[:, None]
    curve = (1 - time) ** 2 * first + 2 * time * (1 - time) * bend + time**2 * last
    cv2.polylines(
        ink, [np.round(curve * 16).astype(np.int32)], False, 190, max(1, round(0.03 * em)), cv2.LINE_AA, shift=4
    )


def scan(ink: Tones, hand: Hand, rng: np.random.Generator, text: Box | None) -> Image.Image:
    """Return the page as a scanner sees it: with paper, bleed-through, a frame, dark borders, and blur.

    Args:
        ink: (height, width) uint8, 255 is full ink. Modified in place.
        hand: the hand of the book.
        rng: the generator of the page.
        text: the bounding box of the characters, which frame and borders do not touch; None for an empty page.
    """
    height, width = ink.shape
    scale = width / FULL_SIZE
    if text and hand.framed:
        _frame(ink, text, scale)
    cv2.subtract(ink, _tiled(rng, (height, width), 0.9, 0.9, 90 * hand.dryness), dst=ink)
    cv2.GaussianBlur(ink, (0, 0), max(0.3, hand.blur * min(1, scale)), dst=ink)
    tones = _paper(height, width, rng)
    tones = cv2.subtract(tones, _bleed_through(ink, hand, rng))
    tones = cv2.multiply(tones, cv2.bitwise_not(ink), scale=1 / 255)
    _borders(tones, rng, text or (width // 8, height // 8, width * 3 // 4, height * 3 // 4))
    depth = np.linspace(0, 255 / USUAL_TONE, 256)[:, None]
    colours = np.array(hand.ink) * (1 - depth) + np.array(hand.paper) * depth
    table = np.clip(np.round(colours), 0, 255).astype(np.uint8)[None]
    return Image.fromarray(cv2.LUT(cv2.merge([tones] * 3), table))


def _paper(height: int, width: int, rng: np.random.Generator) -> Tones:
    """Return paper with large soft spots, grain and fibres. Grain is tiled: noise for each px would take most time."""
    spots = rng.normal(0, 1, (height // 300 + 3, width // 300 + 3)).astype(np.float32)
    shade = BLANK_TONE - 12 + 4 * cv2.resize(spots, (width // 8 + 1, height // 8 + 1), interpolation=cv2.INTER_CUBIC)
    tones: Tones = cv2.resize(np.clip(shade, 0, 255).astype(np.uint8), (width, height), interpolation=cv2.INTER_LINEAR)
    for across, along in ((0.7, 0.7), (1.2, 6.0)):
        cv2.subtract(tones, _tiled(rng, (height, width), across, along, 13), dst=tones)
    return cv2.add(tones, 12)  # type: ignore[no-any-return]  # the types of OpenCV are too general


def _tiled(rng: np.random.Generator, shape: tuple[int, int], across: float, along: float, strength: float) -> Tones:
    """Return noise of `shape`, uint8, with a mean of about 10: `strength` times Gaussian noise, then clipped to 0..80.

    The Gaussian noise is blurred with standard deviations of `across` (x) and `along` (y) px.
    """
    side = int(rng.integers(300, 400))
    noise = cv2.GaussianBlur(rng.normal(0, 1, (side, side)).astype(np.float32), (0, 0), across, sigmaY=along)
    tile = np.clip(10 + strength * noise, 0, 80).astype(np.uint8)
    return np.tile(tile, (shape[0] // side + 1, shape[1] // side + 1))[: shape[0], : shape[1]]


def _bleed_through(ink: Tones, hand: Hand, rng: np.random.Generator) -> Tones:
    """Return the reverse side as it shows through, (height, width) uint8: the ink mirrored, shifted, faint."""
    height, width = ink.shape
    small = cv2.resize(ink, (width // 4 + 1, height // 4 + 1), interpolation=cv2.INTER_AREA)[:, ::-1]
    shift = rng.integers((-small.shape[0] // 30, -small.shape[1] // 30), (small.shape[0] // 30 + 1,) * 2)
    blurred = cv2.GaussianBlur(np.roll(small, tuple(shift.tolist()), (0, 1)), (0, 0), 1.0)
    faint = cv2.convertScaleAbs(blurred, alpha=hand.bleed)
    resized: Tones = cv2.resize(faint, (width, height), interpolation=cv2.INTER_LINEAR)
    return resized


def _frame(ink: Tones, text: Box, scale: float) -> None:
    """Draw a printed frame around the text, in place. scale: 1 at full size."""
    x, y, width, height = text
    gap = round(45 * scale)
    corners = (x - gap, y - gap), (x + width + gap, y + height + gap)
    cv2.rectangle(ink, *corners, 215, max(1, round(14 * scale)))


def _borders(tones: Tones, rng: np.random.Generator, text: Box) -> None:
    """Darken the edges of the page, in place, like the table under the book. The text stays clear."""
    height, width = tones.shape
    x, y, text_width, text_height = text
    gaps = (x, y, width - x - text_width, height - y - text_height)
    left, top, right, bottom = (min(int(rng.integers(0, max(1, width // 45))), max(0, gap // 2)) for gap in gaps)
    for border in (tones[:, :left], tones[:top], tones[:, width - right :], tones[height - bottom :]):
        border //= 8
