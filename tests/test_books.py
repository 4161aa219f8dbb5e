"""Books: a title is in one split only, folds test each book once, and the dataset names the book of each page."""

import json
import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from conftest import Kuzushiji
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray
from test_classes_and_splits import labels_of
from test_prepare import boxes, contents, page, write_pages

from cluster.errors import DamageError, InputError, OptionError
from cluster.manifest import encoded, read_manifest
from cluster.places import place
from job.report.dataset import dataset_report
from job.verify import verify
from preprocessing.books import book_of, books_of_pages, pages_for_training, read_books, read_train_only, volume_of
from preprocessing.config import BooksFile, PrepareConfig, TrainOnlyFile
from preprocessing.dataset import DatasetManifest
from preprocessing.labels.read import read_labels
from preprocessing.labels.table import Labels
from preprocessing.page_results import PageResult
from preprocessing.parquet import books_of_table, losses_of_table, pages_table, results_of_table
from preprocessing.plan import make_plan
from preprocessing.prepare import _manifest, prepare
from preprocessing.split import TEST, TRAIN, VALIDATION, folds_of_boxes, split_of_boxes

NO_FOLDERS = {"1": ("1.jpg", 1)}


@pytest.mark.parametrize(
    ("page_id", "book"),
    [
        ("100241706_00004_2", "100241706"),
        ("200014740-00004_1", "200014740"),
        ("200021637-00002", "200021637"),
        ("hnsd001-003", "hnsd"),
        ("umgy012-01", "umgy"),
        ("brsk", "brsk"),
        ("源氏_001", "源氏"),
        ("_7", "_7"),
    ],
)
def test_the_book_is_the_leading_letters_or_the_part_before_the_first_mark(page_id: str, book: str) -> None:
    assert book_of(page_id) == book


@pytest.mark.parametrize(
    ("files", "books"),
    [
        (["scans/1_1.jpg", "more/2_1.jpg"], ["scans", "more"]),
        (["train_images/1_1.jpg", "train_images/2_1.jpg"], ["1", "2"]),
        (["x/1_1.jpg", "x/2_1.jpg"], ["1", "2"]),
        (["d/b1/images/1_1.jpg", "d/b2/images/1_2.jpg", "d/1_3.jpg"], ["b1", "b2", "1"]),
        (["title/vol1/1_1.jpg", "title/vol2/2_1.jpg", "other/3_1.jpg"], ["title", "title", "other"]),
        (["か\u3099/1_1.jpg", "b/2_1.jpg"], ["が", "b"]),
    ],
)
def test_pages_in_folders_are_of_the_folder_s_book(files: list[str], books: list[str]) -> None:
    ids = [name.rpartition("/")[2].removesuffix(".jpg") for name in files]
    labels = labels_of(dict.fromkeys(ids, 1))
    found = books_of_pages(labels, {page_id: (name, 1) for page_id, name in zip(ids, files, strict=True)})
    assert dict(zip(labels.page_ids, found, strict=True)) == dict(zip(ids, books, strict=True))


def test_a_book_that_the_label_file_states_comes_before_folders_and_ids() -> None:
    labels = labels_of({"1_1": 1, "2_1": 1})
    stated = Labels(**(vars(labels) | {"books": {"1_1": "hnsd00000"}}))
    assert books_of_pages(stated, {"1_1": ("a/1_1.jpg", 1), "2_1": ("b/2_1.jpg", 1)}) == ["hnsd00000", "b"]


def test_folders_whose_names_are_not_utf_8_are_books_of_their_own() -> None:
    titles = "源氏", "伊勢", "枕草"
    names = [os.fsdecode(title.encode("cp932") + b"/1.jpg") for title in titles]
    names += [os.fsdecode(name + b"/1.jpg") for name in (b"\x82\xff", b"\x82\xfe")]  # not CP932 either
    labels = labels_of({str(i): 1 for i in range(len(names))})
    files = {str(i): (name, 1) for i, name in enumerate(names)}
    assert books_of_pages(labels, files) == [*titles, r"\x82\xff", r"\x82\xfe"]


