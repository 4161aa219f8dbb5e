"""Groups of pages: a task reads what was planned for it, and reading labels takes little memory."""

import itertools
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cluster.errors import DamageError
from cluster.places import place
from preprocessing.classes import class_indices, class_names
from preprocessing.group_files import GROUPS_PER_FILE, read_group, write_groups
from preprocessing.groups import Groups, group_pages, plan_shards
from preprocessing.labels.code_points import LARGEST, UNKNOWN
from preprocessing.labels.read import read_labels
from preprocessing.labels.table import Labels


def labels_of(boxes_per_page: list[int]) -> Labels:
    rng, total = np.random.default_rng(0), sum(boxes_per_page)
    page_ids = [f"b_{page:05d}" for page in range(len(boxes_per_page))]
    return Labels(
        page_ids,
        np.cumsum([0, *boxes_per_page], dtype=np.int64),
        rng.integers(UNKNOWN, LARGEST, total, np.int32),
        rng.integers(-(10**9), 10**9, (total, 4), np.int32),
        "0" * 64,
        page_sizes=dict.fromkeys(page_ids[::2], (300, 400)),
    )


def planned(boxes_per_page: list[int], most: int) -> Groups:
    labels, total = labels_of(boxes_per_page), sum(boxes_per_page)
    # Names that are not UTF-8, as Python gets them from the file system. The first page has no file.
    files = {page_id: (f"{page_id}\udcff.jpg", 10**12) for page_id in labels.page_ids[1:]}
    groups = group_pages(labels, files, most, rescale=True, margin=0.1)
    rng = np.random.default_rng(1)
    return plan_shards(groups, rng.integers(0, 500, total, np.int32), rng.integers(0, 3, total, np.int8))


@pytest.mark.parametrize("most", [1, 3, 2 * GROUPS_PER_FILE + 9])
def test_a_task_reads_the_group_that_was_planned(most: int, tmp_path: Path) -> None:
    groups = planned([0, 3, 0, 5, *[1] * 300, 0], most)
    write_groups(groups, place(tmp_path), "a")
    assert len(list(tmp_path.iterdir())) == -(-most // GROUPS_PER_FILE) == -(-len(groups) // GROUPS_PER_FILE)
    for number, there in enumerate(groups):
        read = read_group(place(tmp_path), "a", number)
        for name, value in vars(there).items():
            same = getattr(read, name)
            assert np.array_equal(same, value) if isinstance(value, np.ndarray) else same == value, name
            assert getattr(same, "dtype", None) == getattr(value, "dtype", None), name
        assert len(read.pages) == groups.sizes[number]
        assert read.page_ids == groups.page_ids(number)
    assert sum(groups.sizes) == 305


def test_groups_of_boxes_to_read_have_no_classes_and_no_shards(tmp_path: Path) -> None:
    groups = group_pages(labels_of([2, 3]), {}, 2)
    write_groups(groups, place(tmp_path), "a")
    read = read_group(place(tmp_path), "a", 1)
    assert (len(read.boxes), len(read.labels), len(read.splits), read.shard_names) == (3, 0, 0, [])
    assert read.pages[0].made_for == (0, 0)


def test_each_attempt_reads_what_it_wrote_itself(tmp_path: Path) -> None:
    """Another attempt may read a zip of the same pages, which has other names."""
    labels = labels_of([2, 3])
    for attempt in ("a", "b"):
        write_groups(group_pages(labels, {"b_00000": (f"{attempt}.jpg", 9)}, 1), place(tmp_path), attempt)
    names = [read_group(place(tmp_path), attempt, 0).pages[0].file_name for attempt in ("a", "b")]
    assert names == ["a.jpg", "b.jpg"]


@pytest.mark.parametrize("damage", ["a byte", "cut off", "no table"])
def test_a_damaged_file_of_groups_is_one_line(damage: str, tmp_path: Path) -> None:
    write_groups(planned([40] * 4, 2), place(tmp_path), "a")
    (file,) = tmp_path.iterdir()
    data = bytearray(file.read_bytes())
    if damage == "a byte":
        data[len(data) // 4] ^= 1
    file.write_bytes({"a byte": data, "cut off": data[:-9], "no table": b"x"}[damage])
    with pytest.raises(DamageError, match=f"^{file} must not change after it was written. Received: .*Run the same"):
        [read_group(place(tmp_path), "a", number) for number in range(2)]


@given(st.lists(st.integers(0, 4), min_size=1).filter(any), st.randoms(use_true_random=False))
def test_pages_with_a_box_are_found_among_pages_without(boxes_per_page: list[int], chance: object) -> None:
    labels = labels_of(boxes_per_page)
    some = np.array([chance.random() < 0.5 for _ in range(len(labels.boxes))], bool)  # type: ignore[attr-defined]
    starts = labels.starts.tolist()
    found = [bool(some[first:last].any()) for first, last in itertools.pairwise(starts)]
    assert labels.pages_with(some).tolist() == found


def test_the_least_and_the_largest_code_point_have_classes_or_are_rare() -> None:
    code_points = np.array([LARGEST, UNKNOWN, LARGEST, 0x306F], np.int32)
    names = class_names(code_points, 0.5)
    assert names == ["U+10FFFF", "rare"]
    assert class_indices(names, code_points).tolist() == [0, 1, 0, 1]


def test_labels_of_any_order_take_little_memory_and_are_sorted(tmp_path: Path) -> None:
    """At most 22 bytes per box are kept, 20 of them for the box; the peak is 45, plus the text of the file."""
    cell = " ".join(f"U+{0x3042 + box % 80:04X} {box} {box} {box + 1} 9" for box in range(600))
    pages = [f"b_{number:05d}" for number in np.random.default_rng(0).permutation(300)]
    (tmp_path / "train.csv").write_text("image_id,labels\n" + "".join(f"{page},{cell}\n" for page in pages))
    text = (tmp_path / "train.csv").stat().st_size
    tracemalloc.start()
    labels = read_labels(place(tmp_path / "train.csv"))
    held, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert labels.page_ids == sorted(pages)
    assert np.array_equal(labels.boxes[:600], labels.boxes[-600:])
    assert held < 22 * len(labels.boxes)
    assert peak < text + 45 * len(labels.boxes)
