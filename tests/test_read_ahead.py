"""Pages are read ahead from a bucket while others are cut: one request a page, bounded, the same crops and errors."""

import io
import random
import threading
import time
import zipfile
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from fake_cloud.bucket import StrictBucket
from hypothesis import given
from hypothesis import strategies as st
from upath import UPath

from cluster.ahead import ahead
from cluster.bucket import RANGE_BYTES
from cluster.errors import DamageError, InputError
from cluster.places import place
from cluster.ranged_file import RangedFile
from cluster.storage import list_tree, read_at_most, remove_file, write_bytes
from preprocessing.archive import LOCAL_HEADER_BYTES, member_reader
from preprocessing.cutting import Cut, cut_boxes
from preprocessing.groups import Group, group_pages
from preprocessing.labels.read import read_labels
from preprocessing.pages import list_pages

# google-cloud-storage leaves the connection of a refused download to the garbage collector.
pytestmark = pytest.mark.filterwarnings("ignore:unclosed <socket:ResourceWarning")
# Kind of place to the most requests for twelve pages. An archive takes one for its generation and size, one for the
# directory at its end, and one for each part; in `scans`, a part has at least three pages, if they are in order.
REQUESTS = {"folder": 12, "archive": 2 + 4, "packed archive": 2 + 4, "archive in another order": 2 + 12}


