"""The forms of labels: each form gives the same boxes, and a malformed file gives one line that says where."""

import csv
import json
import zipfile
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
from fuzz import LABEL_FORMS, Row, write_form
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from cluster.errors import InputError, OptionError
from cluster.places import place
from preprocessing.books import book_of
from preprocessing.config import PrepareConfig
from preprocessing.cutting import cut_boxes
from preprocessing.exif import ORIENTATION
from preprocessing.groups import group_pages
from preprocessing.input import check_sizes_are_stated
from preprocessing.labels import json_files, table
from preprocessing.labels.code_points import UNKNOWN, parse_character
from preprocessing.labels.crops import read_crops
from preprocessing.labels.json_files import shown
from preprocessing.labels.read import read_labels
from preprocessing.labels.table import Labels, whole_pixels
from preprocessing.pages import HEADER_BYTES, list_pages, size_reader
from preprocessing.plan import make_plan
from preprocessing.scan import scan_size

SIZE = (2400, 3900)  # of all pages here, unless a test says otherwise


def read(*paths: Path, bare: bool = False, canvases: Path | None = None) -> Labels:
    option = "--boxes" if bare else "--labels"
    return read_labels([place(path) for path in paths], option, bare, lambda _: SIZE, canvases and place(canvases))


def refused(*paths: Path, says: str, bare: bool = False, canvases: Path | None = None) -> str:
    with pytest.raises((InputError, OptionError), match=says) as caught:
        read(*paths, bare=bare, canvases=canvases)
    text = str(caught.value)
    assert len(text.splitlines()) == 1
    assert len(text) < 1000
    return text


def assert_same(labels: Labels, other: Labels) -> None:
    assert labels.page_ids == other.page_ids
    assert labels.starts.tolist() == other.starts.tolist()
    assert labels.code_points.tolist() == other.code_points.tolist()
    assert labels.boxes.tolist() == other.boxes.tolist()


def rows_of(path: Path, most: int = 12) -> dict[str, list[Row]]:
    """Return the first pages of a file in Kaggle's form, read without our code."""
    csv.field_size_limit(1 << 20)
    with path.open(newline="") as stream:
        cells = [(row["image_id"], row["labels"].split()) for row in csv.DictReader(stream)]
    rows = {}
    for page_id, cell in cells[:most]:
        boxes = [(int(cell[i][2:], 16), *map(int, cell[i + 1 : i + 5])) for i in range(0, len(cell), 5)]
        rows[page_id] = [(code, x, y, w, h) for code, x, y, w, h in boxes]
    return rows


PAGES: dict[str, list[Row]] = {
    "100241706_00004_2": [(0x306F, 1231, 3465, 133, 53), (0x304C, 275, 1652, 84, 69), (0x306F, 0, 0, 1, 1)],
    "100241706_00005_1": [(0x20B9F, 5, 6, 70, 80)],
}


@pytest.mark.parametrize("form", LABEL_FORMS)
@pytest.mark.parametrize("name", ["train.csv", "real/train.csv"])
def test_real_rows_are_the_same_in_every_form(form: str, name: str, shared: Path, tmp_path: Path) -> None:
    rows = rows_of(shared / name)
    assert_same(read(write_form(form, rows, tmp_path, SIZE)), read(write_form("kaggle", rows, tmp_path / "k", SIZE)))
    assert sum(map(len, rows.values())) > 200


@pytest.mark.parametrize("form", LABEL_FORMS)
def test_a_folder_and_a_zip_of_labels_are_read_as_their_files(form: str, tmp_path: Path) -> None:
    one, two = ({page_id: rows} for page_id, rows in PAGES.items())
    for i, page in enumerate((one, two)):
        write_form(form, page, tmp_path / "labels" / str(i), SIZE, names_of=PAGES)
    (tmp_path / "labels" / "README.md").write_text("# notes")
    with zipfile.ZipFile(tmp_path / "labels.zip", "w") as archive:
        for path in sorted((tmp_path / "labels").rglob("*.*")):
            archive.write(path, path.relative_to(tmp_path / "labels"))
    whole = read(write_form("kaggle", PAGES, tmp_path / "k", SIZE))
    folder, packed = read(tmp_path / "labels"), read(tmp_path / "labels.zip")
    several = read(tmp_path / "labels" / "0", tmp_path / "labels" / "1")
    for labels in (folder, packed, several):
        assert_same(labels, whole)
    assert folder.sha256 == packed.sha256


@pytest.mark.parametrize("case", ["decimals", "utf_16", "codh_csv", "codh_tree", "coco", "yolo", "iiif_curation"])
def test_the_labels_of_each_case_are_those_of_the_page(case: str, cases: Path) -> None:
    whole = read(cases / "no_end_marker" / "labels.csv")
    (given,) = list((cases / case).glob("labels*")) or [cases / case / "pages"]
    pages = place(cases / "no_end_marker" / "pages")
    with size_reader(pages, lambda: list_pages(pages)) as size_of:
        assert_same(read_labels(place(given), size_of=size_of), whole)


