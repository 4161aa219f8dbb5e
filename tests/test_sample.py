"""sample: pages in Kaggle's format, with ink in every box, and the same for the same random seed."""

import csv
import os
import re
import signal
import subprocess
import time
from collections import Counter
from pathlib import Path

import cv2
import numpy as np
import pytest
from conftest import KUZUSHIJI
from numpy.typing import NDArray
from PIL import Image

from cluster.errors import InputError, OptionError
from preprocessing.books import volume_of
from preprocessing.fonts import japanese_fonts, packaged_font
from preprocessing.sample import pages as layout
from preprocessing.sample import sample as drawing
from preprocessing.sample.hand import Hand, draw_glyph, fit, new_hand
from preprocessing.sample.pages import inventory
from preprocessing.sample.sample import sample

LAYOUTS = Path(__file__).parents[2] / "shared" / "kuzushiji" / "layouts.csv"
NO_FONT_HAS = (0xE000, 0xE001)  # private use
SMALL = 0.15
Glyph = tuple[str, int, int, int, int]


@pytest.fixture(autouse=True)
def only_the_packaged_font(monkeypatch: pytest.MonkeyPatch) -> None:
    """Use only the packaged font, so that pages are the same on every machine."""
    monkeypatch.setattr(drawing, "find_fonts", lambda: (packaged_font(),))