@given(st.text("aZ", min_size=1), st.sampled_from(["", "0", "_", "-"]), st.text("aZ0_-"))
def test_volumes_of_a_title_are_one_book(title: str, mark: str, rest: str) -> None:
    assert book_of(title + mark + rest if mark else title) == title


@given(st.text("ab01_-", min_size=1, max_size=9))
def test_pages_of_one_volume_are_never_of_two_books(page_id: str) -> None:
    assert book_of(page_id)
    if volume := volume_of(page_id):
        assert book_of(page_id) == book_of(volume)


@pytest.fixture(scope="module")
def layouts(shared: Path) -> Labels:
    return read_labels(place(shared / "layouts.csv"))


def test_the_44_volumes_of_the_layouts_are_21_titles(layouts: Labels) -> None:
    books = books_of_pages(layouts, NO_FOLDERS)
    assert len({volume_of(page_id) for page_id in layouts.page_ids}) == 44
    assert len(set(books)) == 21
    assert {"brsk", "hnsd", "umgy"} < set(books)


def sides_of(units: list[str], labels: Labels, splits: NDArray[np.int8]) -> dict[str, set[int]]:
    """Return the splits that each unit has boxes in. `units`: the unit of each page."""
    sides: dict[str, set[int]] = {}
    of_page = np.split(splits, labels.starts[1:-1])
    for unit, found in zip(units, of_page, strict=True):
        sides.setdefault(unit, set()).update(found.tolist())
    return sides


def test_no_title_is_in_two_splits_with_any_of_100_seeds(layouts: Labels) -> None:
    titles = [book_of(page_id) for page_id in layouts.page_ids]
    for seed in range(100):
        splits = split_of_boxes(layouts, "book", seed, 0.15, 0.15, books_of_pages(layouts, NO_FOLDERS))
        assert all(len(sides) == 1 for sides in sides_of(titles, layouts, splits).values())
        assert set(splits.tolist()) == {TRAIN, VALIDATION, TEST}


@given(st.lists(st.integers(0, 40), min_size=3, max_size=12), st.integers(3, 5), st.integers(0, 9), st.data())
def test_each_unit_is_tested_once_and_folds_differ_by_no_more_than_one_unit(
    sizes: list[int], folds: int, seed: int, data: st.DataObject
) -> None:
    labels = labels_of({f"{i:02}_{page}": size for i, size in enumerate(sizes) for page in range(2)})
    books = [book_of(page_id) for page_id in labels.page_ids]
    alone = np.array(data.draw(st.lists(st.booleans(), min_size=len(books), max_size=len(books))))
    of_training = {book for book, is_alone in zip(books, alone, strict=True) if is_alone}
    tested = {f"{i:02}": size for i, size in enumerate(sizes) if size and f"{i:02}" not in of_training}
    if len(tested) < folds:
        with pytest.raises(OptionError, match=r"--split book must find|--folds must be at most the number of books"):
            folds_of_boxes(labels, "book", seed, folds, 0, books, alone)
        return
    found = [folds_of_boxes(labels, "book", seed, folds, k, books, alone) for k in range(folds)]
    times: dict[str, int] = {}
    for k, splits in enumerate(found):
        sides = sides_of(books, labels, splits)
        assert all(len(of_book) <= 1 for of_book in sides.values())
        assert all(sides[book] <= {TRAIN} for book in of_training)
        for book in (book for book, of_book in sides.items() if of_book == {TEST}):
            times[book] = times.get(book, 0) + 1
        assert np.array_equal(splits == VALIDATION, found[(k + 1) % folds] == TEST)
    assert times == dict.fromkeys(tested, 1)
    per_fold = [int((splits == TEST).sum()) for splits in found]
    assert max(per_fold) - min(per_fold) <= 2 * max(tested.values())