def test_the_case_of_fractions_is_refused_and_that_of_another_size_says_it(cases: Path) -> None:
    refused(cases / "fractions" / "labels.csv", says="line 2: x, y, width and height must be whole numbers of pixels")
    half, coco = (read(cases / name / "labels.json").page_sizes for name in ("coco_of_half_the_size", "coco"))
    assert half == {page_id: (w // 2, h // 2) for page_id, (w, h) in coco.items()}


BOX = st.tuples(
    st.sampled_from([0x306F, 0x4E00, 0x20B9F, 0x3099, 0xFA19]),
    st.integers(0, 2000), st.integers(0, 3000), st.integers(1, 400), st.integers(1, 900),
)  # fmt: skip
TABLES = st.dictionaries(
    st.from_regex(r"[A-Za-z0-9_][A-Za-z0-9_-]{0,20}", fullmatch=True).filter(lambda name: name.lower() != "classes"),
    st.lists(BOX, min_size=1, max_size=4), min_size=1, max_size=4,
)  # fmt: skip


@pytest.mark.parametrize("form", LABEL_FORMS)
@given(rows=TABLES)
def test_any_boxes_are_read_back_from_every_form(
    form: str, tmp_path_factory: pytest.TempPathFactory, rows: dict[str, list[Row]]
) -> None:
    labels = read(write_form(form, rows, tmp_path_factory.mktemp("form"), SIZE))
    assert labels.page_ids == sorted(rows)
    boxes = [row for page_id in sorted(rows) for row in rows[page_id]]
    assert labels.code_points.tolist() == [row[0] for row in boxes]
    assert labels.boxes.tolist() == [list(row[1:]) for row in boxes]


def test_a_folder_of_two_forms_is_refused_with_a_file_of_each(tmp_path: Path) -> None:
    for form in ("codh", "kaggle"):
        write_form(form, PAGES, tmp_path / form, SIZE)
    text = refused(tmp_path, says="--labels must be files of one form")
    assert "_coordinate.csv (CODH's CSV)" in text
    assert "train.csv (Kaggle's CSV)" in text
    write_form("curation", PAGES, tmp_path / "json", SIZE)
    write_form("coco", PAGES, tmp_path / "json" / "more", SIZE)
    text = refused(tmp_path / "json", says="--labels must be files of one form")
    assert "curation.json (a IIIF Curation)" in text
    assert "coco.json (COCO)" in text


def test_a_page_in_two_files_is_refused_with_both(tmp_path: Path) -> None:
    for folder in ("a", "b"):
        write_form("kaggle", PAGES, tmp_path / folder, SIZE)
    text = refused(tmp_path, says="a page must be in one label file only")
    assert "a/train.csv and" in text


def test_unknown_label_files_are_refused_and_notes_are_ignored(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    write_form("kaggle", PAGES, tmp_path, SIZE)
    for name in ("README.md", "unicode_translation.csv", ".DS_Store", "scan.jpg", "LICENSE"):
        (tmp_path / name).write_text("nothing")
    read(tmp_path)
    assert "3 files next to the labels are ignored: " in caplog.text
    for name in ("more.csv", "MORE.CSV", "more.Json"):
        (tmp_path / name).write_text("image,labels\n")
        refused(tmp_path, says=f"{name} must begin with the header image_id,labels, or be labels of another form")
        (tmp_path / name).unlink()
    assert "'<xml/>'" in refused(written(tmp_path / "x.xml", "<xml/>"), says="must begin with the header")


def written(path: Path, text: str | bytes) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return path


@pytest.mark.parametrize(
    ("header", "says"),
    [
        (
            "画像,文字,左,上,右,下",
            "the columns Unicode, Image, X, Y, Width and Height, .* Received: '画像,文字,左,上,右,下'",
        ),
        ("Image,Unicode,X,Y,Widht,Height", r"Missing: Width\. See docs/data.md"),
        ("Image;Unicode;X;Y;Width;Height", "Save the spreadsheet with commas"),
    ],
)
def test_a_spreadsheet_with_a_wrong_header_is_refused_with_what_to_change(
    header: str, says: str, tmp_path: Path
) -> None:
    refused(written(tmp_path / "sheet.csv", f"{header}\r\n".encode("cp932")), says=says)


@pytest.mark.parametrize("content", [b"text", bytes(range(256))])  # the first could be read as CP932
def test_a_spreadsheet_that_was_not_saved_as_csv_is_refused_with_what_to_do(content: bytes, tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "sheet.xlsx", "w") as archive:
        archive.writestr("xl/workbook.xml", content)
    refused(tmp_path / "sheet.xlsx", says="a zip archive, such as .xlsx: save the spreadsheet as CSV in UTF-8")


def test_characters_that_an_encoding_replaced_are_a_warning(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    rows = "image_id,labels\na,U+306F 1 2 3 4\nb,U+003F 1 2 3 4 U+FFFD 5 6 7 8 U+3013 5 6 7 8\n"
    labels = read(written(tmp_path / "train.csv", rows))
    assert labels.warnings == [("b", "3 boxes with the character ?, U+FFFD or 〓")]
    assert "3 boxes with the character ?, U+FFFD or 〓" in caplog.text
    assert "first on page b" in caplog.text


@pytest.mark.parametrize("text", [" ", "\u3000", "\u200b", "\n", "\x00"])
def test_an_invisible_character_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="a character must be visible. Received: U"):
        parse_character(text)
    assert parse_character("か\u3099") == ord("が")
    assert [parse_character(one) for one in ("〱", "々", "゛", "U+3000")] == [0x3031, 0x3005, 0x309B, 0x3000]


@pytest.mark.parametrize(
    ("labels", "note", "text"),
    [
        ("train.csv", "README.md", "[![Licence](x)](y)"),
        ("coco.json", "notes.txt", "[x] done\n[ ] to do"),
        ("coco.json", "readme", "{a}"),
    ],
)
def test_notes_that_begin_with_a_bracket_are_no_labels(labels: str, note: str, text: str, tmp_path: Path) -> None:
    content = "image_id,labels\na_1,U+306F 1 2 3 4\n" if labels == "train.csv" else json.dumps(coco_of())
    written(tmp_path / "labels" / labels, content)
    written(tmp_path / "labels" / note, text)
    assert read(tmp_path / "labels").code_points.tolist() == [0x306F]


@pytest.mark.parametrize("name", ["a.json", "readme_pages.json", "b.txt", "c.coco", "d"])
def test_coco_is_recognized_by_its_content_whatever_its_name(name: str, tmp_path: Path) -> None:
    written(tmp_path / "labels" / name, json.dumps(coco_of()))
    assert read(tmp_path / "labels").code_points.tolist() == [0x306F]


# --- Kaggle's CSV


@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-le", "utf-16-be", "cp932", "utf-8-sig"])
def test_label_files_in_windows_encodings_are_read(encoding: str, tmp_path: Path) -> None:
    text = "image_id,labels\r\na,U+306F 1 2 3 4\r\n"
    assert read(written(tmp_path / "train.csv", text.encode(encoding))).boxes.tolist() == [[1, 2, 3, 4]]


def test_an_encoding_that_is_not_read_is_named(tmp_path: Path) -> None:
    refused(written(tmp_path / "a.csv", b"image_id,labels\na,\x81 1"), says="must be text in UTF-8, UTF-16 or CP932")


def test_cp932_text_is_read_as_what_it_says(tmp_path: Path) -> None:
    header, row = "Unicode,Image,X,Y,備考,Width,Height\n", "U+306F,a,1,2,は,3,4\n"
    labels = read(written(tmp_path / "a_coordinate.csv", (header + row).encode("cp932")))
    assert labels.boxes.tolist() == [[1, 2, 3, 4]]


def test_whole_numbers_may_be_written_as_decimals(tmp_path: Path) -> None:
    labels = read(written(tmp_path / "a.csv", "image_id,labels\na,U+306F 572.0 2.00 -3.0 4\n"))
    assert labels.boxes.tolist() == [[572, 2, -3, 4]]
    refused(written(tmp_path / "a.csv", "image_id,labels\na,U+306F 572.5 2 3 4\n"), says="line 2: .* whole numbers")
    refused(written(tmp_path / "a.csv", "image_id,labels\na,U+306F 1e3 2 3 4\n"), says="line 2: .* whole numbers")


# --- CODH


CODH = "Unicode,Image,X,Y,Block ID,Char ID,Width,Height\n"


def test_codh_files_tell_the_book(tmp_path: Path) -> None:
    tree = tmp_path / "tree"
    written(tree / "brsk00000/brsk00000_coordinate.csv", CODH + "U+306F,brsk001-003,1,2,B1,C1,3,4\n")
    written(tree / "200003076/200003076_coordinate.csv", CODH + "U+306F,200003076_00002_1,5,6,B1,C1,7,8\n")
    written(tree / "200003076/images/200003076_00002_1.jpg", "no labels")
    written(tree / "200003076/characters/U+306F/labels.csv", "left aside")
    labels = read(tree)
    assert labels.page_ids == ["200003076_00002_1", "brsk001-003"]
    assert labels.books == {"brsk001-003": "brsk00000", "200003076_00002_1": "200003076"}
    assert labels.boxes.tolist() == [[5, 6, 7, 8], [1, 2, 3, 4]]


@pytest.mark.parametrize(
    ("rows", "says"),
    [
        ("U+306F,a,1,2,B,C,3\n", "line 2: a row must have 8 columns"),
        ("U+306F,a,1,2,B,C,3,x\n", "line 2: x, y, width and height must be whole numbers"),
        ("306F,a,1,2,B,C,3,4\n", "line 2: a character must be one character or look like"),
        (",a,1,2,B,C,3,4\n", "line 2: a character must be one character or look like"),
        ("U+306F,../a,1,2,B,C,3,4\n", "line 2: an image_id must"),
        ('U+306F,"a,1,2,B,C,3,4\n', "line 2: not CSV"),
        ("", "at least one page must have a labelled box"),
    ],
)
def test_a_malformed_row_of_codh_is_refused_with_its_line(rows: str, says: str, tmp_path: Path) -> None:
    refused(written(tmp_path / "a_coordinate.csv", CODH + rows), says=says)


def test_boxes_in_codh_form_may_have_no_characters(tmp_path: Path) -> None:
    path = written(tmp_path / "boxes.csv", "Image,X,Y,Width,Height\na.jpg,1,2,3,4\n")
    labels = read(path, bare=True)
    assert (labels.page_ids, labels.code_points.tolist()) == (["a"], [UNKNOWN])
    refused(path, says="line 1: the header must name Unicode")


# --- COCO


def coco_of(**changes: Any) -> dict[str, Any]:
    return {
        "images": [{"id": 7, "file_name": "a_1.jpg", "width": 200, "height": 300}],
        "categories": [{"id": 1, "name": "は"}],
        "annotations": [{"id": 1, "image_id": 7, "category_id": 1, "bbox": [1, 2, 3, 4]}],
    } | changes


def annotation(**changes: Any) -> dict[str, Any]:
    return coco_of(annotations=[coco_of()["annotations"][0] | changes])


def json_file(path: Path, content: Any) -> Path:
    return written(path, json.dumps(content, ensure_ascii=False))


def test_coco_tells_the_size_of_pages_and_has_pages_without_boxes(tmp_path: Path) -> None:
    images = [{"id": "x", "file_name": "b.PNG"}, {"id": 7, "file_name": "a_1.jpg", "width": 200, "height": 300}]
    labels = read(json_file(tmp_path / "coco.json", coco_of(images=images)))
    assert labels.page_ids == ["a_1", "b"]
    assert labels.boxes_per_page.tolist() == [1, 0]
    assert labels.page_sizes == {"a_1": (200, 300)}


@pytest.mark.parametrize(
    ("sides", "size"),
    [
        ({"width": 2392.0, "height": 3e2}, {"a_1": (2392, 300)}),
        ({"width": 0, "height": 0.0}, {}),
        ({"width": None}, {}),
    ],
)
def test_a_size_may_be_written_as_decimals_or_not_be_stated(
    sides: dict[str, Any], size: dict[str, tuple[int, int]], tmp_path: Path
) -> None:
    images = [{"id": 7, "file_name": "a_1.jpg"} | sides]
    assert read(json_file(tmp_path / "coco.json", coco_of(images=images))).page_sizes == size
    curation = json_file(tmp_path / "curation.json", curation_of(canvas_box(**sides)))
    assert read(curation).page_sizes == size


@pytest.mark.parametrize("side", ["2392", 2392.5, -1, True, [], 10**12])
def test_a_size_that_is_no_number_of_pixels_is_refused(side: Any, tmp_path: Path) -> None:
    rule = "'width' and 'height' must be whole numbers of pixels, 0 or left out. Received: "
    images = [{"id": 7, "file_name": "a_1.jpg", "width": 200, "height": side}]
    refused(json_file(tmp_path / "coco.json", coco_of(images=images)), says=rf"images\[0\]: {rule}")
    curation = json_file(tmp_path / "curation.json", curation_of(canvas_box(width=side)))
    refused(curation, says=rf"members\[0\]: {rule}")


@pytest.mark.parametrize(
    ("bbox", "box", "warned"),
    [
        ([1.5, 2.25, 3, 4.5], [1, 2, 4, 5], True),
        ([1.0, 2.0, 3.0, 4.0], [1, 2, 3, 4], False),
        ([0.9999999998, 2, 3.0000000001, 4], [1, 2, 3, 4], False),  # 1 and 3, written by tools that compute in shares
        ([-1.5, 2, 3, 4], [-2, 2, 4, 4], True),
        ([10.5, 2, 0, 4], [10, 2, 0, 4], True),  # a box without area stays without
        ([10.5, 2, -0.25, 4], [10, 2, 0, 4], True),
    ],
)
def test_fractions_move_near_edges_down_and_far_edges_up_and_are_counted(
    bbox: list[float], box: list[int], warned: bool, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    labels = read(json_file(tmp_path / "coco.json", annotation(bbox=bbox)))
    assert labels.boxes.tolist() == [box]
    warning = "1 box in fractions of pixels, rounded outwards"
    assert list(labels.warnings) == ([("a_1", warning)] if warned else [])
    assert ("1 page with boxes in fractions of pixels" in caplog.text) == warned


@given(st.lists(st.tuples(*[st.floats(-1e4, 1e4)] * 2, *[st.floats(0, 1e4)] * 2), max_size=5))
def test_whole_boxes_cover_those_with_fractions_by_less_than_a_pixel(boxes: list[tuple[float, ...]]) -> None:
    given_boxes = np.array(boxes, np.float64).reshape(-1, 4)
    whole, widened = whole_pixels(given_boxes)
    near, far = given_boxes[:, :2], given_boxes[:, :2] + given_boxes[:, 2:]
    assert (np.abs(whole[:, :2] - near) < 1).all()
    has_area = given_boxes[:, 2:] > 0
    assert (np.abs(whole[:, :2] + whole[:, 2:] - far)[has_area] <= 1).all()
    assert (whole[:, :2] <= near + table.TOLERANCE).all()
    assert (whole[:, :2] + whole[:, 2:] >= far - table.TOLERANCE)[has_area].all()
    assert (whole[:, 2:][~has_area] <= 0).all()
    assert len(widened) == len(boxes)


@pytest.mark.parametrize("name", ["は", "U+306F", "は ", "\u306f\n"])
def test_a_category_is_named_by_its_character_or_code_point(name: str, tmp_path: Path) -> None:
    labels = read(json_file(tmp_path / "coco.json", coco_of(categories=[{"id": 1, "name": name}])))
    assert labels.code_points.tolist() == [0x306F]


def test_a_decomposed_character_is_composed_and_a_single_ideograph_stays(tmp_path: Path) -> None:
    for name, code_point in (("か\u3099", 0x304C), ("\ufa19", 0xFA19)):
        labels = read(json_file(tmp_path / "coco.json", coco_of(categories=[{"id": 1, "name": name}])))
        assert labels.code_points.tolist() == [code_point]


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (annotation(bbox=[1, 2, 3]), r"annotations\[0\].bbox: a box must be \[x, y, width, height\]"),
        (annotation(bbox=None), r"annotations\[0\].bbox"),
        (annotation(bbox=[1, 2, 3, True]), r"annotations\[0\].bbox"),
        (annotation(bbox=[1, 2, 3, "4"]), r"annotations\[0\].bbox"),
        (annotation(bbox=[1, 2, 3, 10**12]), r"annotations\[0\].bbox"),
        (annotation(bbox=[1, 2, 3, 10**400]), r"annotations\[0\].bbox"),
        (annotation(image_id=8), r"annotations\[0\]: 'image_id' must be the id of an image. Received: 8"),
        (annotation(image_id=[]), r"annotations\[0\]: 'image_id'"),
        (annotation(category_id=9), r"annotations\[0\]: 'category_id' must be the id of a category"),
        (annotation(category_id={}), r"annotations\[0\]: 'category_id'"),
        (coco_of(annotations=[3]), r"annotations\[0\]: must be an object. Received: 3"),
        (coco_of(annotations=[[1, 2, 3, 4]]), r"annotations\[0\]: must be an object. Received: \[1, 2, 3, 4\]"),
        ([[1, 2, 3, 4]], r"\[0\]: must be an object. Received: \[1, 2, 3, 4\]"),
        (coco_of(annotations={}), "the file: must have 'annotations', a list"),
        (coco_of(images=None), "the file: must have 'images', a list"),
        (coco_of(images=[3]), r"images\[0\]: 'id' must be"),
        (coco_of(images=[{"id": 7}]), r"images\[0\]: must have 'file_name', a string"),
        (coco_of(images=[{"id": 7, "file_name": "../a.jpg"}]), r"images\[0\]: its file must name a page"),
        (
            coco_of(images=[{"id": 7, "file_name": "a.jpg"}] * 2),
            r"images\[1\]: 'id' must be a unique number or string",
        ),
        (coco_of(images=[{"id": i, "file_name": "a.jpg"} for i in (7, 8)]), "images: a file must be listed once"),
        (coco_of(categories=[{"id": 1, "name": "text"}]), "the name of category 1 must be a character or U.306F"),
        (coco_of(categories=[{"id": 1}]), r"categories\[0\]: must have 'name', a string"),
        (coco_of(annotations=[]), "at least one page must have a labelled box"),
        ({"shapes": []}, "must have `images` and `annotations`"),
        ({}, "must have `images` and `annotations`"),
    ],
)
def test_what_is_malformed_in_coco_is_refused_with_its_place(content: Any, says: str, tmp_path: Path) -> None:
    refused(json_file(tmp_path / "coco.json", content), says=says)


@pytest.mark.parametrize("text", ["{", "[" * 100_000, '{"images": NaN}', '{"a": "\\ud800"}', "{} {}", "[" + "9" * 5000])
def test_what_is_no_json_is_refused_in_one_line(text: str, tmp_path: Path) -> None:
    refused(written(tmp_path / "coco.json", text), says="must be JSON. Received: ")


def test_a_list_of_detections_is_read_with_the_names_of_pages(tmp_path: Path) -> None:
    found = [{"image_id": 7, "category_id": 1, "bbox": [1.5, 2, 3, 4], "score": 0.9}]
    detections, named = json_file(tmp_path / "found.json", found), json_file(tmp_path / "names.json", coco_of())
    labels = read(detections, named, bare=True)
    assert (labels.page_ids, labels.boxes.tolist()) == (["a_1"], [[1, 2, 4, 4]])
    assert labels.code_points.tolist() == [0x306F]
    assert read(detections, named).code_points.tolist() == [0x306F]
    refused(detections, says=r"\[0\]: a detection must name its page: with a 'file_name'.* Received: 7", bare=True)
    for key in ("file_name", "image_id"):
        labels = read(json_file(tmp_path / "more.json", [found[0] | {key: "b_2.jpg"}]), bare=True)
        assert (labels.page_ids, labels.code_points.tolist()) == (["b_2"], [UNKNOWN])
    refused(tmp_path / "more.json", says="'category_id' must be the id of a category")
    refused(detections, named, json_file(tmp_path / "n.json", coco_of()), says="at most one file of images", bare=True)
    refused(json_file(tmp_path / "x.json", ["x"]), says=r"\[0\]: must be an object", bare=True)


def test_categories_that_are_no_characters_are_boxes_to_be_read(tmp_path: Path) -> None:
    path = json_file(tmp_path / "coco.json", coco_of(categories=[{"id": 1, "name": "kuzushiji"}]))
    assert read(path, bare=True).code_points.tolist() == [UNKNOWN]


def test_a_coco_file_of_a_public_tool_is_read(tmp_path: Path) -> None:
    """Globox converts YOLO to COCO, as users do."""
    from globox import AnnotationSet

    yolo = write_form("yolo", PAGES, tmp_path, SIZE)
    images = tmp_path / "images"
    images.mkdir()
    for page_id in PAGES:
        cv2.imwrite(str(images / f"{page_id}.jpg"), np.zeros((SIZE[1], SIZE[0]), np.uint8))
    numbers = {str(i): name for i, name in enumerate((yolo / "classes.txt").read_text().split())}
    (yolo / "classes.txt").unlink()
    annotations = AnnotationSet.from_yolo_v5(yolo / "labels", image_folder=images).map_labels(numbers)
    annotations.save_coco(tmp_path / "coco.json", auto_ids=True)
    labels = read(tmp_path / "coco.json")
    assert labels.page_sizes == dict.fromkeys(PAGES, SIZE)
    whole = read(write_form("kaggle", PAGES, tmp_path / "k", SIZE))
    assert labels.code_points.tolist() == whole.code_points.tolist()
    assert np.abs(labels.boxes - whole.boxes).max() <= 1


# --- YOLO


def yolo_of(folder: Path, lines: str, names: str | None = "は\nが\n") -> Path:
    written(folder / "labels" / "a_1.txt", lines)
    if names is not None:
        written(folder / "classes.txt", names)
    return folder


def test_yolo_boxes_are_scaled_to_the_page(tmp_path: Path) -> None:
    labels = read(yolo_of(tmp_path, "1 0.5 0.25 0.1 0.01 0.987\n\n0 .0005 5e-4 .001 .001\n"))
    assert labels.code_points.tolist() == [0x304C, 0x306F]
    assert labels.boxes.tolist() == [[1080, 956, 240, 39], [0, 0, 2, 4]]
    assert labels.page_sizes == {}


@pytest.mark.parametrize(
    "names",
    [
        "names: [は, U+304C]\n",
        "names:\n  0: は\n  1: が\n",
        "path: x\nnames:\n- は\n- が\n",
        "date: !!timestamp x\nnames: {'1': が, 0: !!bool は}\n",  # all are strings, whatever their tags say
    ],
)
def test_yolo_classes_may_be_named_in_yaml(names: str, tmp_path: Path) -> None:
    yolo_of(tmp_path, "1 0.5 0.25 0.1 0.01\n", names=None)
    written(tmp_path / "data.yaml", names)
    assert read(tmp_path).code_points.tolist() == [0x304C]


def test_yolo_pages_without_boxes_and_notes_are_told_apart(tmp_path: Path) -> None:
    yolo_of(tmp_path, "1 0.5 0.25 0.1 0.01\n")
    for name, text in (("b_2.txt", ""), ("train.txt", "images/a_1.jpg\n"), ("README.txt", "notes\n")):
        written(tmp_path / "labels" / name, text)
    labels = read(tmp_path)
    assert (labels.page_ids, labels.boxes_per_page.tolist()) == (["a_1", "b_2"], [1, 0])
    written(tmp_path / "labels" / "c_3.txt", "one 0.5 0.25 0.1 0.01\n")
    refused(tmp_path, says=r"c_3.txt, line 1: a box must be its class and four fractions")


def test_notes_json_of_a_yolo_export_is_ignored_and_upper_case_names_are_read(tmp_path: Path) -> None:
    yolo_of(tmp_path, "1 0.5 0.25 0.1 0.01\n")
    written(tmp_path / "notes.json", '{"categories": []}')
    written(tmp_path / "labels" / "B_2.TXT", "")
    assert read(tmp_path).page_ids == ["B_2", "a_1"]
    written(tmp_path / "labels" / "C_3.TXT", "one 0.5 0.25 0.1 0.01\n")
    refused(tmp_path, says=r"C_3.TXT, line 1: a box must be its class and four fractions")
    refused(tmp_path / "notes.json", says="notes.json must have `images` and `annotations`")


def test_the_digest_of_labels_does_not_depend_on_the_folders_of_files_of_one_name(tmp_path: Path) -> None:
    texts = [f"image_id,labels\n{page_id},U+306F 1 2 3 4\n" for page_id in "pq"]
    digests = set()
    for way, order in (("there", texts), ("back", texts[::-1])):
        files = [written(tmp_path / way / folder / "train.csv", text) for folder, text in zip("ab", order, strict=True)]
        digests.add(read(*files).sha256)
    assert len(digests) == 1


@pytest.mark.parametrize(
    ("lines", "names", "says"),
    [
        ("0 .5 .5 .1 .1\n0 .5 .5 .1\n", "は", "a_1.txt, line 2: a box must be its class and four fractions"),
        ("0 .5 .5 .1 .1 .1 .1\n", "は", "line 1: a box must be"),
        ("0 1231 3465 133 53\n", "は", "line 1: a box must be its class and four fractions of the page, from 0 to 1"),
        ("0 .5 .5 .1 1e999\n", "は", "line 1: a box must be"),
        ("1 .5 .5 .1 .1\n", "は", "a class must be one of the 1 names. Received: 1"),
        ("0 .5 .5 .1 .1\n", None, "YOLO labels must have their class names next to them"),
        ("0 .5 .5 .1 .1\n", "text", "classes.txt, class 0: a character must be one character or look like U.306F"),
    ],
)
def test_what_is_malformed_in_yolo_is_refused_with_its_line(
    lines: str, names: str | None, says: str, tmp_path: Path
) -> None:
    refused(yolo_of(tmp_path, lines, names), says=says)


# Each list holds the one before it ten times: expanded, the last one has 10**20 values.
LAUGHS = "a0: &a0 [は]\n" + "".join(f"a{i}: &a{i} [{f'*a{i - 1}, ' * 10}]\n" for i in range(1, 21)) + "names: [*a20]\n"


@pytest.mark.parametrize(
    ("names", "says"),
    [
        ("names: は\n", "must have `names`"),
        ("{", "must be YAML"),
        ("names: [[]]\n", "must have `names`"),
        ("names: {0: は, 2: が}\n", "must have `names`"),
        ("names: {0: は, 00: が}\n", "must have `names`"),
        ("names: !!bool foo\n", "must have `names`"),
        ("names: !!timestamp foo\n", "must have `names`"),
        ('names: ["\\UFFFFFFFF"]\n', "must be YAML"),
        ("a: &a [は]\nnames: *a\n", "must be YAML. Received: an anchor or alias"),
        (LAUGHS, "must be YAML. Received: an anchor or alias"),
        ("", "must have"),
    ],
)
def test_class_names_that_can_not_be_used_are_refused(names: str, says: str, tmp_path: Path) -> None:
    yolo_of(tmp_path, "0 .5 .5 .1 .1\n", names=None)
    written(tmp_path / "data.yaml", names)
    refused(tmp_path, says=says)
    written(tmp_path / "data.yaml", "names: [は]\n")
    written(tmp_path / "classes.txt", "が\n")
    refused(tmp_path, says="class names of YOLO labels must be the same everywhere")


def test_yolo_boxes_to_be_read_need_no_class_names(tmp_path: Path) -> None:
    labels = read(yolo_of(tmp_path, "5 0.5 0.5 0.1 0.1\n", names=None), bare=True)
    assert labels.code_points.tolist() == [UNKNOWN]


def test_yolo_pages_without_a_size_are_losses_whose_reason_is_told_later(tmp_path: Path) -> None:
    labels = read_labels(place(yolo_of(tmp_path, "0 0.5 0.5 0.1 0.1\n")))
    assert labels.boxes.tolist() == [[0, 0, 1, 1]]


def test_the_size_of_a_page_is_read_from_its_header(tmp_path: Path) -> None:
    cv2.imwrite(str(tmp_path / "a.jpg"), np.zeros((30, 20), np.uint8))
    plain = (tmp_path / "a.jpg").read_bytes()
    preface = b"".join(b"\xff\xe2\xff\xff" + bytes(0xFFFD) for _ in range(3))  # like a colour profile
    written(tmp_path / "b.jpg", plain[:2] + preface + plain[2:])
    written(tmp_path / "c.jpg", b"x")
    with zipfile.ZipFile(tmp_path / "pages.zip", "w") as packed:
        packed.write(tmp_path / "b.jpg", "b.jpg")
    with size_reader(place(tmp_path), lambda: list_pages(place(tmp_path))) as size_of:
        assert [size_of(name) for name in "abcd"] == [(20, 30), (20, 30), None, None]
    archive = place(tmp_path / "pages.zip")
    with size_reader(archive, lambda: list_pages(archive)) as size_of:
        assert size_of("b") == (20, 30)


@pytest.mark.parametrize("form", ["webp", "png"])
def test_the_size_of_a_turned_page_is_right_if_its_orientation_comes_after_the_image(form: str, tmp_path: Path) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (200, 400), np.uint8)
    exif = Image.Exif()
    exif[ORIENTATION] = 6
    Image.fromarray(noise).save(tmp_path / f"a.{form}", exif=exif, lossless=True)
    data = (tmp_path / f"a.{form}").read_bytes()
    assert len(data) > HEADER_BYTES
    if form == "png":  # Pillow writes it before the image
        begin = data.index(b"eXIf") - 4
        end = begin + 12 + int.from_bytes(data[begin : begin + 4], "big")
        iend = data.index(b"IEND") - 4
        written(tmp_path / "a.png", data[:begin] + data[end:iend] + data[begin:end] + data[iend:])
    with size_reader(place(tmp_path), lambda: list_pages(place(tmp_path))) as size_of:
        assert size_of("a") == scan_size((tmp_path / f"a.{form}").read_bytes()) == (200, 400)


# --- IIIF Curations


def curation_of(*members: dict[str, Any]) -> dict[str, Any]:
    return {"@type": "cr:Curation", "selections": [{"within": {"@id": "https://x/manifest"}, "members": list(members)}]}


def canvas_box(at: str = "https://x/canvas/a_1#xywh=1,2,3,4", chars: Any = "は", **more: Any) -> dict[str, Any]:
    value = [{"@type": "oa:Annotation", "resource": {"@type": "cnt:ContentAsText", "chars": chars}}]
    return {"@id": at, "metadata": [{"label": "Char", "value": value}]} | more


@pytest.mark.parametrize(
    ("member", "says"),
    [
        (canvas_box(at="https://x/a_1"), r"selections\[0\].members\[0\]: '@id' must be <canvas>#xywh="),
        (canvas_box(at="https://x/a_1#xywh=percent:1,2,3,4"), "'@id' must be <canvas>#xywh="),
        (canvas_box(at="https://x/a_1#xywh=1,2,3"), "'@id' must be <canvas>#xywh="),
        (canvas_box(at="https://x/a_1#xywh=1,2,3,9999999999"), "'@id' must be <canvas>#xywh="),
        (canvas_box(at="https://x/..#xywh=1,2,3,4"), "the canvas must end with a page's id"),
        (canvas_box(at="https://x/%2e%2e%2fa#xywh=1,2,3,4"), "the canvas must end with a page's id"),
        (canvas_box(chars="はが"), "'chars' must be a character or U.306F"),
        (canvas_box(chars=""), "must have its character in"),
        (canvas_box(chars=3), "must have its character in"),
        (canvas_box(metadata=3), "must have its character in"),
        ({"@id": 3}, "must have '@id', a string"),
        (3, "must have '@id', a string"),
    ],
)
def test_what_is_malformed_in_a_curation_is_refused_with_its_place(member: Any, says: str, tmp_path: Path) -> None:
    refused(json_file(tmp_path / "curation.json", curation_of(member)), says=says)


def test_a_curation_without_its_lists_is_refused(tmp_path: Path) -> None:
    refused(json_file(tmp_path / "c.json", {"selections": {}}), says="the file: must have 'selections', a list")
    refused(json_file(tmp_path / "c.json", {"selections": [{}]}), says=r"selections\[0\]: must have 'members', a list")


def test_members_of_a_canvas_that_state_different_sizes_are_refused(tmp_path: Path) -> None:
    path = json_file(tmp_path / "c.json", curation_of(canvas_box(width=10, height=20), canvas_box(width=30, height=40)))
    refused(path, says=r"members\[1\]: all members of a canvas must state one size, as the first. Received: .*30")


def test_canvases_whose_ids_end_alike_need_a_file_that_names_pages(tmp_path: Path) -> None:
    at = [f"https://x/{book}/canvas/10#xywh=1,2,3,4" for book in "ab"]
    path = json_file(tmp_path / "curation.json", curation_of(*map(canvas_box, at)))
    refused(path, says="canvases must end with different ids, or --canvases must name their files")
    rows = "canvas,file\nhttps://x/a/canvas/10,a_10.jpg\nhttps://x/b/canvas/10,b_10.jpg\n"
    canvases = written(tmp_path / "canvases.csv", rows)
    labels = read(path, canvases=canvases)
    other = written(tmp_path / "other.csv", rows.replace("a_10", "c_10"))
    assert read(path, canvases=other).sha256 != labels.sha256  # so it gives another dataset
    assert labels.page_ids == ["a_10", "b_10"]
    for text, says in (
        (rows.replace("b_10", "a_10"), "canvases must end with different ids"),
        ("canvas,file\nhttps://x/a/canvas/10,a_10.jpg\n", "each canvas must have a row in --canvases"),
        (rows + rows, "line 5: a canvas must have one row only"),
        ("file,canvas\n", "line 1: --canvases must begin with the header canvas,file"),
        ("canvas,file\na,../x\n", "line 2: an image_id must"),
        ("canvas,file\na\n", "line 2: a row must have 2 columns"),
    ):
        refused(path, says=says, canvases=written(canvases, text))
    written(canvases, rows)
    written(tmp_path / "several" / "a.csv", rows)
    assert_same(read(path, canvases=tmp_path / "several"), labels)
    written(tmp_path / "several" / "b.csv", "canvas,file\n")
    refused(path, says="--canvases must be one file. Received: .*several with 2", canvases=tmp_path / "several")
    for form in ("kaggle", "coco"):
        others = write_form(form, PAGES, tmp_path / form, SIZE)
        refused(others, says="--canvases must be given with IIIF Curations", canvases=canvases)


def test_a_curation_may_tell_sizes_and_have_boxes_to_be_read(tmp_path: Path) -> None:
    members = canvas_box(width=200, height=300), canvas_box("https://x/canvas/a_1#xywh=pixel:5.5,6,7,8", "行", width=0)
    path = json_file(tmp_path / "c.json", curation_of(*members, canvas_box(chars="not one")))
    labels = read(path, bare=True)
    assert labels.page_sizes == {"a_1": (200, 300)}
    assert labels.boxes.tolist() == [[1, 2, 3, 4], [5, 6, 8, 8], [1, 2, 3, 4]]
    assert labels.code_points.tolist() == [0x306F, 0x884C, UNKNOWN]


def test_pages_that_rescale_leaves_as_they_are_are_counted(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    images = [{"id": i, "file_name": f"a_{i}.jpg"} for i in (7, 8, 9)]
    images[0] |= {"width": 200, "height": 300}
    path = tmp_path / "coco.json"
    check_sizes_are_stated(read(json_file(path, coco_of(images=images))))
    assert "--rescale leaves the boxes of 2 pages as they are: the labels do not say the size" in caplog.text
    caplog.clear()
    check_sizes_are_stated(read(json_file(path, coco_of(images=images[:1]))))
    assert not caplog.text


# --- limits


def test_a_value_of_any_size_is_shown_short_in_an_error() -> None:
    value: list[Any] = ["x"]
    for _ in range(50):
        value = [value] * 10  # expanded, 10**50 strings
    assert shown(value).startswith("[[[")
    assert len(shown({"a": value, "b": "x" * 10**6})) <= json_files.SHOWN + 3
    assert shown("は" * 100) == f"'{'は' * 59}..."
    assert shown([1, 2.5, None, "は", {"a": [True]}]) == "[1, 2.5, None, 'は', {'a': [True]}]"
    assert shown("a\n") == "'a\\n'"


def test_more_than_the_limits_is_refused_before_it_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    large = tmp_path / "large.csv"
    with large.open("wb") as stream:
        stream.truncate(8 << 30)  # takes no room on the disk
    refused(large, says="a label file must have at most 536870912 bytes. Received: .* with 8589934592")
    path = json_file(tmp_path / "coco.json", coco_of())
    monkeypatch.setattr(json_files, "MAX_VALUES", 5)
    refused(path, says="must hold at most 5 values")
    monkeypatch.setattr(table, "MAX_PAGES", 1)
    kaggle = write_form("kaggle", PAGES, tmp_path / "k", SIZE)
    refused(kaggle, says="labels must have at most 1 pages and")
    monkeypatch.setattr(table, "MAX_PAGES", 9)
    monkeypatch.setattr(table, "MAX_BOXES", 2)
    refused(kaggle, says="and 2 boxes")


@pytest.mark.parametrize("form", ["kaggle", "codh_csv", "coco", "yolo", "iiif_curation"])
def test_more_boxes_on_a_page_than_the_limit_are_refused(
    form: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Their numbers would take many times the memory of the file."""
    labels = write_form(form, PAGES, tmp_path, SIZE)
    most = max(len(boxes) for boxes in PAGES.values())
    monkeypatch.setattr(table, "MAX_PAGE_BOXES", most)
    assert read(labels).boxes_per_page.max() == most
    monkeypatch.setattr(table, "MAX_PAGE_BOXES", most - 1)
    refused(labels, says=f"a page must have at most {most - 1} boxes. Received: more, on page 1002")


def test_a_broken_archive_of_labels_is_refused_by_the_name_of_its_option(tmp_path: Path) -> None:
    refused(written(tmp_path / "labels.zip", "x"), says="--labels must be a folder or a valid .zip")
    with zipfile.ZipFile(tmp_path / "labels.zip", "w") as archive:
        archive.writestr("a.csv", "image_id,labels\na,U+306F 1 2 3 4\n")
    data = (tmp_path / "labels.zip").read_bytes().replace(b"U+306F 1", b"U+306F 2")
    refused(written(tmp_path / "labels.zip", data), says="labels.zip: a.csv must be readable. Received: page can't be")


# --- crops


def crops_of(folder: Path, *names: str) -> Path:
    for i, name in enumerate(names):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        ok, data = cv2.imencode(".jpg", np.full((30 + i, 20), 99, np.uint8))
        assert ok
        (folder / name).write_bytes(data.tobytes())
    return folder


CROPS = (
    "U+304B/U+304B_100241706_00004_2_X1231_Y3465.jpg",
    "U+304B/U+304B_hnsd001-003_X0012_Y0345.jpg",
    "は/0001.jpg",
    "book/characters/U+20B9F/U+20B9F_brsk001-003_X0012_Y0345.jpg",
)


def test_each_file_of_a_folder_of_crops_is_a_box_of_the_folders_character(tmp_path: Path) -> None:
    folder = crops_of(tmp_path / "crops", *CROPS)
    written(folder / "Thumbs.db", "x")
    written(folder / "images" / "page.jpg", "x")
    written(folder / "は" / "notes.txt", "x")
    labels, listed, ignored = read_crops(place(folder))
    ids = ["20B9F_brsk001-003_X0012_Y0345", "304B_100241706_00004_2_X1231_Y3465", "304B_hnsd001-003_X0012_Y0345"]
    assert labels.page_ids == [*ids, "306F_0001"]
    assert labels.code_points.tolist() == [0x20B9F, 0x304B, 0x304B, 0x306F]
    assert labels.books == dict(zip(ids, map(book_of, ("brsk001-003", "100241706_1", "hnsd001-003")), strict=True)) | {
        "306F_0001": "unknown"
    }
    assert ignored == {".db": 1, "images outside of folders of characters": 1, ".txt": 1}
    groups = group_pages(labels, listed, 1)
    cuts = [cut for group in groups for cut in cut_boxes(group, place(folder))]
    assert [cut.box for cut in cuts] == [[0, 0, 20, 33], [0, 0, 20, 30], [0, 0, 20, 31], [0, 0, 20, 32]]
    assert not any(cut.clipped or cut.fault for cut in cuts)
    assert all(cut.crop is not None and cut.crop.max() == 99 for cut in cuts)


def test_crops_come_from_a_zip_as_from_a_folder_and_a_broken_one_is_a_loss(tmp_path: Path) -> None:
    folder = crops_of(tmp_path / "crops", *CROPS)
    written(folder / "は" / "broken.jpg", "x")
    with zipfile.ZipFile(tmp_path / "crops.zip", "w") as archive:
        for path in sorted(folder.rglob("*.jpg")):
            archive.write(path, path.relative_to(folder))
    labels, listed, _ = read_crops(place(tmp_path / "crops.zip"))
    of_folder = read_crops(place(folder))[0]
    assert_same(labels, of_folder)
    assert labels.sha256 == of_folder.sha256
    groups = group_pages(labels, listed, 1)
    lost = [cut for cut in cut_boxes(groups[0], place(tmp_path / "crops.zip")) if cut.fault]
    assert [(cut.page_id, cut.box) for cut in lost] == [("306F_broken", [0, 0, 0, 0])]


def test_folders_that_are_no_crops_are_refused_in_one_line(tmp_path: Path) -> None:
    for make, says in (
        (lambda: crops_of(tmp_path / "a", "images/a.jpg"), "--crops must be a folder with a folder of images"),
        (lambda: tmp_path / "none", "--crops must be a folder with a folder of images"),
        (lambda: crops_of(tmp_path / "b", "は/a.jpg", "U+306F/a.jpg"), "each crop must have a unique name"),
        (lambda: crops_of(tmp_path / "c", "は/a b\n.jpg"), "an image_id must be"),
        (lambda: crops_of(tmp_path / "d", "1/a.jpg", "9/a.jpg", "10/a.jpg"), "Received: '10/a.jpg' .* class numbers"),
        (lambda: crops_of(tmp_path / "e", "train/00/a.jpg"), "Received: 'train/00/a.jpg' .* class numbers"),
        (lambda: crops_of(tmp_path / "f", "は/a.jpg", "ka/a.jpg"), "'ka/a.jpg' .*/f. Rename the folder"),
        (lambda: crops_of(tmp_path / "g", "a/は/1.jpg", "a/U+306F/1.png"), "each crop must have a unique name"),
    ):
        with pytest.raises(InputError, match=says) as caught:
            read_crops(place(make()))
        assert len(str(caught.value).splitlines()) == 1


@pytest.mark.parametrize(
    "name",
    ["page.jpg", "images/a.jpg", "train_images/a.jpg", "ka/.a.jpg", ".trash/か/a.jpg", "__MACOSX/ka/._a.jpg"],
)
def test_pages_and_hidden_files_next_to_crops_are_left_aside(name: str, tmp_path: Path) -> None:
    crops_of(tmp_path, "は/a.jpg", name)
    with zipfile.ZipFile(tmp_path / "crops.zip", "w") as archive:
        for path in sorted(tmp_path.rglob("*.jpg")):
            archive.write(path, path.relative_to(tmp_path))
    labels, _, ignored = read_crops(place(tmp_path / "crops.zip"))
    kind = "hidden files" if "/." in name else "images outside of folders of characters"
    ignored_as = {} if name.startswith(".trash/") else {kind: 1}
    assert (labels.page_ids, ignored) == (["306F_a"], ignored_as)


def test_crops_of_one_name_in_several_folders_have_the_folders_in_their_ids(tmp_path: Path) -> None:
    crops_of(tmp_path, "train/か/1.jpg", "test/か/1.jpg", "train/U+306F/1.jpg", "か/1.jpg", "train/か/2.jpg")
    labels, listed, _ = read_crops(place(tmp_path))
    assert {crop_id: name for crop_id, (name, _) in listed.items()} == {
        "304B_1": "か/1.jpg", "test/304B_1": "test/か/1.jpg", "train/304B_1": "train/か/1.jpg",
        "306F_1": "train/U+306F/1.jpg", "304B_2": "train/か/2.jpg",
    }  # fmt: skip
    assert labels.page_ids == sorted(listed)
    assert labels.code_points.tolist() == [0x304B, 0x304B, 0x306F, 0x304B, 0x304B]


def test_crops_are_not_split_by_page(tmp_path: Path) -> None:
    with pytest.raises(OptionError, match="--split must be random or book with --crops"):
        make_plan(place(crops_of(tmp_path, *CROPS)), None, PrepareConfig(split="page"))
