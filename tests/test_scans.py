"""Scans: a page in any usual format is read upright and gray, mended if nothing is lost, or counted as a loss."""

import io
import random
import unicodedata
import warnings
import zipfile
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

from cluster.errors import InputError, OptionError
from cluster.manifest import read_manifest
from cluster.places import place
from preprocessing.box_checks import InkCount, clipped_line, count_ink, ink_lines
from preprocessing.config import PrepareConfig
from preprocessing.crop import MAX_PAGE_PIXELS, MAX_SEQUENTIAL_PIXELS, PageFault
from preprocessing.cutting import Cut, cut_boxes, scaled
from preprocessing.dataset import DatasetManifest
from preprocessing.exif import orientation_of, upright
from preprocessing.groups import group_pages
from preprocessing.jpeg import AMBIGUOUS_CMYK, read_header
from preprocessing.labels.read import read_labels
from preprocessing.labels.table import Labels
from preprocessing.page_results import PageResult
from preprocessing.pages import list_pages, page_reader
from preprocessing.parquet import results_of_table
from preprocessing.plan import make_plan
from preprocessing.prepare import prepare
from preprocessing.scan import Scan, decode_scan, scan_size

HEIGHT, WIDTH = 120, 90
FORMS = {
    "jpg": "JPEG", "JPG": "JPEG", "jpeg": "JPEG", "png": "PNG", "tif": "TIFF", "TIFF": "TIFF", "jp2": "JPEG2000",
    "webp": "WEBP", "bmp": "BMP",
}  # fmt: skip