def test_another_seed_gives_other_folds(layouts: Labels) -> None:
    for by in ("page", "book"):
        first, again, other = (
            folds_of_boxes(layouts, by, seed, 5, 0, books_of_pages(layouts, NO_FOLDERS)) for seed in (1, 1, 2)
        )
        assert np.array_equal(first, again)
        assert not np.array_equal(first, other)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"folds": 5, "split": "book"}, "--folds and --fold must be given together"),
        ({"fold": 0, "split": "book"}, "--folds and --fold must be given together"),
        ({"folds": 5, "fold": 5, "split": "book"}, "--fold must be one of 0 to --folds - 1"),
        ({"folds": 5, "fold": 0}, "Received: --split random"),
        ({"folds": 5, "fold": 0, "split": "page", "test_fraction": 0.1}, "Received: --test-fraction. Leave it out"),
    ],
)
def test_folds_that_do_not_fit_the_other_options_are_refused(options: dict[str, Any], says: str) -> None:
    with pytest.raises(OptionError, match=says):
        PrepareConfig(**options)


def test_fewer_than_three_books_are_refused_in_one_line() -> None:
    labels = labels_of({"book1_1": 50, "book2_1": 60, "book3_1": 70, "empty_1": 0})
    with pytest.raises(OptionError, match=r"at least 3 books .*Received: 1 .book.\. Name .* --books FILE"):
        split_of_boxes(labels, "book", 42, 0.15, 0.15, books_of_pages(labels, NO_FOLDERS))
    with pytest.raises(OptionError, match=r"at least 3 books .*--books FILE"):
        folds_of_boxes(labels, "book", 42, 3, 0, books_of_pages(labels, NO_FOLDERS))
    with pytest.raises(OptionError, match=r"at most the number of pages with boxes. Received: --folds 4, 3 pages"):
        folds_of_boxes(labels, "page", 42, 4, 0, books_of_pages(labels, NO_FOLDERS))


def books_file(tmp_path: Path, text: str) -> BooksFile:
    (tmp_path / "books.csv").write_text(text, encoding="utf-8")
    return read_books(place(tmp_path / "books.csv"))


def test_a_file_of_books_or_of_training_pages_is_read_up_to_a_limit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = "page,book\na,b\n"
    monkeypatch.setattr("preprocessing.books.MAX_FILE_BYTES", len(text))
    assert books_file(tmp_path, text).books == {"a": "b"}
    with pytest.raises(InputError, match="--books must have at most 14 bytes"):
        books_file(tmp_path, text + "\n")
    with pytest.raises(InputError, match="--train-only must have at most 14 bytes"):
        read_train_only(place(tmp_path / "books.csv"))


def test_a_file_of_books_overrides_the_rule_and_the_longest_prefix_counts(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    labels = labels_of(dict.fromkeys(("a1_1", "a2_1", "b_1", "か\u3099_1"), 1))
    files = {"a1_1": ("a1_1.jpg", 1)}
    by_page = books_file(tmp_path, "\ufeffpage,book\na1_1,first\nが_1,third\n\nc_1,none\n")
    assert books_of_pages(labels, files, by_page) == ["first", "a", "b", "third"]
    assert "--books: 1 of 3 lines name no page, such as 'c_1'" in caplog.text
    by_prefix = books_file(tmp_path, "prefix,book\na,A\na2,A2\n")
    assert books_of_pages(labels, files, by_prefix) == ["A", "A2", "b", "が"]
    with pytest.raises(InputError, match="--books must name pages of the input. Received: 1 lines of page,book"):
        books_of_pages(labels, files, books_file(tmp_path, "page,book\nx,y\n"))


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("image,book\na,b\n", "must begin with the header page,book or prefix,book. Received: 'image,book'"),
        ("", "must begin with the header"),
        ("page,book\n", "Received: no row"),
        ("page,book\na\n", "line 2: a row must be a page and its book. Received: 'a'"),
        ("page,book\na, \n", "line 2: a row must be a page and its book"),
        ("prefix,book\na,b\na,c\n", "line 3: a prefix must have one row only. Received: 'a' twice"),
        ('page,book\n"a,b\n', "not CSV"),
        ("page,book\na,b\x07\n", "line 2: a row must be"),
    ],
)
def test_a_file_that_is_no_list_of_books_is_refused_in_one_line(text: str, says: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=says) as raised:
        books_file(tmp_path, text)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize("read", [read_books, read_train_only])
