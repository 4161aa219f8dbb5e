"""Label files: a malformed row ends the command in one line that names it; a well-formed file is read whole."""

import csv
import io
from pathlib import Path
from random import Random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cluster.errors import InputError
from cluster.places import place
from preprocessing.labels.code_points import UNKNOWN, parse_code_point
from preprocessing.labels.read import read_labels
from preprocessing.labels.table import Labels

HEADER = "image_id,labels\n"


def read(tmp_path: Path, text: str | bytes) -> Labels:
    path = tmp_path / "train.csv"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return read_labels(place(path))


def test_pages_come_sorted_and_boxes_in_the_order_of_their_row(tmp_path: Path) -> None:
    labels = read(tmp_path, HEADER + "b_2,U+306F 1 2 3 4 U+304C 5 6 7 8\na_1,U+2000B -1 0 9 9\n")
    assert labels.page_ids == ["a_1", "b_2"]
    assert labels.starts.tolist() == [0, 1, 3]
    assert labels.code_points.tolist() == [0x2000B, 0x306F, 0x304C]
    assert labels.boxes.tolist() == [[-1, 0, 9, 9], [1, 2, 3, 4], [5, 6, 7, 8]]


def test_an_empty_cell_and_nan_are_pages_without_text(tmp_path: Path) -> None:
    labels = read(tmp_path, HEADER + "a,\nb,nan\nc,U+306F 1 2 3 4\n")
    assert labels.boxes_per_page.tolist() == [0, 0, 1]


def test_a_byte_order_mark_and_windows_line_ends_are_read(tmp_path: Path) -> None:
    assert read(tmp_path, b"\xef\xbb\xbfimage_id,labels\r\na,U+306F 1 2 3 4\r\n").page_ids == ["a"]


@pytest.mark.parametrize(
    ("rows", "says"),
    [
        ("a,U+306F 1 2 3\n", "groups of 5 fields"),
        ("a,U+306F 1 2 3 4 5\n", "groups of 5 fields"),
        ("a,306F 1 2 3 4\n", "a code point must look like"),
        ("a,U+D800 1 2 3 4\n", "a code point must look like"),
        ("a,U+110000 1 2 3 4\n", "a code point must look like"),
        ("a,U+00306F 1 2 3 4\n", "a code point must look like"),
        ("a,U+306F 1.5 2 3 4\n", "whole numbers"),
        ("a,U+306F 1 2 3 99999999999\n", "whole numbers"),
        ("a,U+306F 1 2 3 ４\n", "whole numbers"),
        ("../a,U+306F 1 2 3 4\n", "an image_id must be"),
        ("/a/b,U+306F 1 2 3 4\n", "an image_id must be"),
        ("a//b,U+306F 1 2 3 4\n", "an image_id must be"),
        ("a/../b,U+306F 1 2 3 4\n", "an image_id must be"),
        ("a/.b,U+306F 1 2 3 4\n", "an image_id must be"),
        ("a\x07,U+306F 1 2 3 4\n", "an image_id must be"),
        ("a\u202eb,U+306F 1 2 3 4\n", "an image_id must be"),
        (" a,U+306F 1 2 3 4\n", "an image_id must be"),
        ("..,U+306F 1 2 3 4\n", "an image_id must be"),
        ("a" * 252 + ",U+306F 1 2 3 4\n", "at most 251 characters"),
        ("a,U+306F 1 2 3 " + "4" * 100_000 + "\n", "whole numbers"),
        ("a," + "U" * 100_000 + " 1 2 3 4\n", "a code point must look like"),
        (",U+306F 1 2 3 4\n", "an image_id must be"),
        ("a,U+306F 1 2 3 4\na,U+306F 1 2 3 4\n", "one row only"),
        ("a,U+306F 1 2 3 4,x\n", "2 columns"),
        ("a\n", "2 columns"),
        ("a,nan\n", "at least one page must have"),
        ('a,"U+306F 1 2 3 4\n', "not CSV"),
    ],
)
def test_a_malformed_row_is_refused_in_one_line_that_says_what_came(tmp_path: Path, rows: str, says: str) -> None:
    with pytest.raises(InputError, match=says) as caught:
        read(tmp_path, HEADER + rows)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 1000


@pytest.mark.parametrize("text", ["", "a,U+306F 1 2 3 4\n", "Image_ID,Labels\na,nan\n", "labels,image_id\n"])
def test_a_wrong_or_missing_header_is_refused(tmp_path: Path, text: str) -> None:
    with pytest.raises(InputError, match="must begin with the header image_id,labels"):
        read(tmp_path, text)


def test_a_file_that_is_not_there_or_not_text_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="where there is none"):
        read_labels(place(tmp_path / "none.csv"))
    with pytest.raises(InputError, match="where there is none"):
        read_labels(place(tmp_path))
    with pytest.raises(InputError, match="UTF-8"):
        read(tmp_path, b"\xff\xfe\x00")


def test_every_real_row_is_read(shared: Path) -> None:
    labels = read_labels(place(shared / "layouts.csv"))
    assert len(labels.page_ids) == 579
    assert 1 <= (labels.boxes_per_page == 0).sum() <= 65


