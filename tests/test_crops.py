"""Crops: the study's geometry, grey levels close to the study's, and each fault of a page or box as `PageFault`."""

import csv
import io
import random
import re
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray
from PIL import Image

from preprocessing.crop import SIDE, PageFault, clip_box, crop, widened
from preprocessing.scan import decode_scan

WORST_GREY_LEVELS, MEAN_GREY_LEVELS = 2.5, 1.25


def decode_page(data: bytes) -> NDArray[np.uint8]:
    return decode_scan(data).image


def jpeg(image: Image.Image, **options: object) -> bytes:
    out = io.BytesIO()
    image.save(out, "JPEG", **options)
    return out.getvalue()


def study_crop(page: Image.Image, box: Sequence[int]) -> NDArray[np.uint8]:
    """Cut a crop as the study did, with Pillow."""
    x, y, width, height = box
    longer = max(width, height)
    new = (max(1, width * SIDE // longer), max(1, height * SIDE // longer))
    shrunk = page.crop((x, y, x + width, y + height)).resize(new, Image.Resampling.LANCZOS)
    square = Image.new("L", (SIDE, SIDE))
    square.paste(shrunk, ((SIDE - new[0]) // 2, (SIDE - new[1]) // 2))
    return np.asarray(square)


def real_pages(shared: Path) -> Iterator[tuple[bytes, list[tuple[int, int, int, int]]]]:
    for row in csv.DictReader((shared / "train.csv").read_text().splitlines()):
        numbers = [list(map(int, part.split())) for part in re.findall(r"U\+\w+ (\d+ \d+ \d+ \d+)", row["labels"])]
        boxes = [(x, y, width, height) for x, y, width, height in numbers]
        yield (shared / "pages" / f"{row['image_id']}.jpg").read_bytes(), boxes


def differences(data: bytes, boxes: Iterable[tuple[int, int, int, int]]) -> list[float]:
    page, study_page = decode_page(data), Image.open(io.BytesIO(data)).convert("L")
    return [np.abs(crop(page, box).astype(np.int64) - study_crop(study_page, box)).mean() for box in boxes]


def test_real_crops_differ_from_the_study_by_few_grey_levels(shared: Path) -> None:
    found = [difference for data, boxes in real_pages(shared) for difference in differences(data, boxes)]
    assert len(found) == 219
    assert max(found) <= WORST_GREY_LEVELS
    assert np.mean(found) <= MEAN_GREY_LEVELS


def test_crops_of_boxes_of_any_size_differ_from_the_study_by_few_grey_levels(shared: Path) -> None:
    data, boxes = next(real_pages(shared))
    height, width = decode_page(data).shape
    found = []
    for longer in (20, 70, 81, 100, 150, 165, 220, 300, 330, 400, 800):
        starts = [(min(x, width - longer), min(y, height - longer)) for x, y, _, _ in boxes]
        found += differences(data, [(x, y, longer * 2 // 3, longer) for x, y in starts])
    assert max(found) <= WORST_GREY_LEVELS
    assert np.mean(found) <= MEAN_GREY_LEVELS


@given(st.integers(1, 300), st.integers(1, 300))
def test_the_longer_side_fills_the_square_and_the_rest_is_black(width: int, height: int) -> None:
    page = np.full((300, 300), 255, np.uint8)
    inked = crop(page, (0, 0, width, height)) > 0
    longer = max(width, height)
    across, down = max(1, width * SIDE // longer), max(1, height * SIDE // longer)
    expected = np.zeros((SIDE, SIDE), bool)
    left, top = (SIDE - across) // 2, (SIDE - down) // 2
    expected[top : top + down, left : left + across] = True
    assert np.array_equal(inked, expected)


def test_77_pixels_become_80_where_floats_would_give_79() -> None:
    assert (crop(np.full((77, 77), 255, np.uint8), (0, 0, 77, 77)) == 255).all()


@pytest.mark.parametrize(
    ("box", "on_page"),
    [
        ((10, 20, 30, 40), (10, 20, 30, 40)),
        ((-5, -6, 30, 40), (0, 0, 25, 34)),
        ((90, 190, 30, 40), (90, 190, 10, 10)),
        ((-10, -10, 999, 999), (0, 0, 100, 200)),
    ],
)
def test_a_box_partly_off_its_page_is_clipped(box: tuple[int, ...], on_page: tuple[int, ...]) -> None:
    assert clip_box(box, (200, 100)) == on_page


def test_a_margin_is_a_fraction_of_the_longer_side_on_each_side() -> None:
    assert widened((10, 20, 30, 41), 0.0) == (10, 20, 30, 41)
    assert widened((10, 20, 30, 41), 0.1) == (6, 16, 38, 49)
    assert widened((10, 20, 41, 30), 0.5) == (-10, 0, 81, 70)
    assert widened((0, 0, 100, 10), 0.29) == (-29, -29, 158, 68)  # 0.29 * 100 is less than 29 in floating point


@pytest.mark.parametrize("box", [(100, 0, 5, 5), (0, 200, 5, 5), (-5, 0, 5, 5), (0, -9, 5, 9), (999, 999, 1, 1)])
def test_a_box_wholly_off_its_page_is_a_fault(box: tuple[int, ...]) -> None:
    with pytest.raises(PageFault, match="off its page of 100 x 200"):
        clip_box(box, (200, 100))


@pytest.mark.parametrize("box", [(1, 1, 0, 5), (1, 1, 5, 0), (1, 1, -5, 5), (1, 1, 0, 0)])
def test_a_box_of_no_area_is_a_fault(box: tuple[int, ...]) -> None:
    with pytest.raises(PageFault, match="no area"):
        clip_box(box, (200, 100))


@pytest.mark.parametrize("mode", ["L", "RGB", "CMYK"])
def test_every_colour_space_of_jpeg_becomes_grey(mode: str) -> None:
    page = decode_page(jpeg(Image.new("RGB", (50, 40), (200, 200, 200)).convert(mode)))
    assert page.shape == (40, 50)
    assert abs(int(page.mean()) - 200) < 4


def test_what_is_cut_off_corrupt_or_no_scan_is_a_fault() -> None:
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 255, (200, 200, 3), np.uint8))
    whole = jpeg(noise)
    for data in (whole[: len(whole) // 2], whole[:-3], whole[:100], b"", b"\xff\xd8", b"GIF89a"):
        with pytest.raises(PageFault):
            decode_page(data)
    assert decode_page(whole).shape == (200, 200)


def test_a_bomb_is_refused_from_its_header() -> None:
    data = bytearray(jpeg(Image.new("L", (8, 8))))
    frame = data.index(b"\xff\xc0")
    data[frame + 5 : frame + 9] = (30_000).to_bytes(2, "big") * 2
    with pytest.raises(PageFault, match="30000 x 30000 pixels is over"):
        decode_page(bytes(data))


def test_mutated_files_are_decoded_or_raise_only_page_fault() -> None:
    rng = random.Random(1)
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 255, (64, 48, 3), np.uint8))
    originals = [jpeg(noise), jpeg(noise, progressive=True), jpeg(noise.convert("L"))]
    for _ in range(1000):
        data = bytearray(rng.choice(originals))
        for _ in range(rng.randint(1, 8)):
            data[rng.randrange(2, len(data))] = rng.randrange(256)
        try:
            assert decode_page(bytes(data)).ndim == 2
        except PageFault as fault:
            assert "\n" not in str(fault)