def test_an_option_s_file_that_is_not_there_or_not_text_is_refused(read: Callable[..., Any], tmp_path: Path) -> None:
    with pytest.raises(InputError, match="must be a file. Received: .*, where there is none"):
        read(place(tmp_path / "none"))
    (tmp_path / "scan").write_bytes(b"\xff\xd8\xff\xe0" + bytes(range(256)))
    with pytest.raises(InputError, match="must be text in UTF-8, UTF-16 or CP932"):
        read(place(tmp_path / "scan"))
    (tmp_path / "empty").write_bytes(b"\n")
    with pytest.raises(InputError, match="Received: no line|header"):
        read(place(tmp_path / "empty"))


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "cp932"])
def test_a_list_of_books_and_one_of_pages_for_training_may_come_from_excel(encoding: str, tmp_path: Path) -> None:
    (tmp_path / "books.csv").write_bytes("prefix,book\r\na_,源氏物語\r\n".encode(encoding))
    assert read_books(place(tmp_path / "books.csv")).books == {"a_": "源氏物語"}
    (tmp_path / "pages.txt").write_bytes("源氏物語\r\na_1\r\n".encode(encoding))
    assert read_train_only(place(tmp_path / "pages.txt")).names == {"源氏物語", "a_1"}


def train_only(*names: str) -> TrainOnlyFile:
    return TrainOnlyFile(sha256="0" * 64, names=frozenset(names))


@pytest.mark.parametrize("by", ["random", "page", "book"])
def test_train_only_pages_are_in_no_other_split(by: str) -> None:
    labels = labels_of({f"{i // 2}_{i}": 10 for i in range(40)})
    books = [book_of(page_id) for page_id in labels.page_ids]
    alone = pages_for_training(labels, {}, books, train_only("3_7", "5", "6"))
    assert [labels.page_ids[i] for i in np.flatnonzero(alone)] == ["3_7", "5_10", "5_11", "6_12", "6_13"]
    for seed in range(20):
        splits = split_of_boxes(labels, by, seed, 0.2, 0.2, books, alone)
        sides = sides_of(labels.page_ids, labels, splits)
        assert all(sides[labels.page_ids[i]] == {TRAIN} for i in np.flatnonzero(alone))
        if by == "book":  # the page's whole book, because a book must be in one split
            assert sides["3_6"] == {TRAIN}
        free = 400 - 10 * (6 if by == "book" else 5)
        assert (splits == TEST).sum() == free // 5 // 10 * 10 if by != "random" else free // 5


@pytest.mark.parametrize("by", ["page", "book"])
def test_pages_for_training_alone_leave_the_splits_of_the_others_as_they_are(by: str) -> None:
    real = labels_of({f"{i}_{page}": 10 + i for i in range(3, 12) for page in range(3)})
    both = labels_of({f"{i}_{page}": 10 + i for i in range(16) for page in range(3)})  # more before, between and after
    books = [book_of(page_id) for page_id in both.page_ids]
    alone = np.array([page_id not in real.page_ids for page_id in both.page_ids])
    of_real = np.repeat(~alone, both.boxes_per_page)
    for seed in range(5):
        whole = folds_of_boxes(both, by, seed, 4, 1, books, alone)
        assert np.array_equal(whole[of_real], folds_of_boxes(real, by, seed, 4, 1, books_of_pages(real, NO_FOLDERS)))
        whole = split_of_boxes(both, by, seed, 0.2, 0.2, books, alone)
        assert set(whole[~of_real].tolist()) == {TRAIN}
        # Without pages for training alone, one unit is kept for training; with so many units, that changes nothing.
        assert np.array_equal(
            whole[of_real], split_of_boxes(real, by, seed, 0.2, 0.2, books_of_pages(real, NO_FOLDERS))
        )