@pytest.fixture(params=REQUESTS)
def kind(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def scans(kind: str, folder: UPath, pages: Path, monkeypatch: pytest.MonkeyPatch) -> UPath:
    """Write the twelve drawn pages to the bucket, and return their place."""
    files = sorted((pages / "train_images").iterdir())
    if kind == "folder":
        for path in files:
            write_bytes(folder / path.name, path.read_bytes())
        return folder
    largest = max(path.stat().st_size for path in files)
    monkeypatch.setattr("preprocessing.archive.TAIL_BYTES", largest)
    monkeypatch.setattr("preprocessing.archive.STRETCH_BYTES", 3 * (largest + LOCAL_HEADER_BYTES))
    if kind == "archive in another order":
        files = [*files[::2], *files[1::2]]
    data = io.BytesIO()
    with zipfile.ZipFile(
        data, "w", zipfile.ZIP_DEFLATED if kind == "packed archive" else zipfile.ZIP_STORED
    ) as archive:
        for path in files:
            archive.write(path, path.name)
    write_bytes(folder / "pages.zip", data.getvalue())
    return folder / "pages.zip"


@pytest.fixture(scope="module")
def of_a_disk(pages: Path) -> list[Cut]:
    """Return the crops of the same pages, read from a folder on this machine."""
    here = place(pages / "train_images")
    return list(cut_boxes(group_of(here, pages), here))


def group_of(scans: UPath, pages: Path) -> Group:
    labels = read_labels(place(pages / "train.csv"))
    (group,) = group_pages(labels, list_pages(scans).files_of(labels.page_ids), 1)
    return group


def same(ours: Cut, theirs: Cut) -> bool:
    return (ours.page_id, ours.box) == (theirs.page_id, theirs.box) and np.array_equal(ours.crop, theirs.crop)


def test_a_page_of_a_bucket_costs_one_request_and_its_crops_are_those_of_a_disk(
    strict: StrictBucket, scans: UPath, kind: str, pages: Path, of_a_disk: list[Cut]
) -> None:
    group = group_of(scans, pages)
    before = len(strict.requests)
    cuts = list(cut_boxes(group, scans))
    assert len(strict.requests) - before <= REQUESTS[kind]
    assert len(cuts) == len(of_a_disk) > 0
    assert all(map(same, cuts, of_a_disk))


def test_a_listing_of_a_folder_and_its_pages_ask_nothing_else_of_a_bucket(
    strict: StrictBucket, folder: UPath, pages: Path
) -> None:
    for path in (pages / "train_images").iterdir():
        write_bytes(folder / path.name, path.read_bytes())
    before = len(strict.requests)
    list(cut_boxes(group_of(folder, pages), folder))
    paths = [logged.path for logged in strict.requests[before:]]
    listed = [path for path in paths if "/o?" in path]
    assert len(paths) - len(listed) == 12
    assert len(listed) == 2  # twelve names take two answers of ten


@pytest.mark.parametrize("fault", ["429", "503", "cut", "flip"])
def test_a_fault_while_pages_are_read_ahead_loses_none(
    strict: StrictBucket, scans: UPath, kind: str, pages: Path, of_a_disk: list[Cut], fault: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.setattr("preprocessing.pages.READS_AT_ONCE", 1)
    monkeypatch.setattr("preprocessing.archive.REQUESTS_AT_ONCE", 1)
    cuts = cut_boxes(group_of(scans, pages), scans)
    found = [next(cuts)]
    strict.faults.inject(fault, method="GET", matching="alt=media")
    try:
        found += cuts
    except DamageError as error:
        assert (kind, fault) == ("folder", "flip")
        assert "must arrive unchanged" in str(error)
    else:
        assert len(found) == len(of_a_disk)
    assert strict.faults.left() == 0
    assert all(map(same, found, of_a_disk[: len(found)]))


def test_an_error_of_a_page_read_ahead_is_raised_when_that_page_is_cut(
    folder: UPath, pages: Path, of_a_disk: list[Cut]
) -> None:
    for path in (pages / "train_images").iterdir():
        write_bytes(folder / path.name, path.read_bytes())
    group = group_of(folder, pages)
    third = group.pages[2]
    remove_file(folder / third.file_name)
    begun: list[str] = []
    found: list[Cut] = []
    with pytest.raises(InputError, match=f"--pages must stay unchanged.*{third.file_name}"):
        found.extend(cut_boxes(group, folder, begun.append))
    assert begun == group.page_ids[:3]
    assert len(found) == group.pages[0].boxes + group.pages[1].boxes
    assert all(map(same, found, of_a_disk))


def test_a_damaged_page_in_an_archive_that_is_read_ahead_is_a_loss_and_its_neighbours_are_not(
    folder: UPath, pages: Path
) -> None:
    data = io.BytesIO()
    files = sorted((pages / "train_images").iterdir())
    with zipfile.ZipFile(data, "w") as archive:
        for path in files:
            archive.write(path, path.name)
    third = files[2].read_bytes()
    write_bytes(folder / "pages.zip", data.getvalue().replace(third, third[:-1] + b"x"))
    cuts = list(cut_boxes(group_of(folder / "pages.zip", pages), folder / "pages.zip"))
    assert {cut.page_id for cut in cuts if cut.fault} == {files[2].stem}


@pytest.mark.parametrize("expected", [[], ["a", "b"]])
def test_an_archive_replaced_during_reading_is_an_error(
    folder: UPath, expected: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def write(byte: bytes) -> None:
        data = io.BytesIO()
        with zipfile.ZipFile(data, "w") as archive:
            for name in "ab":
                archive.writestr(name, byte * 5000)
        write_bytes(folder / "pages.zip", data.getvalue())

    monkeypatch.setattr("preprocessing.archive.TAIL_BYTES", 200)
    monkeypatch.setattr("cluster.bucket.RANGE_BYTES", 200)
    write(b"x")
    with member_reader(folder / "pages.zip", expected=expected) as read:
        write(b"y")
        with pytest.raises(FileNotFoundError):
            read("a")


@pytest.mark.parametrize("sizes", [[10] * 20, [60, 5, 200, 5, 5, 60, 50], [300] * 3, []])
def test_what_is_read_ahead_never_exceeds_its_bounds_and_comes_in_order(sizes: list[int]) -> None:
    lock = threading.Lock()
    begun: list[int] = []
    together = threading.Barrier(3, timeout=60)

    def request(number: int) -> bytes:
        with lock:
            begun.append(number)
        if number < 3 and max(sizes) == 10:
            together.wait()  # fails if they do not run at the same time
        return bytes(sizes[number])

    requests = [(size, partial(request, number)) for number, size in enumerate(sizes)]
    with ahead(requests, at_once=3, most_bytes=100) as answers:
        for number, answer in enumerate(answers):
            assert len(answer.result()) == sizes[number]
            with lock:
                beyond = [sizes[other] for other in begun if other > number]
            assert len(beyond) <= 3
            assert sum(beyond) <= 100
    assert sorted(begun) == list(range(len(sizes)))


def test_reads_that_have_not_begun_when_their_reader_stops_never_begin() -> None:
    hold, begun, threads = threading.Event(), [], []

    def request(number: int) -> bytes:
        threads.append(threading.current_thread())
        begun.append(number)
        hold.wait(60)
        return b""

    with ahead([(1, partial(request, number)) for number in range(9)], at_once=1, most_bytes=100) as answers:
        next(answers)
        while not threads:
            time.sleep(0.01)
    hold.set()
    threads[0].join(60)
    assert begun == [0]


@pytest.mark.parametrize("size", [0, 1, 1000, RANGE_BYTES, RANGE_BYTES + 1])
@pytest.mark.parametrize("most", [1, 1000, 1 << 40])
def test_the_first_bytes_of_an_object_are_read_with_one_request_unless_it_is_large(
    strict: StrictBucket, folder: UPath, size: int, most: int
) -> None:
    data = random.Random(size).randbytes(size)
    write_bytes(folder / "x", data)
    before = len(strict.requests)
    assert read_at_most(folder / "x", most) == data[:most]
    if size < RANGE_BYTES or most <= RANGE_BYTES:
        assert len(strict.requests) - before == 1


@pytest.mark.parametrize("size", [1000, RANGE_BYTES + 1])
def test_an_object_corrupted_in_transit_is_refused_at_any_size(strict: StrictBucket, folder: UPath, size: int) -> None:
    write_bytes(folder / "x", bytes(size))
    strict.faults.inject("flip")
    with pytest.raises(DamageError, match="must arrive unchanged"):
        read_at_most(folder / "x", 1 << 40)
    with pytest.raises(FileNotFoundError):
        read_at_most(folder / "nothing", 10)


@given(data=st.data(), size=st.integers(0, 200), least=st.integers(1, 50))
def test_a_ranged_file_reads_as_a_file_does(data: st.DataObject, size: int, least: int) -> None:
    content = random.Random(size).randbytes(size)

    def read_range(begin: int, end: int) -> bytes:
        assert 0 <= begin < end <= size
        return content[begin:end]

    ours, theirs = RangedFile(read_range, size, least), io.BytesIO(content)
    for _ in range(20):
        if data.draw(st.booleans()):
            begin = data.draw(st.integers(0, size))
            ours.hold(begin, content[begin : begin + data.draw(st.integers(0, 60))])
        offset, whence = data.draw(st.integers(-20, 250)), data.draw(st.sampled_from([0, 1, 2]))
        if {0: 0, 1: theirs.tell(), 2: size}[whence] + offset >= 0:
            assert ours.seek(offset, whence) == theirs.seek(offset, whence)
        length = data.draw(st.integers(-1, 250))
        assert ours.read(length) == theirs.read(length)
        assert ours.tell() == theirs.tell()
    with pytest.raises(OSError, match="negative"):
        ours.seek(-1)


def test_each_folder_of_a_tree_is_listed_with_one_request(folder: UPath, strict: StrictBucket) -> None:
    for name in ("a.jpg", "b/c.jpg", "b/d/e.jpg", ".hidden/f.jpg"):
        write_bytes(folder / name, b"x")
    before = len(strict.requests)
    assert sorted(list_tree(folder)) == [("a.jpg", 1), ("b/c.jpg", 1), ("b/d/e.jpg", 1)]
    assert len(strict.requests) - before == 3
