"""A hand: how one book's characters and paper look. `sample` draws its pages with it.

Everything is drawn from numpy generators that the caller seeds, so that the same seed and fonts give the same pixels.
Ink is float32 in 0..1 (1 is full ink); a page is one uint8 plane of tones (0 is ink, 255 would be blank white), which
the hand's colours turn into RGB at the end.
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

CANVASES = (48, 96, 192)  # sides in px of the squares glyphs are drawn on
EM = 0.6  # the em as a fraction of the canvas; the rest is room for the distortions
HAIRLINE = 0.7
BLANK_TONE = 240  # of paper without shade or grain
USUAL_TONE = 220  # of paper with both
FULL_SIZE = 2400  # px: the page width at which blur and grain are as a scanner leaves them


@dataclass(frozen=True)
class Hand:
    """What the glyphs and pages of one book have in common. Lengths are fractions of the em unless stated."""

    fonts: tuple[Font, ...]  # the book's own first; the others only for what it lacks
    characters: float  # about how many stand on a page
    slant: float  # shear, + leans to the right
    narrow: float  # height over width, relative to the font's
    wobble: float  # how far the elastic warp moves a point
    weight: float  # of strokes: + is bolder, in units of blurred coverage
    pressure: float  # how far the weight varies inside a glyph
    dryness: float  # 0..1: how much of the ink the brush leaves out
    joined: float  # probability that a stroke leads to the next character
    blur: float  # standard deviation in px at full size
    bleed: float  # 0..1: how much of the other side shows through
    ink: tuple[int, int, int]  # RGB
    paper: tuple[int, int, int]  # RGB
    framed: bool  # a printed frame surrounds the text


def new_hand(rng: np.random.Generator, fonts: tuple[Font, ...]) -> Hand:
    """A book's hand. The packaged font stands in for characters that `fonts` lack.

    Args:
        rng: the book's own generator.
        fonts: at least one; the book's own is chosen from them.
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
    """One character as this hand writes it this time, in its natural size, cropped tight to its ink.

    Args:
        em: the size to write in, px.

    Returns:
        float32 (height, width) in 0..1, both sides at least 1.
    """
    side = next((side for side in CANVASES if side * EM >= em), CANVASES[-1])
    ink = _tight(_written(_warped(_template(code_point, hand.fonts, side), hand, rng), hand, rng))
    ratio = em / (side * EM)
    return fit(ink, max(1, round(ink.shape[1] * ratio)), max(1, round(ink.shape[0] * ratio)))


def fit(ink: Ink, width: int, height: int) -> Ink:
    """`ink` resized to (height, width): area averages down, linear up."""
    shrinks = width <= ink.shape[1] and height <= ink.shape[0]
    resized: Ink = cv2.resize(ink, (width, height), interpolation=cv2.INTER_AREA if shrinks else cv2.INTER_LINEAR)
    return resized


def _warped(template: Tones, hand: Hand, rng: np.random.Generator) -> Tones:
    """The template after a rotation, a shear, a stretch and an elastic warp, all about its centre."""
    side = template.shape[0]
    angle = rng.normal(0, 0.035)
    slant = hand.slant + rng.normal(0, 0.03)
    stretch = np.sqrt(hand.narrow) * np.exp(rng.normal(0, 0.08))
    size = np.exp(rng.normal(0, 0.17))
    turn = np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])
    forward = turn @ np.array([[1, -slant], [0, 1]]) @ np.diag([size / stretch, size * stretch])
    inverse = np.linalg.inv(forward)
    centred = np.arange(side, dtype=np.float32) - (side - 1) / 2
    bend = rng.normal(0, hand.wobble * EM * side, (4, 4, 2)).astype(np.float32)
    source = cv2.resize(bend, (side, side), interpolation=cv2.INTER_CUBIC) + np.float32((side - 1) / 2)
    source[..., 0] += np.float32(inverse[0, 0]) * centred + np.float32(inverse[0, 1]) * centred[:, None]
    source[..., 1] += np.float32(inverse[1, 0]) * centred + np.float32(inverse[1, 1]) * centred[:, None]
    warped: Tones = cv2.remap(template, source, None, cv2.INTER_LINEAR)
    return warped


def _written(coverage: Tones, hand: Hand, rng: np.random.Generator) -> Ink:
    """Coverage to ink: rounded corners, the hand's weight, a pressure that varies, dry places.

    Blurring alone would wipe out the hairlines of brush fonts: full coverage counts as HAIRLINE at least.
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
    """The undistorted shape, uint8 (side, side), ink centred: of the first font that draws it, else its strokes."""
    for font in (*fonts, packaged_font()):
        if code_point not in coverage(font):
            continue
        face = _face(font, round(side * EM))
        left, top, right, bottom = face.getbbox(chr(code_point))
        image = Image.new("L", (side, side))
        corner = ((side - left - right) / 2, (side - top - bottom) / 2)
        ImageDraw.Draw(image).text(corner, chr(code_point), 255, font=face)
        if image.getbbox():  # some fonts list characters that they leave blank
            return np.asarray(image)
    return _strokes(code_point, side)


def _strokes(code_point: int, side: int) -> Tones:
    """Three to six curved strokes that depend on the code point alone: the same in every book."""
    rng = np.random.default_rng([0x6B7A, code_point])
    canvas = np.zeros((side, side), np.uint8)
    time = np.linspace(0, 1, 24)[:, None]
    for _ in range(int(rng.integers(3, 7))):
        start, bend, end = ((0.5 + EM * rng.uniform(-0.5, 0.5, 2)) * side for _ in range(3))
        curve = (1 - time) ** 2 * start + 2 * time * (1 - time) * bend + time**2 * end
        points = np.round(curve * 16).astype(np.int32)  # cv2 takes sixteenths of a px with shift=4
        cv2.polylines(canvas, [points], False, 255, max(1, round(0.035 * side)), cv2.LINE_AA, shift=4)
    return canvas


def join(ink: Tones, start: tuple[float, float], end: tuple[float, float], em: float, rng: np.random.Generator) -> None:
    """Lead a thin curved stroke from one point (x, y) of a page's ink, uint8 (height, width), to another, in place."""
    begin, finish = np.array(start), np.array(end)
    bend = (begin + finish) / 2 + rng.normal(0, 0.08 * em, 2)
    time = np.linspace(0, 1, 10)[:, None]
    curve = (1 - time) ** 2 * begin + 2 * time * (1 - time) * bend + time**2 * finish
    cv2.polylines(
        ink, [np.round(curve * 16).astype(np.int32)], False, 190, max(1, round(0.03 * em)), cv2.LINE_AA, shift=4
    )