def test_two_real_books_next_to_drawn_ones_become_validation_and_test() -> None:
    labels = labels_of({"1_1": 50, "2_1": 60, "drawn_1": 5})
    books = ["1", "2", "drawn"]
    splits = split_of_boxes(labels, "book", 42, 0.15, 0.15, books, np.array([False, False, True]))
    assert set(splits.tolist()) == {TRAIN, VALIDATION, TEST}
    with pytest.raises(OptionError, match="at least 2 books with boxes besides those of --train-only. Received: 1"):
        split_of_boxes(labels, "book", 42, 0.15, 0.15, books, np.array([False, True, True]))


def test_a_line_for_training_that_is_neither_page_nor_book_is_refused() -> None:
    labels = labels_of({"1_1": 1})
    files = {"2_1": ("2_1.jpg", 1)}  # a page without labels may be named, too
    assert pages_for_training(labels, files, ["1"], train_only("1", "2_1")).tolist() == [True]
    with pytest.raises(InputError, match="must be a page or a book of the input. Received: 'x' and 1 more"):
        pages_for_training(labels, files, ["1"], train_only("1", "x", "y"))


def test_few_books_and_a_large_share_of_rare_are_logged_with_the_page_of_the_docs(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO", "kuzushiji")
    ids = ("a_0", "b_0", "c_0", "c_1")
    rows = {page_id: boxes(10, "U+3042" if page_id in ("c_0", "c_1") else "U+306F") for page_id in ids}
    write_pages(tmp_path, {f"{page_id}.jpg": page() for page_id in ids}, rows)
    config = PrepareConfig(split="book", classes=("U+3042", "rare"), train_only=train_only("c_1"))
    make_plan(place(tmp_path / "train_images"), place(tmp_path / "train.csv"), config)
    share = "50 % of the boxes, and 100 % of those of the test, are of the class rare"
    assert f"{share}, a large share: see docs/data.md#classes" in caplog.text
    assert (
        "only 2 books can be in the test, so the accuracy depends on which are. See docs/data.md#few-books"
        in caplog.text
    )


def test_pages_that_are_each_a_book_are_a_warning_with_split_book(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    ids = [f"源氏物語{i:03}" for i in range(12)]
    write_pages(tmp_path, {f"{page_id}.jpg": page() for page_id in ids}, {page_id: boxes(4) for page_id in ids})
    source = place(tmp_path / "train_images"), place(tmp_path / "train.csv")
    make_plan(*source, PrepareConfig(split="page"))
    assert "of one page only" not in caplog.text
    make_plan(*source, PrepareConfig(split="book"))
    assert "--split book: 12 books of one page only, such as '源氏物語000'." in caplog.text
    caplog.clear()
    (tmp_path / "books.csv").write_text(f"page,book\n{ids[0]},a\n{ids[1]},a \n{ids[2]},b\n{ids[3]},c\n")
    named = read_books(place(tmp_path / "books.csv"))
    assert set(named.books.values()) == {"a", "b", "c"}  # a blank makes no other book


def test_a_split_of_pages_that_all_lack_their_scans_is_refused(tmp_path: Path) -> None:
    rows = {f"b{i}_{j}": boxes(9) for i in range(3) for j in range(9)} | {"lost_1": boxes(3)}
    files = {f"{page_id}.jpg": page() for page_id in rows if page_id != "lost_1"}
    write_pages(tmp_path, files, rows)
    (tmp_path / "books.csv").write_text("prefix,book\nb0,zero\nb1,one\nb2,two\n")
    config = PrepareConfig(split="book", folds=4, fold=0, books=read_books(place(tmp_path / "books.csv")))
    source = place(tmp_path / "train_images"), place(tmp_path / "train.csv")
    of_fold = [config.model_copy(update={"fold": fold, "max_bad_fraction": 0.02}) for fold in range(4)]
    empty = [make_plan(*source, config).splits_without_crops for config in of_fold]
    assert sorted(empty) == [[], [], ["test"], ["validation"]]
    refused = of_fold[empty.index(["test"])]
    with pytest.raises(InputError, match="Received: test, whose boxes all lack a scan or an area. Add the scans, or"):
        prepare(*source, place(tmp_path / "out"), refused)


def test_a_million_pages_with_one_percent_of_losses_fit_into_the_manifest(tmp_path: Path) -> None:
    write_pages(tmp_path, {"a_0.jpg": page()}, {"a_0": boxes(10)})
    config = PrepareConfig(max_bad_fraction=1)
    plan = make_plan(place(tmp_path / "train_images"), place(tmp_path / "train.csv"), config)
    loss = {"box": [0, 0, 1, 1], "page": "a_0", "unicode": "U+306F", "what": "page has no file"}
    manifest = _manifest(plan, config, {"train": [], "validation": [], "test": []}, [loss] * 1_761_051)  # type: ignore[list-item]
    assert (len(manifest.losses), manifest.lost) == (10_000, 1_761_051)
    encoded(manifest)


def test_a_dataset_lists_its_pages_and_losses_and_another_file_of_books_or_of_pages_for_training_is_refused(
    ray_here: None, tmp_path: Path, kuzushiji: Kuzushiji, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("preprocessing.prepare.LISTED_LOSSES", 3)
    rows = {f"b{i}_{j}": boxes(4) for i in range(4) for j in range(2)} | {"b0_9": ""}
    files = {f"{page_id}.jpg": page(seed=i) for i, page_id in enumerate(rows) if page_id not in ("b1_1", "b2_0")}
    write_pages(tmp_path, files, rows)
    (tmp_path / "books.csv").write_text("prefix,book\nb0,zero\nb1,one\nb2,two\nb3,three\n")
    (tmp_path / "alone.txt").write_text("three\n")
    given = ["--pages", tmp_path / "train_images", "--labels", tmp_path / "train.csv", "--dataset", tmp_path / "out"]
    given += ["--split", "book", "--folds", "3", "--fold", "1", "--books", tmp_path / "books.csv"]
    given += ["--train-only", tmp_path / "alone.txt", "--max-bad-fraction", "1", "--json"]
    done = kuzushiji("prepare", *given)
    assert done.code == 0, done.stderr
    assert json.loads(done.stdout)["losses"] == 8
    manifest = read_manifest(place(tmp_path / "out"), DatasetManifest)
    assert {"pages.parquet", "losses.parquet"} < {entry.name for entry in manifest.files}
    assert verify(place(tmp_path / "out"))[1:] == ([], [])
    more = losses_of_table(place(tmp_path / "out" / "losses.parquet"))
    assert (len(manifest.losses), len(more), manifest.lost) == (3, 5, 8)
    assert [loss["page"] for loss in manifest.losses + more] == ["b1_1"] * 4 + ["b2_0"] * 4
    assert more[-1] == {"box": [15, 21, 23, 33], "page": "b2_0", "unicode": "U+306F", "what": "page has no file"}
    table = pd.read_parquet(tmp_path / "out" / "pages.parquet")
    assert table["page"].tolist() == sorted(rows)
    assert table["book"].tolist() == ["zero"] * 3 + ["one"] * 2 + ["two"] * 2 + ["three"] * 2
    assert table["boxes"].tolist() == [4, 4, 0, 4, 4, 4, 4, 4, 4]
    sides = dict(zip(table["page"], (tuple(found) for found in table["splits"]), strict=True))
    assert sides["b3_0"] == sides["b3_1"] == ("train",)
    assert sides["b0_9"] == ()
    assert {sides[f"b{i}_0"] for i in range(3)} == {("train",), ("validation",), ("test",)}
    decoded = table[table["width"].notna()]
    assert decoded["page"].tolist() == [page_id for page_id in sorted(rows) if page_id not in ("b0_9", "b1_1", "b2_0")]
    assert {*zip(decoded["width"], decoded["height"], decoded["orientation"], strict=True)} == {(100, 200, 1)}
    assert "Fold 1 of 3 (from 0) is the test" in (tmp_path / "out" / "README.md").read_text()
    assert manifest.config["books"] == read_books(place(tmp_path / "books.csv")).sha256
    before = contents(tmp_path / "out")
    sorted((tmp_path / "out").glob("*train*"))[0].write_bytes(b"")
    assert kuzushiji("prepare", *given).code == 0  # only the damaged shard is made again
    assert contents(tmp_path / "out") == before
    for name, option in (("books.csv", "books"), ("alone.txt", "train_only")):
        content = (tmp_path / name).read_text()
        (tmp_path / name).write_text(content + "\n")
        refused = kuzushiji("prepare", *given)
        (tmp_path / name).write_text(content)
        assert refused.code == 2
        assert f"these differ: {option} (was " in refused.lines[-1]


def test_a_table_that_was_changed_is_read_or_refused_in_one_line(tmp_path: Path) -> None:
    labels = labels_of({f"{i:03}_1": 2 for i in range(50)})
    size: PageResult = {
        "page": "003_1", "width": 9, "height": 8, "orientation": 6, "crops": 2, "without_ink": 1, "warnings": ["x"],
    }  # fmt: skip
    splits = np.full(100, TRAIN, np.int8)
    good = pages_table(labels, [book_of(page_id) for page_id in labels.page_ids], splits, {"003_1": size})
    path = tmp_path / "pages.parquet"
    path.write_bytes(good)
    assert books_of_table(place(path)) == {f"{i:03}_1": f"{i:03}" for i in range(50)}
    assert results_of_table(place(path)) == [size]
    rng, refused = np.random.default_rng(1), 0
    for _ in range(300):
        data = np.frombuffer(good, np.uint8).copy()
        data[rng.integers(0, len(data), 3)] = rng.integers(0, 256, 3)
        path.write_bytes(data[: rng.choice([len(data), rng.integers(1, len(data))])].tobytes())
        for read in (books_of_table, results_of_table):
            try:
                read(place(path))
            except DamageError as error:
                assert re.fullmatch("[^\n]* must be a table as `prepare` writes it. Received: [^\n]*", str(error))
                refused += 1
    assert refused > 300


def as_of_an_earlier_release(dataset: Path, target: Path, split: str) -> None:
    """Copy a dataset into the form that datasets had before books were titles."""
    shutil.copytree(dataset, target)
    manifest = json.loads((target / "manifest.json").read_text())
    for name in ("book_rule", "more_losses"):
        del manifest[name]
    for name in ("books", "folds", "fold", "train_only"):
        del manifest["config"][name]
    del manifest["versions"]["pyarrow"]
    manifest["config"]["split"] = split
    manifest["files"] = [entry for entry in manifest["files"] if entry["name"] != "pages.parquet"]
    (target / "pages.parquet").unlink()
    (target / "manifest.json").write_text(json.dumps(manifest))


def test_a_dataset_of_an_earlier_release_is_read_and_says_that_it_was_split_by_volume(
    dataset: Path, pages: Path, tmp_path: Path
) -> None:
    as_of_an_earlier_release(dataset, tmp_path / "by_book", "book")
    as_of_an_earlier_release(dataset, tmp_path / "by_box", "random")
    assert verify(place(tmp_path / "by_book"))[1:] == ([], [])
    assert (
        "Split by volume, which an earlier release took for the book"
        in dataset_report(place(tmp_path / "by_book")).decode()
    )
    assert read_manifest(place(tmp_path / "by_book"), DatasetManifest).split_by == "volume"
    source = place(pages / "train_images"), place(pages / "train.csv")
    with pytest.raises(OptionError, match="these differ: book_rule .was volumes, now titles"):
        prepare(*source, place(tmp_path / "by_book"), PrepareConfig(split="book", coverage=0.5))
    assert prepare(*source, place(tmp_path / "by_box"), PrepareConfig(coverage=0.5))[1] is False
    sorted((tmp_path / "by_box").glob("*train*"))[0].write_bytes(b"")
    prepare(*source, place(tmp_path / "by_box"), PrepareConfig(coverage=0.5))
    assert contents(tmp_path / "by_box") == contents(dataset)


def test_the_report_lists_each_book_with_its_crops_in_the_splits(dataset: Path) -> None:
    table = pd.read_parquet(dataset / "pages.parquet")
    text = dataset_report(place(dataset)).decode()
    for book, of_book in table.groupby("book"):
        assert f'<tr><td>{book}</td><td class="number">{len(of_book)}</td>' in text
