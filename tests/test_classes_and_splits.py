"""Classes and splits: they follow the study's rules, checked with the true counts, and depend only on the labels."""

import itertools
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from cluster.errors import InputError, OptionError
from preprocessing.books import book_of
from preprocessing.classes import class_indices, class_names, parse_class_names
from preprocessing.config import SPLITS
from preprocessing.labels.table import Labels
from preprocessing.split import _fill, split_of_boxes


def labels_of(boxes_of_page: dict[str, int]) -> Labels:
    """Return labels with these numbers of boxes per page, all of one character."""
    ids = sorted(boxes_of_page)
    starts = np.concatenate([[0], np.cumsum([boxes_of_page[page_id] for page_id in ids], dtype=np.int64)])
    total = int(starts[-1])
    return Labels(ids, starts, np.full(total, 0x306F, np.int32), np.ones((total, 4), np.int32), "0" * 64)


def split(labels: Labels, by: str, seed: int, val_fraction: float, test_fraction: float) -> NDArray[np.int8]:
    books = [book_of(page_id) for page_id in labels.page_ids]
    return split_of_boxes(labels, by, seed, val_fraction, test_fraction, books)


def sizes(splits: NDArray[np.int8]) -> dict[str, int]:
    return {name: int((splits == i).sum()) for i, name in enumerate(SPLITS)}


def test_the_true_counts_give_513_classes_and_rare(shared: Path) -> None:
    table = pd.read_csv(shared / "class_counts.csv")
    code_points = np.repeat([int(name[2:], 16) for name in table["unicode"]], table["count"]).astype(np.int32)
    assert len(code_points) == 683_464
    names = class_names(code_points, 0.9)
    assert {*names} == {*table["unicode"][table["kept"] == 1], "rare"}
    assert len(names) == 514
    counts = np.bincount(class_indices(names, code_points))
    order = [(-int(count), name) for count, name in zip(counts[:-1], names[:-1], strict=True)]
    assert order == sorted(order)
    assert counts[-1] == 68_365
    assert names[0] == "U+306B"
    assert counts[0] == 24_685
    assert counts[:-1].min() == 126


def test_classes_fall_by_count_then_rise_by_code_point_and_rare_is_always_last() -> None:
    code_points = np.array([5, 5, 9, 9, 7, 7, 7, 1], np.int32)
    assert class_names(code_points, 1) == ["U+0007", "U+0005", "U+0009", "U+0001", "rare"]
    assert class_names(code_points, 0.625) == ["U+0007", "U+0005", "rare"]
    assert class_names(code_points, 0.1) == ["rare"]


def test_a_share_that_is_exactly_the_coverage_is_kept() -> None:
    # In binary floating point 0.7 * 10 is below 7.
    code_points = np.repeat([1, 2], [7, 3]).astype(np.int32)
    assert class_names(code_points, 0.7) == ["U+0001", "rare"]


@pytest.mark.parametrize("text", ["", "U+306F\n", "rare\nU+306F\n", "U+306F\nU+306F\nrare\n", "U+ZZ\nrare\n"])
def test_a_file_that_is_no_list_of_classes_is_refused(text: str) -> None:
    with pytest.raises(InputError):
        parse_class_names(text, "label.labels.txt")


def test_what_is_not_among_the_given_classes_is_rare() -> None:
    assert class_indices(["U+0002", "U+0001", "rare"], np.array([1, 2, 3], np.int32)).tolist() == [1, 0, 2]


@pytest.mark.parametrize("by", ["random", "page"])
def test_fractions_are_rounded_down_and_training_takes_the_rest(by: str) -> None:
    labels = labels_of({f"b{i % 7}_{i:03}": 5 + i % 11 for i in range(100)})
    total = len(labels.boxes)
    splits = split(labels, by, 42, 0.15, 0.1)
    assert sizes(splits)["validation"] == int(total * 0.15)
    assert sizes(splits)["test"] == int(total * 0.1)


def test_the_full_set_is_split_as_in_the_study() -> None:
    splits = split(labels_of({"a": 683_464}), "random", 42, 0.15, 0.15)
    assert sizes(splits) == {"train": 478_426, "validation": 102_519, "test": 102_519}


def test_a_fraction_is_the_decimal_that_was_written() -> None:
    # 0.29 * 100 is 28.999... in binary floating point.
    assert sizes(split(labels_of({"a": 100}), "random", 1, 0.29, 0.29))["test"] == 29


@pytest.mark.parametrize("by", ["page", "book"])
def test_no_page_or_book_is_in_two_splits(by: str) -> None:
    labels = labels_of({f"{i // 4}-{i:03}": i % 9 for i in range(60)})
    splits = split(labels, by, 42, 0.15, 0.15)
    unit = [page_id if by == "page" else book_of(page_id) for page_id in labels.page_ids]
    of_box = np.repeat(unit, labels.boxes_per_page)
    assert all(len(set(splits[of_box == u].tolist())) == 1 for u in set(of_box.tolist()))


@given(st.lists(st.integers(1, 30), min_size=1, max_size=7), st.integers(0, 60), st.integers(1, 2))
def test_whole_books_fill_a_split_as_closely_as_can_be(books: list[int], wanted: int, leave: int) -> None:
    choices = [
        (abs(sum(books[i] for i in chosen) - wanted), sum(books[i] for i in chosen))
        for count in range(1, len(books) - leave + 1)
        for chosen in itertools.combinations(range(len(books)), count)
    ]
    chosen = _fill(books, wanted, leave)
    if choices:
        total = sum(books[i] for i in chosen)
        assert (abs(total - wanted), total) == min(choices)
        assert 1 <= len(chosen) <= len(books) - leave
    else:
        assert not chosen


@pytest.mark.parametrize("by", ["random", "page", "book"])
def test_the_same_seed_gives_the_same_split_and_another_seed_another(by: str) -> None:
    labels = labels_of({f"{i // 2}_{i}": 10 for i in range(40)})
    first = split(labels, by, 1, 0.15, 0.15)
    assert np.array_equal(first, split(labels, by, 1, 0.15, 0.15))
    assert not np.array_equal(first, split(labels, by, 2, 0.15, 0.15))


def test_three_books_give_one_to_each_split() -> None:
    splits = split(labels_of({"a_1": 50, "b_1": 60, "c_1": 70}), "book", 42, 0.15, 0.15)
    assert sorted(sizes(splits).values()) == [50, 60, 70]


def test_an_empty_split_is_refused() -> None:
    with pytest.raises(OptionError, match="leaves test empty .180 boxes, 2 pages, 1 books."):
        split(labels_of({"a_1": 50, "a_2": 130}), "page", 42, 0.15, 0.15)