def picture() -> Image.Image:
    """Return a page of strokes on uneven paper, in colour. No two orientations of it look alike."""
    down, across = np.mgrid[:HEIGHT, :WIDTH]
    paper = 225 - across // 4 + down // 8
    ink = ((across // 7 + down // 9) % 3 == 0) & (down > across)
    gray = np.where(ink, 40, paper).astype(np.uint8)
    return Image.fromarray(np.dstack([gray, gray, gray - gray // 8]))


def saved(image: Image.Image, form: str, **options: Any) -> bytes:
    out = io.BytesIO()
    image.save(out, form, **options)
    return out.getvalue()


def gray_of(image: Image.Image) -> NDArray[np.int64]:
    return np.asarray(image.convert("L")).astype(np.int64)


def differs(scan: Scan, image: Image.Image) -> float:
    """Return the mean difference in grey levels."""
    assert scan.image.dtype == np.uint8
    assert scan.image.shape == (image.height, image.width)
    return float(np.abs(scan.image - gray_of(image)).mean())


def exif(orientation: int) -> Image.Exif:
    tag = Image.Exif()
    tag[0x0112] = orientation
    return tag


@pytest.mark.parametrize("suffix", FORMS)
def test_each_form_of_a_page_is_read_whatever_its_name(suffix: str) -> None:
    data = saved(picture(), FORMS[suffix], **({"quality": 95} if FORMS[suffix] in ("JPEG", "WEBP") else {}))
    scan = decode_scan(data)
    assert differs(scan, picture()) < 3
    assert (scan.orientation, scan.warnings) == (1, [])
    assert scan_size(data) == (WIDTH, HEIGHT)


@pytest.mark.parametrize("form", ["JPEG", "PNG", "TIFF", "WEBP"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_a_page_is_turned_as_its_exif_orientation_says(form: str, orientation: int) -> None:
    # The file has the page turned in the opposite direction.
    way = {2: 0, 3: 3, 4: 1, 5: 5, 6: 2, 7: 6, 8: 4}.get(orientation)
    stored = picture() if way is None else picture().transpose(Image.Transpose(way))
    data = saved(stored, form, exif=exif(orientation), **({"quality": 95} if form in ("JPEG", "WEBP") else {}))
    scan = decode_scan(data)
    assert scan.orientation == orientation
    assert differs(scan, picture()) < 3
    assert scan_size(data) == (WIDTH, HEIGHT)


@pytest.mark.parametrize("orientation", [1, 6])
def test_the_size_of_a_turned_jpeg_with_extraneous_bytes_before_its_orientation_is_that_of_its_scan(
    orientation: int,
) -> None:
    data = saved(picture(), "JPEG", exif=exif(orientation), quality=95)
    data = data[:2] + bytes(7) + data[2:]
    scan = decode_scan(data)
    assert scan.warnings == ["7 extraneous bytes before a marker were dropped"]
    assert scan_size(data) == scan.image.shape[::-1]
    assert scan_size(data[:2000]) == scan.image.shape[::-1]


@pytest.mark.parametrize(
    "broken",
    [
        b"",
        b"II",
        b"II*\0",
        b"II*\0\xff\xff\xff\xff",
        b"MM\0*\0\0\0\x08\xff\xff",
        b"II*\0\x08\0\0\0\1\0\x12\1\3\0\1\0\0\0\x09\0",
    ],
)
def test_exif_that_is_broken_or_says_nothing_leaves_a_page_as_it_is(broken: bytes) -> None:
    assert orientation_of(broken) == 1
    image = np.zeros((2, 3), np.uint8)
    assert upright(image, 1) is image


# --- pixels of other kinds


@pytest.mark.parametrize("form", ["TIFF", "PNG"])
@pytest.mark.parametrize("bits", [16, 12, 10])
def test_gray_of_16_bits_is_scaled_by_its_range_and_says_so(form: str, bits: int) -> None:
    gray = gray_of(picture())
    deep = np.rint(gray * ((1 << bits) - 1) / 255).astype(np.uint16)
    deep[0, 0] = (1 << bits) - 1
    scan = decode_scan(saved(Image.fromarray(deep), form))
    assert np.abs(scan.image - gray)[1:].max() <= 1
    assert scan.warnings == [f"gray of 16 bits: 0 to {(1 << bits) - 1} was scaled to 0 to 255"]


@pytest.mark.parametrize("suffix", [".png", ".tif"])
def test_the_upper_bits_of_colour_of_16_bits_are_read_which_is_a_warning(suffix: str) -> None:
    colour = np.random.default_rng(0).integers(0, 256, (9, 9, 3), np.uint8)
    _, data = cv2.imencode(suffix, colour.astype(np.uint16) * 257)
    scan = decode_scan(data.tobytes())
    assert scan.warnings == ["colour or transparency of 16 bits: the upper 8 bits were read"]
    assert differs(scan, Image.fromarray(colour[:, :, ::-1])) <= 1


def test_gray_of_16_bits_in_which_white_is_zero_is_inverted() -> None:
    gray = gray_of(picture())
    data = bytearray(saved(Image.fromarray(((255 - gray) * 257).astype(np.uint16)), "TIFF"))
    at = data.index(b"\x06\x01\x03\x00\x01\x00\x00\x00")
    data[at + 8] = 0  # the photometric interpretation
    assert np.abs(decode_scan(bytes(data)).image - gray).max() <= 1


def see_through(image: Image.Image) -> Image.Image:
    """Return the ink on a transparent background, whose hidden colour is black."""
    image = image.convert("RGBA")
    inked = gray_of(image) < 100
    pixels = np.where(inked[..., None], np.asarray(image), 0).astype(np.uint8)
    return Image.fromarray(pixels)


@pytest.mark.parametrize("form", ["PNG", "TIFF", "WEBP", "JPEG2000"])
def test_what_is_transparent_is_white(form: str) -> None:
    options = {"lossless": True, "exact": True} if form == "WEBP" else {}
    image = see_through(picture())
    white = Image.new("RGBA", image.size, "white")
    white.alpha_composite(image)
    assert differs(decode_scan(saved(image, form, **options)), white) < 1


@pytest.mark.parametrize("transparent", [False, True])
def test_a_palette_is_read_as_its_colours(transparent: bool) -> None:
    image = picture().quantize(16)
    expected = image.convert("RGB")
    if transparent:
        paper = image.getpixel((WIDTH - 1, 0))
        expected = Image.fromarray(np.where(np.asarray(image)[..., None] == paper, 255, np.asarray(expected)))
        data = saved(image, "PNG", transparency=paper)
    else:
        data = saved(image, "PNG")
    assert differs(decode_scan(data), expected) < 1


def test_one_bit_images_are_read() -> None:
    image = picture().convert("1")
    for form in ("PNG", "TIFF", "BMP"):
        assert differs(decode_scan(saved(image, form)), image) == 0


def without_adobe(data: bytes) -> bytes:
    at = data.index(b"\xff\xee\0\x0eAdobe")
    return data[:at] + data[at + 16 :]


def test_cmyk_is_read_with_adobe_s_marker_and_without_whichever_way_ink_counts() -> None:
    cmyk = picture().convert("CMYK")
    assert differs(decode_scan(saved(cmyk, "JPEG", quality=95)), picture()) < 3
    # Pillow writes amounts of light, as Adobe does; of the negative, it writes amounts of ink.
    for image in (cmyk, Image.merge("CMYK", [band.point(lambda v: 255 - v) for band in cmyk.split()])):
        scan = decode_scan(without_adobe(saved(image, "JPEG", quality=95)))
        assert differs(scan, picture()) < 3
        assert scan.warnings == [AMBIGUOUS_CMYK]
    assert differs(decode_scan(saved(cmyk, "TIFF")), picture()) < 3


def test_the_first_page_of_a_tiff_is_read_with_a_warning() -> None:
    data = saved(picture(), "TIFF", save_all=True, append_images=[picture().rotate(180)])
    scan = decode_scan(data)
    assert differs(scan, picture()) < 1
    assert scan.warnings == ["first of several pages of a TIFF file"]


# --- mending


def ends_with(extra: bytes) -> Callable[[bytes], bytes]:
    return lambda data: data[:-2] + extra + data[-2:]


def with_odd_parameters(data: bytes) -> bytes:
    at = data.index(b"\xff\xda")
    behind = at + 2 + int.from_bytes(data[at + 2 : at + 4])
    return data[: behind - 3] + b"\0\0\0" + data[behind:]


def before_tables(extra: bytes) -> Callable[[bytes], bytes]:
    return lambda data: data.replace(b"\xff\xdb", extra + b"\xff\xdb", 1)


MENDS: dict[str, tuple[Callable[[bytes], bytes], str]] = {
    "extraneous bytes at the end": (ends_with(b"\x11\x22\x33" * 8), "24 extraneous bytes after the picture"),
    "zeros at the end": (ends_with(bytes(500)), "500 extraneous bytes after the picture"),
    "extraneous bytes in the header": (before_tables(b"abc"), "3 extraneous bytes before a marker"),
    "odd parameters of the scan": (with_odd_parameters, "parameters of a scan were out of range"),
    "no end marker": (lambda data: data[:-2], "end marker was missing"),
    "half an end marker": (lambda data: data[:-1], "end marker was missing"),
}
CODINGS: dict[str, dict[str, Any]] = {
    "colour": {}, "gray": {"gray": True}, "every value": {"subsampling": 0, "quality": 95},
    "restart markers": {"restart_marker_blocks": 5},
}  # fmt: skip


def coded(image: Image.Image, gray: bool = False, **options: Any) -> bytes:
    return saved(image.convert("L") if gray else image, "JPEG", **options)


@pytest.mark.parametrize("what", MENDS)
@pytest.mark.parametrize("coding", CODINGS)
def test_minor_faults_are_mended_with_a_warning(what: str, coding: str) -> None:
    data = coded(picture(), **CODINGS[coding])
    change, says = MENDS[what]
    scan = decode_scan(change(data))
    assert np.array_equal(scan.image, decode_scan(data).image)
    assert len(scan.warnings) == 1
    assert scan.warnings[0].startswith(says)


def test_several_faults_of_one_file_are_mended() -> None:
    data = coded(picture())
    scan = decode_scan(with_odd_parameters(before_tables(b"abc")(data[:-2] + b"\x11\x22\x33" * 8)))
    assert np.array_equal(scan.image, decode_scan(data).image)
    assert len(scan.warnings) == 4


def test_a_progressive_page_without_its_end_marker_is_mended_if_all_its_scans_are_there() -> None:
    data = coded(picture(), progressive=True)
    assert decode_scan(data[:-2]).warnings == ["end marker was missing"]
    scans = [at for at in range(len(data)) if data[at : at + 2] in (b"\xff\xda", b"\xff\xc4")]
    for cut in scans[1:]:  # each cut is exactly at the end of a scan: only the last scans are missing
        with pytest.raises(PageFault, match="can't be decoded"):
            decode_scan(data[:cut])


def damaged(rng: random.Random, data: bytes) -> bytes:
    """Return a file with bytes replaced, inserted or removed in the data of its picture, or, at times, unchanged."""
    begin = data.index(b"\xff\xda") + 14
    at, changed = rng.randrange(begin, len(data) - 2), bytearray(data)
    count = rng.choice((1, 3, 40))
    changed[at : at + rng.choice((0, count))] = rng.choice((b"", rng.randbytes(count)))
    return bytes(changed)


@pytest.mark.parametrize("coding", CODINGS)
def test_no_mend_hides_damage(coding: str) -> None:
    import simplejpeg

    data = coded(picture().resize((120, 160)), **CODINGS[coding])
    rng = random.Random(coding)
    lost = 0
    for _ in range(80):
        bad = damaged(rng, data)
        try:
            accepted = simplejpeg.decode_jpeg(bad, colorspace="GRAY", fastdct=True, strict=True)[:, :, 0]
        except ValueError:
            lost += 1
            for mendable in (bad, bad[:-2], with_odd_parameters(bad), before_tables(b"abc")(bad)):
                with pytest.raises(PageFault):
                    decode_scan(mendable)
        else:  # damage that goes unnoticed without a mend gives the same picture with one
            for mendable in (bad[:-2], with_odd_parameters(bad), before_tables(b"abc")(bad)):
                assert np.array_equal(decode_scan(mendable).image, accepted)
    assert lost > 20


@pytest.mark.parametrize("share", [0.3, 0.5, 0.9, 0.999])
@pytest.mark.parametrize("progressive", [False, True])
def test_a_file_that_is_cut_off_stays_a_loss(share: float, progressive: bool) -> None:
    data = coded(picture(), progressive=progressive)
    with pytest.raises(PageFault, match="can't be decoded"):
        decode_scan(data[: min(int(len(data) * share), len(data) - 3)])


def test_bytes_in_the_header_that_may_be_a_lost_segment_are_a_loss() -> None:
    data = saved(picture(), "JPEG", exif=exif(6), quality=50)
    for marker in (b"\xff\xe1", b"\xff\xdb"):  # with its first byte destroyed, the rest of the segment is extraneous
        with pytest.raises(PageFault, match="extraneous bytes"):
            decode_scan(data.replace(marker, b"\xfe" + marker[1:], 1))


@pytest.mark.parametrize("form", ["PNG", "TIFF", "JPEG2000", "WEBP", "BMP"])
@pytest.mark.parametrize("share", [0.02, 0.5, 0.95])
def test_other_forms_that_are_cut_off_are_losses(form: str, share: float, capfd: pytest.CaptureFixture[str]) -> None:
    data = saved(picture(), form)
    with pytest.raises(PageFault, match="can't be decoded"):
        decode_scan(data[: int(len(data) * share)])
    assert capfd.readouterr() == ("", "")


# --- limits


def with_size(form: str, width: int, height: int) -> bytes:
    """Return a small file whose header claims a large page."""
    data = bytearray(saved(Image.new("L" if form != "WEBP" else "RGB", (16, 16)), form))
    if form == "JPEG":
        at = data.index(b"\xff\xc0")
        data[at + 5 : at + 9] = height.to_bytes(2) + width.to_bytes(2)
    elif form == "PNG":
        import zlib

        data[16:24] = width.to_bytes(4) + height.to_bytes(4)
        data[29:33] = zlib.crc32(data[12:29]).to_bytes(4)
    elif form == "TIFF":
        for tag, value in ((b"\x00\x01\x04\x00", width), (b"\x01\x01\x04\x00", height)):
            at = data.index(tag)
            data[at + 8 : at + 12] = value.to_bytes(4, "little")
    elif form == "JPEG2000":
        at = data.index(b"ihdr")
        data[at + 4 : at + 12] = height.to_bytes(4) + width.to_bytes(4)
    elif form == "BMP":
        data[18:26] = width.to_bytes(4, "little") + height.to_bytes(4, "little")
    else:
        at = data.index(b"\x9d\x01\x2a") + 3
        data[at : at + 4] = width.to_bytes(2, "little") + height.to_bytes(2, "little")
    return bytes(data)


@pytest.mark.parametrize("form", ["JPEG", "PNG", "TIFF", "JPEG2000", "WEBP", "BMP"])
def test_a_bomb_is_refused_from_its_header_with_the_bound_and_the_way_out(form: str) -> None:
    most = MAX_SEQUENTIAL_PIXELS if form == "JPEG" else MAX_PAGE_PIXELS
    data = with_size(form, 16_000, 16_000)
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # Pillow warns of such pages
        for ask in (decode_scan, scan_size):
            if (form, ask) != ("JPEG", scan_size):
                with pytest.raises(PageFault, match=f"16000 x 16000 pixels is over {most} pixels: .*scale") as caught:
                    ask(data)
                assert ("save it as a baseline JPEG" in str(caught.value)) == (form != "JPEG")


def test_only_pages_in_one_sequential_scan_may_be_larger() -> None:
    one = coded(picture())
    assert read_header(one).one_scan
    assert not read_header(coded(picture(), progressive=True)).one_scan
    # With a scan for each component, libjpeg keeps all coefficients in memory.
    at = one.index(b"\xff\xda")
    assert not read_header(one[: at + 4] + b"\1" + one[at + 5 :]).one_scan


def test_a_tile_beyond_the_limit_is_refused_before_memory_is_taken() -> None:
    data = bytearray(saved(picture(), "TIFF", compression="tiff_lzw"))
    # The tags of strips become those of tiles.
    for tag, name, value in ((278, 322, 1 << 16), (279, 323, 1 << 16)):
        at = (
            data.index(tag.to_bytes(2, "little") + b"\x04\0")
            if tag == 279
            else data.index(tag.to_bytes(2, "little") + b"\x03\0")
        )
        data[at : at + 12] = name.to_bytes(2, "little") + b"\x04\0\1\0\0\0" + value.to_bytes(4, "little")
    with pytest.raises(PageFault, match="a tile of 4294967296 pixels"):
        decode_scan(bytes(data))


# --- which files are pages, and their ids


def jpeg_page() -> bytes:
    return coded(picture())


def written(folder: Path, *names: str) -> Path:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(jpeg_page())
    return folder


def zipped(folder: Path) -> Path:
    with zipfile.ZipFile(folder.with_suffix(".zip"), "w") as archive:
        for path in sorted(folder.rglob("*")):
            archive.write(path, str(path.relative_to(folder)))
    return folder.with_suffix(".zip")


FILES = (
    "a.jpg", "b/c.PNG", "b/d/e.TIFF", "b/Thumbs.db", "f.xml", "g.XML", "none", "._a.jpg", "__MACOSX/b/c.png",
    "book/characters/U+306F/x.jpg", "book/characters/U+306F/y.jpg", "book/images/z.jp2", "h.longest-of-all-suffixes",
)  # fmt: skip


@pytest.mark.parametrize("archived", [False, True])
def test_scans_in_sub_folders_are_listed_and_what_is_not_taken_is_counted(archived: bool, tmp_path: Path) -> None:
    folder = written(tmp_path / "pages", *FILES, ".hidden/a.jpg", "b/.hidden/c.png")
    listing = list_pages(place(zipped(folder) if archived else folder))
    assert list(listing.scans) == ["a.jpg", "b/c.PNG", "b/d/e.TIFF", "book/images/z.jp2"]
    assert set(listing.scans.values()) == {len(jpeg_page())}
    assert listing.ignored == {
        ".db": 1, ".xml": 2, "__MACOSX/": 1, "characters/": 2, "hidden files": 1, "other files": 2,
    }  # fmt: skip


def zip_of(path: Path, *names: bytes) -> Path:
    """Write a zip whose members have these names, without the UTF-8 flag. The content of each member is its name."""
    with zipfile.ZipFile(path, "w") as archive:
        for i, name in enumerate(names):
            archive.writestr(chr(ord("A") + i) * len(name), name)
    data = path.read_bytes()
    for i, name in enumerate(names):
        data = data.replace(chr(ord("A") + i).encode() * len(name), name)
    path.write_bytes(data)
    return path


@pytest.mark.parametrize(
    ("stored", "name"),
    [
        ("源氏/がく_001.jpg".encode("cp932"), "源氏/がく_001.jpg"),
        ("ソ表\\能_1.jpg".encode("cp932"), "ソ表/能_1.jpg"),  # the second byte of ソ, 表 and 能 is a backslash
        ("源氏/がく_001.jpg".encode(), "源氏/がく_001.jpg"),  # macOS: UTF-8 without the flag
        (b"\x82\xff_1.jpg", "é\xa0_1.jpg"),  # CP437: neither UTF-8 nor CP932
        (b"scans\\b\\100.jpg", "scans/b/100.jpg"),
        (b"scans/100.jpg", "scans/100.jpg"),
        (b"./scans/100.jpg", "scans/100.jpg"),
    ],
)
def test_names_in_an_archive_are_read_as_windows_and_macos_write_them(stored: bytes, name: str, tmp_path: Path) -> None:
    archive = place(zip_of(tmp_path / "pages.zip", stored, "表\\".encode("cp932"), b"./"))
    assert list(list_pages(archive).scans) == [name]
    with page_reader(archive) as read:
        assert read(name) == stored


def test_a_member_of_an_archive_without_a_name_is_left_out(tmp_path: Path) -> None:
    path = zip_of(tmp_path / "pages.zip", b"?", b"100.jpg")
    data = path.read_bytes()
    # In its two headers, the name of one byte becomes an extra field of one byte.
    for lengths in (data.index(b"PK\x03\x04") + 26, data.index(b"PK\x01\x02") + 28):
        assert data[lengths : lengths + 4] == b"\1\0\0\0"
        data = data[:lengths] + b"\0\0\1\0" + data[lengths + 4 :]
    path.write_bytes(data)
    assert list(list_pages(place(path)).scans) == ["100.jpg"]


def test_two_names_in_an_archive_that_become_one_are_refused(tmp_path: Path) -> None:
    archive = zip_of(tmp_path / "pages.zip", b"b/1.jpg", b"b\\1.jpg")
    with pytest.raises(InputError, match="must hold one file per page. Received: 'b/1.jpg' twice"):
        list_pages(place(archive))


def test_an_archive_is_known_by_its_suffix_in_any_case(tmp_path: Path) -> None:
    assert list(list_pages(place(zip_of(tmp_path / "PAGES.ZIP", b"a.jpg"))).scans) == ["a.jpg"]


def test_kinds_of_files_that_are_not_taken_are_bounded(tmp_path: Path) -> None:
    folder = written(tmp_path, "a.jpg")
    for i in range(150):
        (folder / f"x.{i:04}").touch()
    ignored = list_pages(place(folder)).ignored
    assert len(ignored) == 101
    assert ignored["other files"] == 50


def test_cyclic_folder_links_are_an_error_in_one_line(tmp_path: Path) -> None:
    written(tmp_path, "a.jpg")
    (tmp_path / "loop").symlink_to(tmp_path)
    with pytest.raises(InputError, match="must have folders at most 32 deep. Received: loop/loop/"):
        list_pages(place(tmp_path))


NFD = unicodedata.normalize("NFD", "がく_001")
NFC = unicodedata.normalize("NFC", "がく_001")


@pytest.mark.parametrize(
    ("files", "ids", "found"),
    [
        (["a.jpg", "b.png"], ["a"], {"a": "a.jpg", "b": "b.png"}),
        (["train_images/a.jpg", "train_images/b.jpg"], ["a"], {"a": "train_images/a.jpg", "b": "train_images/b.jpg"}),
        (["scans/a.jpg", "more/b.jpg"], ["a"], {"a": "scans/a.jpg", "more/b": "more/b.jpg"}),
        (["x/a.jpg", "y/a.jpg"], ["x/a", "y/a"], {"x/a": "x/a.jpg", "y/a": "y/a.jpg"}),
        (["p/x/a.jpg", "p/y/a.jpg"], ["x/a", "p/y/a"], {"x/a": "p/x/a.jpg", "p/y/a": "p/y/a.jpg"}),
        (["a.jpg", "x/a.jpg"], ["a"], {"a": "a.jpg", "x/a": "x/a.jpg"}),
        ([f"{NFD}.jpg"], [NFC], {NFC: f"{NFD}.jpg"}),
        (["源氏_001.jpg", "page 1.jpg"], ["源氏_001", "page 1"], {"源氏_001": "源氏_001.jpg", "page 1": "page 1.jpg"}),
        (["a.jpg"], ["b", "A"], {"a": "a.jpg"}),
        (["c/c/b.jpg", "c/b.jpg"], ["c/b"], {"c/b": "c/b.jpg", "c/c/b": "c/c/b.jpg"}),
    ],
)
def test_an_id_is_the_path_of_its_file_or_a_name_that_occurs_once(
    files: list[str], ids: list[str], found: dict[str, str], tmp_path: Path
) -> None:
    listing = list_pages(place(written(tmp_path, *files)))
    assert {page_id: name for page_id, (name, _) in listing.files_of(ids).items()} == found


@pytest.mark.parametrize(
    ("files", "ids", "says"),
    [
        (["x/a.jpg", "y/a.jpg"], ["a"], "'a', which matches 'x/a.jpg' and 'y/a.jpg'. Name the folder"),
        (["a.jpg", "a.tif"], ["b"], "one file per page. Received: 'a.jpg' and 'a.tif'"),
        ([f"{NFC}.jpg", f"{NFD}.jpg"], [NFC], "one file per page"),
        (["x/a.jpg", "y/b.jpg"], ["a", "x/a"], "one image_id. Received: 'a' and 'x/a' for 'x/a.jpg'"),
    ],
)
def test_an_id_that_two_files_have_is_refused_in_one_line(
    files: list[str], ids: list[str], says: str, tmp_path: Path
) -> None:
    with pytest.raises(InputError, match=says) as caught:
        list_pages(place(written(tmp_path, *files))).files_of(ids)
    assert "\n" not in str(caught.value)


def test_ids_of_labels_are_brought_to_one_form_of_unicode(tmp_path: Path) -> None:
    (tmp_path / "labels.csv").write_text(f"image_id,labels\n{NFD},U+306F 1 2 3 4\nx/源氏 1,\n")
    assert read_labels(place(tmp_path / "labels.csv")).page_ids == ["x/源氏 1", NFC]


# --- boxes that were made for another size of the scan


def labels_of(tmp_path: Path, boxes: dict[str, list[list[int]]], **more: Any) -> Labels:
    rows = "".join(
        f"{page_id},{' '.join('U+306F ' + ' '.join(map(str, box)) for box in found)}\n"
        for page_id, found in boxes.items()
    )
    (tmp_path / "labels.csv").write_text("image_id,labels\n" + rows)
    labels = read_labels(place(tmp_path / "labels.csv"))
    return Labels(**(vars(labels) | more))


def cuts_of(tmp_path: Path, labels: Labels, rescale: bool = False, margin: float = 0.0) -> list[Cut]:
    pages = place(tmp_path / "pages")
    (group,) = group_pages(labels, list_pages(pages).files_of(labels.page_ids), 1, rescale, margin)
    return list(cut_boxes(group, pages))


def test_boxes_for_another_size_are_refused_or_scaled(tmp_path: Path) -> None:
    written(tmp_path / "pages", "a_1.jpg")
    boxes = [[10, 20, 30, 40], [80, 100, 30, 40], [0, 0, 0, 5]]
    whole = cuts_of(tmp_path, labels_of(tmp_path, {"a_1": boxes}, page_sizes={"a_1": (WIDTH, HEIGHT)}))
    halves = [[side // 2 for side in box] for box in boxes]
    half = labels_of(tmp_path, {"a_1": halves}, page_sizes={"a_1": (WIDTH // 2, HEIGHT // 2)})
    with pytest.raises(InputError, match="boxes for 45 x 60 pixels, and a_1.jpg of 90 x 120. Give --rescale") as caught:
        cuts_of(tmp_path, half)
    assert "\n" not in str(caught.value)
    scaled_cuts = cuts_of(tmp_path, half, rescale=True)
    assert [cut.box for cut in scaled_cuts] == halves  # as in the labels
    assert [cut.placed for cut in scaled_cuts] == [*boxes[:2], []]
    for one, other in zip(whole, scaled_cuts, strict=True):
        assert (one.fault, one.clipped) == (other.fault, other.clipped)
        assert one.crop is None or other.crop is None or np.array_equal(one.crop, other.crop)
    turned = labels_of(tmp_path, {"a_1": halves}, page_sizes={"a_1": (HEIGHT, WIDTH)})
    with pytest.raises(InputError, match="of the same shape. Received: boxes for 120 x 90 pixels"):
        cuts_of(tmp_path, turned, rescale=True)


def test_scaled_boxes_hold_all_of_what_they_held() -> None:
    two = Fraction(2)
    assert scaled([10, 20, 30, 40], two, two) == [20, 40, 60, 80]
    assert scaled([1, 1, 1, 1], Fraction(1, 2), Fraction(3, 2)) == [0, 1, 1, 2]
    assert scaled([1, 1, 0, -3], two, two) == [2, 2, 0, -3]


def test_a_scaled_box_that_ends_at_the_edge_of_its_page_ends_there(tmp_path: Path) -> None:
    """In floating-point numbers, 750 x (482 / 750) is more than 482."""
    made_for, size = 750, 482
    (tmp_path / "pages").mkdir()
    Image.new("L", (size, size)).save(tmp_path / "pages" / "a_1.jpg")
    sizes = {"a_1": (made_for, made_for)}
    labels = labels_of(tmp_path, {"a_1": [[10, 10, made_for - 10, made_for - 10]]}, page_sizes=sizes)
    (cut,) = cuts_of(tmp_path, labels, rescale=True)
    assert not cut.clipped
    x, y, width, height = cut.placed
    assert (x + width, y + height) == (size, size)


def test_rescale_without_sizes_to_scale_by_is_refused(tmp_path: Path) -> None:
    written(tmp_path / "pages", "a_1.jpg")
    labels_of(tmp_path, {"a_1": [[1, 1, 9, 9]]})
    with pytest.raises(OptionError, match="--rescale must be given with labels that say the size"):
        make_plan(place(tmp_path / "pages"), place(tmp_path / "labels.csv"), PrepareConfig(rescale=True))


def result(page_id: str, crops: int, without_ink: int) -> PageResult:
    sizes = {"width": 9, "height": 9, "orientation": 1}
    return {"page": page_id, "crops": crops, "without_ink": without_ink, "warnings": [], **sizes}  # type: ignore[typeddict-item]


def test_pages_and_sets_with_too_many_crops_without_ink_are_reported() -> None:
    assert ink_lines(count_ink([])) == ink_lines(InkCount()) == []
    assert ink_lines(count_ink([result("a", 10, 1), result("b", 1000, 49)])) == []
    assert ink_lines(count_ink([result("a", 100, 31), result("b", 1000, 0)])) == [
        "31 % of the 100 crops of a hold no ink: were the boxes made for another size?"
    ]
    count = count_ink([result(f"p{i}", 10, 5) for i in range(30)])
    lines = ink_lines(count)
    assert lines[0] == "50 % of the 300 crops hold no ink: were the boxes made for another size?"
    assert len(lines) == 1 + 10 + 1
    assert lines[-1] == "... and 20 more pages: see `ink` in manifest.json"


def test_many_boxes_that_are_partly_off_their_page_are_reported() -> None:
    assert clipped_line(1, 12) == clipped_line(5, 100) == []
    (line,) = clipped_line(77, 100)
    assert line.startswith("77 % of the 100 boxes are partly off their page: do the labels have right and lower edges")


def test_real_boxes_hold_ink_and_those_for_another_size_do_not(shared: Path, tmp_path: Path) -> None:
    labels = read_labels(place(shared / "train.csv"))
    (group,) = group_pages(labels, list_pages(place(shared / "pages")).files_of(labels.page_ids), 1)
    pages = place(shared / "pages")
    for scale, empty in ((1.0, 0), (0.5, 3), (1.25, 3)):
        group.boxes = np.rint(scale * labels.boxes).astype(np.int32)
        results = {cut.page_id: cut.page for cut in cut_boxes(group, pages) if cut.page}
        assert count_ink(list(results.values())).pages == empty


# --- the cases of `shared/cases`, and a whole dataset


# Cases that give all their boxes. The one whose picture is cut off gives none.
WHOLE = (
    "exif_orientation_6", "extraneous_bytes", "no_end_marker", "bytes_after_the_end", "suffix_JPG", "suffix_jpeg",
    "suffix_png", "suffix_tif", "suffix_TIFF", "suffix_jp2", "suffix_webp", "suffix_bmp", "gray_16_bit_tif",
    "palette_png", "alpha_png", "cmyk_jpeg", "progressive_jpeg", "two_page_tif", "sub_folders", "same_name_twice",
    "japanese_id", "decomposed_id", "space_in_id",
)  # fmt: skip
TOLD = {
    "extraneous_bytes": "24 extraneous bytes", "no_end_marker": "end marker", "gray_16_bit_tif": "gray of 16 bits",
    "two_page_tif": "first of several pages",
}  # fmt: skip


def test_boxes_of_half_the_size_are_refused_with_both_sizes_and_scaled_give_all_crops(cases: Path) -> None:
    pages = place(cases / "coco_of_half_the_size" / "pages")
    labels = read_labels(place(cases / "coco_of_half_the_size" / "labels.json"))
    files = list_pages(pages).files_of(labels.page_ids)
    with pytest.raises(InputError, match="boxes for 1196 x 1937 pixels, and .*jpg of 2392 x 3874. Give --rescale"):
        list(cut_boxes(group_pages(labels, files, 1)[0], pages))
    cuts = list(cut_boxes(group_pages(labels, files, 1, rescale=True)[0], pages))
    assert len(cuts) == len(labels.boxes)
    assert all(cut.crop is not None for cut in cuts)


def test_the_plan_of_sub_folders_has_the_book_and_counts_what_is_no_page_of_the_labels(cases: Path) -> None:
    case = cases / "sub_folders"
    plan = make_plan(place(case / "pages"), place(case / "labels.csv"), PrepareConfig())
    assert (plan.books, plan.unlabelled, plan.losses) == (["scans"], ["more/other_001"], [])
    tree = place(cases / "codh_tree" / "pages")
    plan = make_plan(tree, tree, PrepareConfig())
    assert (plan.books, plan.ignored, plan.losses) == (["100241706"], {".csv": 1, "characters/": 1}, [])


def test_the_ink_of_a_box_is_not_that_of_its_margin(tmp_path: Path) -> None:
    pixels = np.full((100, 100), 200, np.uint8)
    pixels[:, 60:] = 0
    (tmp_path / "pages").mkdir()
    Image.fromarray(pixels).save(tmp_path / "pages" / "a.png")
    (cut,) = cuts_of(tmp_path, labels_of(tmp_path, {"a": [[20, 20, 40, 40]]}), margin=0.25)
    assert cut.crop is not None
    assert cut.crop.min() == 0  # the ink of the margin
    assert cut.page is not None
    assert cut.page["without_ink"] == 1


@pytest.mark.long
@pytest.mark.parametrize("folder", ["", "real"])
def test_the_real_pages_give_all_their_boxes_and_all_hold_ink(folder: str, shared: Path) -> None:
    pages, labels = place(shared / folder / "pages"), read_labels(place(shared / folder / "train.csv"))
    (group,) = group_pages(labels, list_pages(pages).files_of(labels.page_ids), 1)
    cuts = list(cut_boxes(group, pages))
    assert len(cuts) == len(labels.boxes)
    assert not any(cut.fault or cut.clipped for cut in cuts)
    assert count_ink(list({cut.page_id: cut.page for cut in cuts if cut.page}.values())).without_ink == 0


def test_each_sample_file_gives_the_expected_crops(cases: Path) -> None:
    expected: dict[tuple[int, ...], NDArray[np.uint8]] = {}
    for case in ("bytes_after_the_end", "cut_off_in_the_middle", *WHOLE):
        labels = read_labels(place(cases / case / "labels.csv"))
        pages = place(cases / case / "pages")
        (group,) = group_pages(labels, list_pages(pages).files_of(labels.page_ids), 1)
        cuts = list(cut_boxes(group, pages))
        crops = {tuple(cut.box): cut.crop for cut in cuts if cut.crop is not None}
        expected = expected or crops
        assert sum(cut.crop is not None for cut in cuts) == len(labels.boxes) * (case in WHOLE), case
        results = {cut.page_id: cut.page for cut in cuts if cut.page}
        found_warnings = [what for found in results.values() for what in found["warnings"]]
        assert len(found_warnings) == (case in TOLD)
        assert all(what.startswith(TOLD[case]) for what in found_warnings)
        assert {found["orientation"] for found in results.values()} <= {6 if case == "exif_orientation_6" else 1}
        assert all(found["without_ink"] == 0 for found in results.values())
        if case not in ("palette_png", "alpha_png", "progressive_jpeg"):
            worst = max((np.abs(crops[box].astype(np.int64) - expected[box]).mean() for box in crops), default=0)
            assert worst < 5, case


def test_a_dataset_and_its_report_list_warnings_and_crops_without_ink(
    ray_here: None, tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    from job.report.dataset import dataset_report

    pages = written(tmp_path / "pages", "x/源氏_1.jpg", "x/Thumbs.db")
    (pages / "x/b_2.tif").write_bytes(
        saved(
            picture().transpose(Image.Transpose.ROTATE_90),
            "TIFF",
            exif=exif(6),
            save_all=True,
            append_images=[picture()],
        )
    )
    (pages / "x/c_3.png").write_bytes(saved(Image.new("L", (WIDTH, HEIGHT), 200), "PNG"))
    boxes = [[5 * i, 6 * i, 30, 40] for i in range(10)]
    labels_of(tmp_path, {"源氏_1": boxes, "x/b_2": boxes, "c_3": boxes})
    monkeypatch.setattr("preprocessing.prepare.log.propagate", True)
    caplog.set_level("INFO", "kuzushiji")
    source = place(pages), place(tmp_path / "labels.csv")
    manifest, _ = prepare(*source, place(tmp_path / "out"), PrepareConfig())
    line = "100 % of the 10 crops of c_3 hold no ink: were the boxes made for another size?"
    assert manifest.ignored == {".db": 1}
    assert manifest.warnings == [{"page": "x/b_2", "what": "first of several pages of a TIFF file"}]
    assert [page["page"] for page in manifest.ink.listed] == ["c_3"]
    assert (manifest.ink.crops, manifest.ink.without_ink) == (30, 10)
    for text in (
        caplog.text,
        (tmp_path / "out" / "README.md").read_text(),
        dataset_report(place(tmp_path / "out")).decode(),
    ):
        assert line in text
    assert "1 .db" in caplog.text
    found = {page["page"]: page for page in results_of_table(place(tmp_path / "out" / "pages.parquet"))}
    assert {page_id: page["orientation"] for page_id, page in found.items()} == {"c_3": 1, "x/b_2": 6, "源氏_1": 1}
    assert {(page["width"], page["height"]) for page in found.values()} == {(WIDTH, HEIGHT)}
    # Repaired, the dataset is the same.
    before = (tmp_path / "out" / "manifest.json").read_bytes()
    next((tmp_path / "out").glob("*train.tfrecord*")).unlink()
    prepare(*source, place(tmp_path / "out"), PrepareConfig())
    assert (tmp_path / "out" / "manifest.json").read_bytes() == before
    assert read_manifest(place(tmp_path / "out"), DatasetManifest).ink == manifest.ink