@pytest.fixture(scope="module")
def drawn_pages(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return six pages, drawn by two processes with the fonts of this machine."""
    out = tmp_path_factory.mktemp("sample") / "out"
    sample(out, 6, scale=0.2, processes=2)
    return out


def content(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def read_train(folder: Path) -> dict[str, list[Glyph]]:
    with (folder / "train.csv").open(newline="") as file:
        rows = list(csv.reader(file))
    assert rows[0] == ["image_id", "labels"]
    return {image_id: glyphs_of(labels) for image_id, labels in rows[1:]}


def glyphs_of(labels: str) -> list[Glyph]:
    fields = [] if labels == "nan" else labels.split()
    parts = (fields[i : i + 5] for i in range(0, len(fields), 5))
    return [(name, int(x), int(y), int(w), int(h)) for name, x, y, w, h in parts]


def tones_of(folder: Path, image_id: str) -> NDArray[np.uint8]:
    with Image.open(folder / "train_images" / f"{image_id}.jpg") as image:
        return np.asarray(image.convert("L"))


def hand(seed: int) -> Hand:
    return new_hand(np.random.default_rng(seed), (packaged_font(),))


def test_same_seed_same_bytes_and_another_seed_other_bytes(tmp_path: Path) -> None:
    for name, seed in (("one", 1), ("again", 1), ("other", 2)):
        sample(tmp_path / name, 2, seed=seed, scale=SMALL, processes=1)
    assert content(tmp_path / "one") == content(tmp_path / "again")
    one, other = (set(content(tmp_path / name).values()) for name in ("one", "other"))
    assert len(one & other) == 1, "only unicode_translation.csv is the same"


def test_number_of_processes_does_not_matter(tmp_path: Path) -> None:
    for name, processes in (("one", 1), ("three", 3)):
        sample(tmp_path / name, 4, scale=SMALL, processes=processes)
    assert content(tmp_path / "one") == content(tmp_path / "three")


def test_files_are_in_kaggles_format(drawn_pages: Path) -> None:
    lines = (drawn_pages / "train.csv").read_text().splitlines()
    assert lines[0] == "image_id,labels"
    assert len(lines) == 7
    for line in lines[1:]:
        assert re.fullmatch(r"\d{9}_\d{5}_[12],U\+[0-9A-F]{4,5}( \d+){4}( U\+[0-9A-F]{4,5}( \d+){4})*", line)
    table = (drawn_pages / "unicode_translation.csv").read_text(encoding="utf-8").splitlines()
    assert table[0] == "Unicode,char"
    assert "U+306F,は" in table
    names = {row.split(",")[0] for row in table}
    assert {name for glyphs in read_train(drawn_pages).values() for name, *_ in glyphs} <= names
    images = sorted(path.name for path in (drawn_pages / "train_images").iterdir())
    assert images == sorted(f"{line.split(',')[0]}.jpg" for line in lines[1:])


def test_images_are_jpegs_as_kaggles(drawn_pages: Path) -> None:
    for path in (drawn_pages / "train_images").iterdir():
        with Image.open(path) as image:
            assert (image.format, image.mode) == ("JPEG", "RGB")
            assert image.size == pytest.approx((480, 780), rel=0.02)
            assert [(c[1], c[2]) for c in image.layer] == [(2, 2), (1, 1), (1, 1)], "4:2:0"  # type: ignore[attr-defined]


def test_boxes_lie_inside_their_pages_and_hold_ink(drawn_pages: Path) -> None:
    for image_id, glyphs in read_train(drawn_pages).items():
        tones = tones_of(drawn_pages, image_id)
        paper = np.median(tones)
        assert len(glyphs) > 60
        for _, x, y, w, h in glyphs:
            assert x >= 0 and y >= 0 and w >= 1 and h >= 1  # noqa: PT018
            assert x + w <= tones.shape[1]
            assert y + h <= tones.shape[0]
            assert tones[y : y + h, x : x + w].min() < paper - 40


def test_ink_reaches_every_side_of_its_box() -> None:
    for seed, char in enumerate("にのし一人事"):
        ink = draw_glyph(ord(char), hand(seed), np.random.default_rng(seed), 100)
        assert all(edge.max() > 0.1 for edge in (ink[0], ink[-1], ink[:, 0], ink[:, -1]))
        assert max(ink.shape) < 200


def test_four_pages_make_a_book(tmp_path: Path) -> None:
    for pages, books in ((1, 1), (4, 1), (12, 3), (40, 10)):
        ids = [page.image_id for page in layout.new_pages(pages, 42)]
        assert len(set(ids)) == pages
        assert len({volume_of(image_id) for image_id in ids}) == books


def test_layouts_keep_ids_boxes_characters_order_and_empty_pages(tmp_path: Path) -> None:
    rows = [
        ("hnsd001-003", "U+4EBA 2500 40 100 120 U+306F 0 0 60 50 U+E000 300 4000 90 80"),
        ("100241706_00004_2", ""),
        ("200021637-00002", "nan"),
        ("unused", "U+306F 0 0 1 1"),
    ]
    layouts = tmp_path / "layouts.csv"
    layouts.write_text("image_id,labels\n" + "".join(f"{image_id},{labels}\n" for image_id, labels in rows))
    summary = sample(tmp_path / "out", 3, layouts=layouts)
    assert (summary.pages, summary.characters, summary.books) == (3, 3, 3)
    drawn = read_train(tmp_path / "out")
    assert list(drawn.items()) == [(image_id, glyphs_of(labels)) for image_id, labels in rows[:3]]
    sizes = [tones_of(tmp_path / "out", image_id).shape[::-1] for image_id in drawn]
    assert sizes == [(2660, 4140), (2400, 3900), (2400, 3900)]


@pytest.mark.skipif(not LAYOUTS.exists(), reason="needs the real pages at ../shared/kuzushiji, next to the checkout")
def test_real_layouts_are_drawn_with_ink_in_their_boxes(tmp_path: Path) -> None:
    with LAYOUTS.open(newline="") as file:
        rows = [row for row, _ in zip(csv.reader(file), range(6), strict=False)][1:]
    sample(tmp_path / "out", 5, scale=0.25, layouts=LAYOUTS, processes=1)
    drawn = read_train(tmp_path / "out")
    assert list(drawn) == [image_id for image_id, _ in rows]
    for image_id, labels in rows:
        real = glyphs_of(labels)
        assert [glyph[0] for glyph in drawn[image_id]] == [glyph[0] for glyph in real]
        boxes = np.array([glyph[1:] for glyph in drawn[image_id]]).reshape(-1, 4)
        assert np.abs(boxes - 0.25 * np.array([glyph[1:] for glyph in real]).reshape(-1, 4)).max(initial=0) <= 1
        tones = tones_of(tmp_path / "out", image_id)
        darkest = [tones[y : y + h, x : x + w].min() for x, y, w, h in boxes]
        assert np.max(darkest, initial=0) < np.median(tones) - 30


@pytest.mark.parametrize(
    "content",
    [
        "id,text\n",
        "image_id,labels\na,U+306F 1 2 3\n",
        "image_id,labels\na,U+306F 1 2 3 0\n",
        "image_id,labels\na,306F 1 2 3 4\n",
        "image_id,labels\na,U+D800 1 2 3 4\n",
        "image_id,labels\n../a,U+306F 1 2 3 4\n",
        "image_id,labels\na,\n",
        "image_id,labels\na,\na,\n",
        "image_id,labels\na,\nb,U+306F 70000 1 9 9\n",
        "image_id,labels\na,\nb,U+306F 1 65400 9 99\n",
        "image_id,labels\na,\nb,U+306F 20000 20000 9 9\n",
    ],
)
def test_malformed_or_short_layouts_are_refused_before_anything_is_drawn(tmp_path: Path, content: str) -> None:
    (tmp_path / "layouts.csv").write_text(content)
    with pytest.raises((InputError, OptionError)) as caught:
        sample(tmp_path / "out", 2, layouts=tmp_path / "layouts.csv")
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "out").exists()


def test_ctrl_c_leaves_an_empty_folder_for_the_same_command(tmp_path: Path) -> None:
    command = [KUZUSHIJI, "sample", "--out", tmp_path / "out", "--num-pages", "500", "--scale", "0.2"]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True, start_new_session=True) as drawing:
        while not list(tmp_path.glob("out/train_images/*.jpg")):
            assert drawing.poll() is None
            time.sleep(0.05)
        os.killpg(drawing.pid, signal.SIGINT)  # to all its processes, as a terminal does
        assert drawing.stderr
        assert drawing.stderr.read().splitlines()[-1] == "kuzushiji: stopped"
    assert drawing.returncode == 1
    assert list((tmp_path / "out").iterdir()) == []


def test_a_folder_that_holds_something_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "mine.txt").write_text("mine")
    with pytest.raises(OptionError, match="--out must be a new or an empty folder"):
        sample(tmp_path, 1)
    assert content(tmp_path) == {"mine.txt": b"mine"}


@pytest.mark.parametrize(("num_pages", "scale", "seed"), [(0, 1.0, 1), (1, 0.0, 1), (1, 1.5, 1), (1, 1.0, -1)])
def test_numbers_out_of_range_are_refused(tmp_path: Path, num_pages: int, scale: float, seed: int) -> None:
    with pytest.raises(OptionError, match="Received"):
        sample(tmp_path / "out", num_pages, seed=seed, scale=scale)


def likeness(one: NDArray[np.float32], other: NDArray[np.float32]) -> float:
    """Return the correlation of two shapes, blurred so that strokes need not match to the pixel."""
    squares = [cv2.GaussianBlur(fit(ink, 64, 64), (0, 0), 3).ravel() for ink in (one, other)]
    return float(np.corrcoef(*squares)[0, 1])


def test_a_character_that_no_font_has_is_drawn_alike_in_two_books_and_unlike_another() -> None:
    first, second = (
        [
            [draw_glyph(code_point, hand(book), np.random.default_rng([book, i]), 100) for i in range(5)]
            for book in (1, 2)
        ]
        for code_point in NO_FONT_HAS
    )
    alike = np.median([likeness(a, b) for a in first[0] for b in first[1]])
    unlike = np.median([likeness(a, b) for a in first[0] for b in second[1]])
    assert alike > 0.6
    assert unlike < 0.4


def test_each_character_is_distorted_independently() -> None:
    rng = np.random.default_rng(1)
    one, other = (draw_glyph(ord("事"), hand(1), rng, 100) for _ in range(2))
    assert one.shape != other.shape or not np.array_equal(one, other)
    assert likeness(one, other) > 0.4


def test_character_frequencies_follow_zipf(drawn_pages: Path) -> None:
    assert len(inventory()) == len(set(inventory())) == 4212
    shares = np.diff(layout._cumulative(), prepend=0)
    assert shares[0] == pytest.approx(0.036, rel=0.1)
    assert shares[512] == pytest.approx(0.00018, rel=0.1)
    ranks = np.searchsorted(layout._cumulative(), np.random.default_rng(1).random(13_000))
    counts = np.array([count for _, count in Counter(ranks.tolist()).most_common()])
    kept = int(np.searchsorted(np.cumsum(counts), 0.9 * counts.sum())) + 1
    assert 300 < kept < len(counts) / 2
    drawn = Counter(name for glyphs in read_train(drawn_pages).values() for name, *_ in glyphs)
    assert sum(drawn[f"U+{code_point:04X}"] for code_point in inventory()[:50]) > 0.5 * drawn.total()


def test_fonts_without_hiragana_and_files_that_are_no_fonts_are_passed_over(tmp_path: Path) -> None:
    (tmp_path / "broken.ttf").write_bytes(b"no font")
    assert japanese_fonts([tmp_path, tmp_path / "absent"]) == ()
    (tmp_path / "a.ttf").symlink_to(packaged_font().path)
    assert [font.path for font in japanese_fonts([tmp_path])] == [str(tmp_path / "a.ttf")]


def test_pages_are_drawn_with_the_fonts_of_a_folder_which_must_have_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(drawing, "find_fonts", lambda: pytest.fail("those of the machine are not asked for"))
    fonts = tmp_path / "fonts"
    for received in ("which is not a folder", "with none"):
        with pytest.raises(
            OptionError, match=rf"^--fonts must be a folder with .*: {re.escape(str(fonts))}, {received}$"
        ):
            sample(tmp_path / "out", 1, scale=SMALL, fonts=fonts)
        fonts.mkdir(exist_ok=True)
    (fonts / "a.ttf").symlink_to(packaged_font().path)
    assert sample(tmp_path / "out", 1, scale=SMALL, fonts=fonts).fonts == (packaged_font().name,)