def scan(ink: Tones, hand: Hand, rng: np.random.Generator, text: Box | None) -> Image.Image:
    """The page as a scanner sees it: paper, the other side showing through, a frame, dark borders, blur.

    Args:
        ink: uint8 (height, width), 255 is full ink; drawn upon.
        text: where characters stand, which frame and borders keep clear of; None for an empty page.
    """
    height, width = ink.shape
    full = width / FULL_SIZE
    if text and hand.framed:
        _frame(ink, text, full)
    cv2.subtract(ink, _tiled(rng, (height, width), 0.9, 0.9, 90 * hand.dryness), dst=ink)
    cv2.GaussianBlur(ink, (0, 0), max(0.3, hand.blur * min(1, full)), dst=ink)
    tones = _paper(height, width, rng)
    tones = cv2.subtract(tones, _other_side(ink, hand, rng))
    tones = cv2.multiply(tones, cv2.bitwise_not(ink), scale=1 / 255)
    _borders(tones, rng, text or (width // 8, height // 8, width * 3 // 4, height * 3 // 4))
    depth = np.linspace(0, 255 / USUAL_TONE, 256)[:, None]
    colours = np.array(hand.ink) * (1 - depth) + np.array(hand.paper) * depth
    table = np.clip(np.round(colours), 0, 255).astype(np.uint8)[None]
    return Image.fromarray(cv2.LUT(cv2.merge([tones] * 3), table))


def _paper(height: int, width: int, rng: np.random.Generator) -> Tones:
    """Shade in large soft spots, grain, fibres. Fresh noise for each px would take most of the time: it is tiled."""
    spots = rng.normal(0, 1, (height // 300 + 3, width // 300 + 3)).astype(np.float32)
    shade = BLANK_TONE - 12 + 4 * cv2.resize(spots, (width // 8 + 1, height // 8 + 1), interpolation=cv2.INTER_CUBIC)
    tones: Tones = cv2.resize(np.clip(shade, 0, 255).astype(np.uint8), (width, height), interpolation=cv2.INTER_LINEAR)
    for across, along in ((0.7, 0.7), (1.2, 6.0)):
        cv2.subtract(tones, _tiled(rng, (height, width), across, along, 13), dst=tones)
    return cv2.add(tones, 12)  # type: ignore[no-any-return]  # OpenCV's types are vague


def _tiled(rng: np.random.Generator, shape: tuple[int, int], across: float, along: float, strength: float) -> Tones:
    """Noise of a mean of about 10 and the given strength, blurred by `across` and `along` px, uint8 of `shape`."""
    side = int(rng.integers(300, 400))
    noise = cv2.GaussianBlur(rng.normal(0, 1, (side, side)).astype(np.float32), (0, 0), across, sigmaY=along)
    tile = np.clip(10 + strength * noise, 0, 80).astype(np.uint8)
    return np.tile(tile, (shape[0] // side + 1, shape[1] // side + 1))[: shape[0], : shape[1]]


def _other_side(ink: Tones, hand: Hand, rng: np.random.Generator) -> Tones:
    """Mirrored, shifted and blurred ink, uint8, as faint as the hand's bleed. A page stands for its own back."""
    height, width = ink.shape
    small = cv2.resize(ink, (width // 4 + 1, height // 4 + 1), interpolation=cv2.INTER_AREA)[:, ::-1]
    shift = rng.integers((-small.shape[0] // 30, -small.shape[1] // 30), (small.shape[0] // 30 + 1,) * 2)
    blurred = cv2.GaussianBlur(np.roll(small, tuple(shift.tolist()), (0, 1)), (0, 0), 1.0)
    faint = cv2.convertScaleAbs(blurred, alpha=hand.bleed)
    side: Tones = cv2.resize(faint, (width, height), interpolation=cv2.INTER_LINEAR)
    return side


def _frame(ink: Tones, text: Box, full: float) -> None:
    x, y, width, height = text
    gap = round(45 * full)
    corners = (x - gap, y - gap), (x + width + gap, y + height + gap)
    cv2.rectangle(ink, *corners, 215, max(1, round(14 * full)))


def _borders(tones: Tones, rng: np.random.Generator, text: Box) -> None:
    """The dark table that the book lies on, along the edges but never where text stands."""
    height, width = tones.shape
    x, y, text_width, text_height = text
    room = (x, y, width - x - text_width, height - y - text_height)
    left, top, right, bottom = (min(int(rng.integers(0, max(1, width // 45))), max(0, gap // 2)) for gap in room)
    for border in (tones[:, :left], tones[:top], tones[:, width - right :], tones[height - bottom :]):
        border //= 8