IDS = st.from_regex(r"[A-Za-z0-9_][A-Za-z0-9._-]{0,30}", fullmatch=True)
CODE_POINTS = st.integers(0, 0x10FFFF).filter(lambda value: not 0xD800 <= value <= 0xDFFF)
PIXELS = st.integers(-999_999_999, 999_999_999)
TABLES = st.dictionaries(IDS, st.lists(st.tuples(CODE_POINTS, PIXELS, PIXELS, PIXELS, PIXELS), max_size=4), max_size=6)


def written(table: dict[str, list[tuple[int, ...]]], chance: Random) -> bytes:
    """Return a label file of these boxes, in one of the styles that editors and libraries write."""
    out = io.StringIO()
    end, quoting = chance.choice(["\n", "\r\n"]), chance.choice([csv.QUOTE_MINIMAL, csv.QUOTE_ALL])
    writer = csv.writer(out, lineterminator=end, quoting=quoting)
    writer.writerow(["image_id", "labels"])
    for page_id in chance.sample(sorted(table), len(table)):
        fields = [f"U+{box[0]:04X} " + " ".join(map(str, box[1:])) for box in table[page_id]]
        writer.writerow([page_id, chance.choice([" ", "  "]).join(fields) or chance.choice(["", "nan"])])
    text = out.getvalue() + end * chance.randint(0, 1)
    return chance.choice([b"", b"\xef\xbb\xbf"]) + text.removesuffix(chance.choice(["", end])).encode()


@given(TABLES.filter(lambda table: any(table.values())), st.randoms(use_true_random=False))
def test_any_well_formed_table_is_read_back_as_it_was_written(
    tmp_path_factory: pytest.TempPathFactory, table: dict[str, list[tuple[int, ...]]], chance: Random
) -> None:
    labels = read(tmp_path_factory.mktemp("table"), written(table, chance))
    assert labels.page_ids == sorted(table)
    boxes = [box for page_id in sorted(table) for box in table[page_id]]
    assert labels.code_points.tolist() == [box[0] for box in boxes]
    assert labels.boxes.tolist() == [list(box[1:]) for box in boxes]
    assert labels.boxes_per_page.tolist() == [len(table[page_id]) for page_id in sorted(table)]


@given(TABLES.filter(any), st.randoms(use_true_random=False), st.integers(1, 4))
def test_a_good_file_that_was_changed_is_read_whole_or_refused_in_one_line(
    tmp_path_factory: pytest.TempPathFactory, table: dict[str, list[tuple[int, ...]]], chance: Random, changes: int
) -> None:
    data = bytearray(written(table, chance))
    for _ in range(changes):
        begin = chance.randint(0, len(data))
        end = begin + chance.choice([0, 1, 1, 20])
        data[begin:end] = chance.choice(
            [b"", b"\n", b",", b'"', b" ", b"\0", b"\r", b"\xff", b"9", data[begin:end] * 2]
        )
    try:
        labels = read(tmp_path_factory.mktemp("changed"), bytes(data))
    except InputError as error:
        assert len(str(error).splitlines()) == 1
        assert len(str(error)) < 1000
    else:
        assert labels.starts[-1] == len(labels.boxes) == len(labels.code_points) > 0
        assert labels.page_ids == sorted(set(labels.page_ids))


FIELD = st.sampled_from(
    ["U+306F", "U+", "1", "-3", "0", "nan", "", "x", "U+D800", "9" * 12, '"', ",", "\n", "\x00", "../a"]
)


@given(st.one_of(st.binary(max_size=200), st.lists(FIELD, max_size=12).map(lambda fields: " ".join(fields).encode())))
def test_any_bytes_are_read_whole_or_refused_in_one_line(tmp_path_factory: pytest.TempPathFactory, rows: bytes) -> None:
    try:
        labels = read(tmp_path_factory.mktemp("any"), HEADER.encode() + b"a," + rows)
    except InputError as error:
        assert "\n" not in str(error)
    else:
        assert labels.starts[-1] == len(labels.boxes) == len(labels.code_points) > 0


@given(st.integers(0, 0x10FFFF))
def test_a_code_point_is_read_back_from_its_name_unless_it_is_a_surrogate(value: int) -> None:
    name = f"U+{value:04X}"
    if 0xD800 <= value <= 0xDFFF:
        with pytest.raises(ValueError, match="code point"):
            parse_code_point(name)
    else:
        assert parse_code_point(name) == value


def test_boxes_to_be_read_may_stand_without_their_characters(tmp_path: Path) -> None:
    path = tmp_path / "boxes.csv"
    path.write_text(HEADER + "a,1 2 3 4 5 6 7 8\nb,U+306F 1 2 3 4\nc,\n")
    labels = read_labels(place(path), "--boxes", bare=True)
    assert labels.boxes.tolist() == [[1, 2, 3, 4], [5, 6, 7, 8], [1, 2, 3, 4]]
    assert labels.code_points.tolist() == [UNKNOWN, UNKNOWN, 0x306F]
    with pytest.raises(InputError, match="groups of 5 fields. Received: 8 fields"):
        read_labels(place(path))
    path.write_text(HEADER + "a,1 2 3 4 5\n")
    with pytest.raises(InputError, match="groups of 4 fields. Received: 5 fields"):
        read_labels(place(path), "--boxes", bare=True)
