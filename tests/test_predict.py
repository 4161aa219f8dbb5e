"""predict: the same crops as `prepare`, every box once, in reading order, with all losses listed."""

import codecs
import json
import shutil
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import psutil
import pytest
from chaos import title
from conftest import Kuzushiji
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from cluster.errors import DamageError, InputError, OptionError
from cluster.places import place
from cluster.storage import check_writable, write_bytes
from job.predict.columns import columns
from job.predict.folder import PredictionsManifest
from job.predict.predict import predict
from job.predict.read_group import ReadGroup, resumable, unfinished_pictures
from job.predict.readings import Readings
from job.verify import verify
from preprocessing.config import SPLITS, PrepareConfig
from preprocessing.cutting import Cut, cut_boxes
from preprocessing.group_files import write_groups
from preprocessing.groups import group_pages
from preprocessing.labels.read import read_labels
from preprocessing.pages import list_pages
from preprocessing.prepare import prepare


@pytest.fixture(scope="module")
def model(real_dataset: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a model with the classes of the real pages. Its predictions depend on every pixel; most are wrong."""
    return any_model(tmp_path_factory.mktemp("model"), (real_dataset / "label.labels.txt").read_text(), {})


def any_model(folder: Path, labels: str, config: dict[str, Any]) -> Path:
    """Write a model with random weights. labels, config: content of its `labels.txt` and `config.json`."""
    import keras

    from job.model.folder import write_model

    keras.utils.set_random_seed(1)
    layers = [
        keras.layers.Rescaling(1 / 255),
        keras.layers.AveragePooling2D(8),
        keras.layers.Flatten(),
        keras.layers.LayerNormalization(),
        keras.layers.Dense(len(labels.splitlines()), activation="softmax", kernel_initializer="he_normal"),
    ]
    texts = {"labels.txt": labels, "config.json": json.dumps(config)}
    write_model(
        place(folder / "baseline" / "first"), keras.Sequential([keras.Input((80, 80, 1)), *layers]), texts, "0" * 64
    )
    return folder / "baseline"


def test_a_picture_has_boxes_where_they_are_on_the_scan_also_if_they_were_scaled() -> None:
    cuts = [Cut("a_1", [1, 2, 3, 4], None, placed=[2, 4, 6, 8])]
    one = np.zeros((1, 1), np.int64)
    readings = Readings(
        cuts, np.array([0x306F]), np.array([0]), one, one.astype(np.float32), ["U+306F"], {"a_1": [[0]]}
    )
    assert readings.for_picture("a_1")[0].tolist() == [[2, 4, 6, 8]]
    assert readings.predictions()[["x", "y", "width", "height"]].to_numpy().tolist() == [[1, 2, 3, 4]]


@pytest.fixture(scope="module")
def read(ray_here: None, model: Path, shared: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the predictions for the real pages; the pictures are in `pictures`, next to them."""
    folder = tmp_path_factory.mktemp("read")
    do(model, shared / "pages", shared / "train.csv", folder / "out", annotate=place(folder / "pictures"))
    return folder / "out"


def do(model: Path, pages: Path, boxes: Path, out: Path, **options: Any) -> PredictionsManifest:
    return predict(place(model), place(pages), place(boxes), place(out), **options)[0]


def table(folder: Path, kind: str = "predictions") -> pd.DataFrame:
    return pd.read_parquet(sorted(folder.glob(f"{kind}-*.parquet")))  # one dataset: all files have the same schema


def without_characters(labels: Path, to: Path) -> Path:
    rows = pd.read_csv(labels, dtype=str)
    cells = [cell.split() for cell in rows["labels"]]
    rows["labels"] = [" ".join(field for i, field in enumerate(cell) if i % 5) for cell in cells]
    rows.to_csv(to, index=False)
    return to


def test_predict_reads_exactly_the_crops_of_the_dataset(
    real_dataset: Path, shared: Path, read: Path, model: Path
) -> None:
    from job.data.staging import staged
    from job.model.folder import load_model

    labels = read_labels(place(shared / "train.csv"))
    groups = group_pages(labels, list_pages(place(shared / "pages")).files_of(labels.page_ids), 2)
    cuts = {(cut.page_id, *cut.box): cut.crop for group in groups for cut in cut_boxes(group, place(shared / "pages"))}
    loaded, names, _ = load_model(place(model))
    found = table(read).set_index(["image_id", "x", "y", "width", "height"])
    with staged(place(real_dataset), SPLITS) as dataset:
        compared = 0
        for split in SPLITS:
            crops = dataset.splits[split]
            probabilities = loaded.predict(crops.images[:], verbose=0)
            for i, page_id in enumerate(crops.page_ids()):
                where = (page_id, *crops.boxes[i].tolist())
                assert np.array_equal(cuts[where], crops.images[i][:, :, 0])
                best = np.argsort(-probabilities[i], kind="stable")[:5]
                seen = found.loc[where]
                assert [seen[f"label_{rank}"] for rank in range(1, 6)] == [names[j] for j in best]
                reported = [seen[f"probability_{rank}"] for rank in range(1, 6)]
                np.testing.assert_allclose(reported, probabilities[i][best], rtol=1e-4)
                compared += 1
    assert compared == len(cuts) == len(found)


def test_a_model_of_crops_with_a_margin_reads_new_pages_with_it_and_is_evaluated_with_no_other(
    ray_here: None, pages: Path, dataset: Path, tmp_path: Path
) -> None:
    from job.data.staging import staged
    from job.evaluate import evaluate
    from job.model.folder import load_model

    source, config = (pages / "train_images", pages / "train.csv"), PrepareConfig(coverage=0.5, margin=0.15)
    prepare(*map(place, source), place(tmp_path / "wide"), config)
    labels = (tmp_path / "wide" / "label.labels.txt").read_text()
    assert labels == (dataset / "label.labels.txt").read_text()
    card = (tmp_path / "wide" / "README.md").read_text()
    assert "the box, widened by 0.15 of its longer side on each side, in grayscale, its longer side scaled" in card
    model = any_model(tmp_path / "models", labels, {"margin": 0.15})
    do(model, *source, tmp_path / "out")
    found = table(tmp_path / "out").set_index(["image_id", "x", "y", "width", "height"])
    loaded = load_model(place(model))[0]
    with staged(place(tmp_path / "wide"), ["test"]) as wide, staged(place(dataset), ["test"]) as plain:
        crops, narrow = wide.splits["test"], plain.splits["test"]
        assert np.array_equal(crops.boxes, narrow.boxes)  # as in the labels
        assert not np.array_equal(crops.images, narrow.images)
        best = loaded.predict(crops.images[:], verbose=0).max(axis=1)
        where = zip(crops.page_ids(), crops.boxes.tolist(), strict=True)
        reported = [found.loc[(page_id, *box), "probability_1"] for page_id, box in where]
    np.testing.assert_allclose(reported, best, rtol=1e-4)
    assert evaluate(place(model), place(tmp_path / "wide"), "test").metrics.examples == len(best)
    with pytest.raises(OptionError, match=r"margin of the model's crops, 0\.15\. Received: 0\. .*--margin 0\.15"):
        evaluate(place(model), place(dataset), "test")
    with pytest.raises(OptionError, match=r"margin \(was 0\.15, now 0\.0\)"):
        prepare(*map(place, source), place(tmp_path / "wide"), PrepareConfig(coverage=0.5))


@pytest.mark.parametrize("margin", ["0.1", True, -0.1, 2, None, float("nan")])
def test_an_invalid_margin_is_damage(margin: object, tmp_path: Path) -> None:
    from job.model.folder import read_trained_on

    model = any_model(tmp_path, "U+306F\nrare\n", {"margin": margin})
    with pytest.raises(DamageError, match="the margin must be a number from 0 to 1"):
        read_trained_on(place(model / "first"))


def test_the_accuracy_is_that_of_evaluate(read: Path, model: Path, real_dataset: Path) -> None:
    from job.evaluate import evaluate

    accuracy = json.loads((read / "manifest.json").read_text())["accuracy"]
    parts = [asdict(evaluate(place(model), place(real_dataset), split).metrics) for split in SPLITS]
    assert accuracy["examples"] == sum(part["examples"] for part in parts)
    for key in ("accuracy", "top5"):
        assert accuracy[key] == pytest.approx(
            sum(part[key] * part["examples"] for part in parts) / accuracy["examples"]
        )


def test_boxes_without_labels_get_the_same_predictions_and_no_accuracy(
    read: Path, model: Path, shared: Path, tmp_path: Path
) -> None:
    bare = without_characters(shared / "train.csv", tmp_path / "boxes.csv")
    manifest = do(model, shared / "pages", bare, tmp_path / "out")
    assert manifest.accuracy == {}
    labelled, alike = table(read), table(tmp_path / "out")
    assert alike["unicode"].isna().all()
    pd.testing.assert_frame_equal(alike.drop(columns="unicode"), labelled.drop(columns="unicode"))


def test_csv_holds_the_same_as_parquet(read: Path, model: Path, shared: Path, tmp_path: Path) -> None:
    do(model, shared / "pages", shared / "train.csv", tmp_path / "out", form="csv")
    for kind in ("predictions", "pages"):
        for file in (tmp_path / "out").glob(f"{kind}-*.csv"):
            assert file.read_bytes().startswith(codecs.BOM_UTF8)  # Excel needs it
        same = pd.concat(map(pd.read_csv, sorted((tmp_path / "out").glob(f"{kind}-*.csv"))), ignore_index=True)
        pd.testing.assert_frame_equal(same, table(read, kind), check_dtype=False)


def test_the_text_of_a_page_has_each_character_once_by_column(read: Path, shared: Path) -> None:
    boxes, pages = table(read), table(read, "pages").set_index("image_id")
    assert len(pages) == len(read_labels(place(shared / "train.csv")).page_ids)
    for page_id, of_page in boxes.groupby("image_id"):
        lines = ["".join(column["character_1"]) for _, column in of_page.groupby("column")]
        assert pages.loc[page_id, "text"] == "\n".join(lines)
        assert pages.loc[page_id, "characters"] == len(of_page)
    assert (boxes.filter(like="label_") == "rare").any(axis=None)
    for rank in range(1, 6):
        assert ((boxes[f"label_{rank}"] == "rare") == (boxes[f"character_{rank}"] == "〓")).all()


def test_pictures_show_each_page_next_to_its_predictions(read: Path, shared: Path) -> None:
    for page in (shared / "pages").iterdir():
        with Image.open(read.parent / "pictures" / f"{page.stem}.jpeg") as drawn, Image.open(page) as scan:
            half = drawn.width // 2
            assert half / (scan.width * 2400 / scan.height) == pytest.approx(1, abs=0.01)
            written = np.asarray(drawn.convert("RGB"))[: scan.height, half:]
        assert (np.abs(written.astype(int) - (213, 94, 0)).max(axis=2) < 20).any()  # vermillion: wrong characters


def test_unreadable_boxes_are_counted_and_listed_as_losses(
    model: Path, shared: Path, ray_here: None, tmp_path: Path
) -> None:
    shutil.copytree(shared / "pages", tmp_path / "pages")
    first, second, _ = sorted((tmp_path / "pages").iterdir())
    first.write_bytes(first.read_bytes()[:5000])
    rows = pd.read_csv(shared / "train.csv", dtype=str).set_index("image_id")
    rows.loc[second.stem, "labels"] += " U+306F 90000 0 9 9 U+306F -5 0 9 9"
    rows.loc["0-elsewhere", "labels"] = "U+306F 1 2 3 4"
    rows.loc["zz-empty", "labels"] = ""
    rows.to_csv(tmp_path / "boxes.csv")
    manifest = do(model, tmp_path / "pages", tmp_path / "boxes.csv", tmp_path / "out")
    lost = {(loss["page"], loss["what"].split(":")[0].split(" of ")[0]) for loss in manifest.losses}
    assert {("0-elsewhere", "page has no file"), (second.stem, "box is off its page")} < lost
    assert first.stem in {page for page, _ in lost}
    assert [entry["page"] for entry in manifest.clipped] == [second.stem]
    assert manifest.counts["read"] + len(manifest.losses) == manifest.counts["boxes"]
    assert len(table(tmp_path / "out")) == manifest.counts["read"]
    texts = table(tmp_path / "out", "pages").set_index("image_id")["text"]
    assert len(texts) == manifest.counts["pages"] == 5
    assert (texts["0-elsewhere"], texts["zz-empty"]) == ("", "")


def test_pages_without_a_scan_and_scans_without_boxes_are_reported_before_pages_are_read(
    model: Path, shared: Path, ray_here: None, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO", "kuzushiji")
    first, *_ = sorted((shared / "pages").iterdir())
    labels = pd.read_csv(shared / "train.csv", dtype=str).set_index("image_id").loc[[first.stem], "labels"]
    labels["misspelled"] = "U+306F 1 2 3 4"
    labels.to_csv(tmp_path / "boxes.csv")
    do(model, shared / "pages", tmp_path / "boxes.csv", tmp_path / "out")
    assert "1 page of --boxes without a scan, whose boxes are lost: first misspelled" in caplog.text
    assert "2 scans without boxes, not read: first" in caplog.text


def test_predict_seals_nothing_if_no_box_is_readable(model: Path, shared: Path, ray_here: None, tmp_path: Path) -> None:
    page_id = min(path.stem for path in (shared / "pages").iterdir())
    for row, fault, begun in ((f"{page_id},90000 2 3 4", "box is off", True), ("none,1 2 3 4", "page has no", False)):
        (tmp_path / "boxes.csv").write_text(f"image_id,labels\n{row}\n")
        shutil.rmtree(tmp_path / "out", ignore_errors=True)
        with pytest.raises(InputError, match=f"at least one box must be readable. Received: 1 lost, first: {fault}"):
            do(model, shared / "pages", tmp_path / "boxes.csv", tmp_path / "out")
        assert (tmp_path / "out").exists() == begun
        assert not (tmp_path / "out" / "manifest.json").exists()


def test_too_long_picture_names_and_too_large_manifests_are_refused_before_reading(
    model: Path, shared: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    page_id = "a" * 251
    (tmp_path / "pages").mkdir()
    shutil.copy(next((shared / "pages").iterdir()), tmp_path / "pages" / f"{page_id}.jpg")
    (tmp_path / "boxes.csv").write_text(f"image_id,labels\n{page_id},1 2 3 4\nb,{'1 2 3 4 ' * 20}\n")
    places = model, tmp_path / "pages", tmp_path / "boxes.csv", tmp_path / "out"
    with pytest.raises(InputError, match="a name in an image_id must have at most 250 bytes.* leave out"):
        do(*places, annotate=place(tmp_path / "pictures"))
    monkeypatch.setattr("cluster.manifest.MAX_MANIFEST_VALUES", 150)
    with pytest.raises(InputError, match="and 150 values. Received: .*, the longest list: 20 losses"):
        do(*places)
    assert not (tmp_path / "out").exists()


def test_killed_readers_do_not_change_the_predictions(read: Path, model: Path, shared: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    with ThreadPoolExecutor() as pool:
        pictures = place(tmp_path / "pictures")
        done = pool.submit(do, model, shared / "pages", shared / "train.csv", out, annotate=pictures)
        readers: list[psutil.Process] = []
        while not readers:
            assert not done.done(), done.result()
            workers = psutil.Process().children(recursive=True)
            readers = [one for one in workers if title(one).startswith("ray::Map(ReadGroup)")]
        for reader in readers:
            reader.kill()
        assert not done.done()
        done.result()
    assert {p.name: p.read_bytes() for p in out.iterdir()} == {p.name: p.read_bytes() for p in read.iterdir()}


class Killed(BaseException):
    """Simulates the death of a process in a test that has only one: none of our code catches it."""


@pytest.mark.parametrize(
    ("step", "named"),
    [
        ("preprocessing.cutting._read_page", ""),
        ("job.predict.read_group.annotated", r"\.jpeg"),
        ("job.predict.read_group.Readings.joined", " to .*"),
    ],
    ids=["read", "drawn", "in tables"],
)
def test_a_page_that_ends_each_process_while_it_is_read_or_drawn_ends_predict_in_one_line_that_names_it(
    step: str, named: str, model: Path, shared: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from job.model.folder import load_model
    from job.model.inference import Inference

    def killed(*_: Any) -> None:
        raise Killed

    loaded, names, _ = load_model(place(model / "first"))
    monkeypatch.setattr(
        "job.predict.read_group._load", lambda *_: (Inference(loaded), names)
    )  # this process has loaded TensorFlow already
    labels = read_labels(place(shared / "train.csv"))
    groups = group_pages(labels, list_pages(place(shared / "pages")).files_of(labels.page_ids), 1)
    places = {name: str(tmp_path / name) for name in ("out", "annotate")}
    work = ReadGroup(str(model), "", str(shared / "pages"), **places, form="csv", groups=1, on_gpu=False)
    with pytest.raises(DamageError, match="--out must not be removed while it is written, and must be a folder that"):
        work(0)
    out = resumable(place(tmp_path / "out"))
    write_bytes(out.plan_file, b"{}")
    write_groups(groups, out.progress_folder, work.attempt)
    check_writable(unfinished_pictures(place(tmp_path / "annotate"), out.folder))
    monkeypatch.setattr(step, killed)
    for _ in range(4):
        with pytest.raises(Killed):
            work(0)
    with pytest.raises(InputError, match=rf"Received: {labels.page_ids[0]}{named}, where 3 processes ended"):
        work(0)


def test_a_page_is_read_in_the_order_in_which_people_read_it(shared: Path) -> None:
    labels = read_labels(place(shared / "train.csv"))
    of_page = slice(*labels.starts[:2])
    characters = [chr(code) for code in labels.code_points[of_page].tolist()]
    lines = ["".join(characters[i] for i in column) for column in columns(labels.boxes[of_page])]
    assert lines[:5] == [
        "自序",
        "若い時の気強に己やれと思ふ",
        "た細工も老武者のかなしさは",
        "息子に及ず浮世を裏の三畳に",
        "避て正風の俳諧を楽しめ",
    ]


def test_an_out_folder_with_other_files_is_refused_unchanged(
    read: Path, model: Path, shared: Path, tmp_path: Path
) -> None:
    (tmp_path / "mine.txt").write_text("mine")
    with pytest.raises(OptionError, match=r"new or empty folder, or .* Received: .*, with mine.txt"):
        do(model, shared / "pages", shared / "train.csv", tmp_path)
    (tmp_path / "mine.txt").rename(tmp_path / "pages-of-mine.txt")
    with pytest.raises(OptionError, match=r"new or empty folder, or .* Received: .*, with pages-of-mine.txt"):
        do(model, shared / "pages", shared / "train.csv", tmp_path)
    for pictures in (tmp_path / "new", tmp_path / "new" / "pictures"):  # `new` would not be empty for the next attempt
        with pytest.raises(OptionError, match="a folder outside of --out"):
            do(model, shared / "pages", shared / "train.csv", tmp_path / "new", annotate=place(pictures))
    with pytest.raises(OptionError, match="--annotate must be a folder outside of --pages"):
        do(model, shared / "pages", shared / "train.csv", tmp_path / "new", annotate=place(shared / "pages"))
    # The tables would be among the input of the next attempt.
    with pytest.raises(OptionError, match="--out must be a folder outside of --pages"):
        do(model, shared / "pages", shared / "train.csv", shared / "pages" / "read")
    with pytest.raises(OptionError, match="--out must be a folder outside of --boxes"):
        do(model, shared / "pages", tmp_path, tmp_path / "read")
    with pytest.raises(OptionError, match=r"these differ: format \(was parquet, now csv\)\. Name another folder"):
        do(model, shared / "pages", shared / "train.csv", read, form="csv", annotate=place(read.parent / "pictures"))
    assert verify(place(read))[1:] == ([], [])


def test_the_command_prints_counts_and_accuracy(
    ray_here: None, model: Path, shared: Path, kuzushiji: Kuzushiji, tmp_path: Path
) -> None:
    places = ["--model", model, "--pages", shared / "pages", "--boxes", shared / "train.csv", "--out", tmp_path / "out"]
    first, second, third = kuzushiji("predict", *places).stdout.splitlines()
    assert first == f"read: 219 of 219 boxes on 3 pages; tables: {tmp_path / 'out'}"
    assert second.startswith("accuracy 0.")
    assert second.endswith(", 219 boxes with a character")
    assert third == "0 boxes lost, 0 clipped: each is listed in manifest.json"
    again = kuzushiji("predict", *places).stdout.splitlines()
    assert again == [first, "the folder is complete and valid: nothing written", second, third]
    assert kuzushiji("verify", tmp_path / "out").stdout.startswith("predictions ")


def test_a_character_below_the_least_confidence_is_shown_as_a_geta_mark_and_counted(
    read: Path, model: Path, shared: Path, kuzushiji: Kuzushiji, tmp_path: Path
) -> None:
    boxes = table(read)
    places = ["--model", model, "--pages", shared / "pages", "--boxes", shared / "train.csv", "--out", tmp_path / "out"]
    refused = kuzushiji("predict", *places, "--min-confidence", "nan")
    assert (refused.code, list(tmp_path.iterdir())) == (2, [])
    assert "--min-confidence must be a number from 0 to 1. Received: nan" in refused.stderr
    least = float(np.round(boxes["probability_1"].median(), 4))
    certain = boxes["probability_1"] >= least
    drawn = ["predict", *places, "--min-confidence", least, "--annotate", tmp_path / "pictures"]
    printed = kuzushiji(*drawn).stdout
    assert f"pictures: {tmp_path / 'pictures'}\n" in printed
    again = kuzushiji(*drawn).stdout
    assert ("pictures: " in again, "its pictures were drawn when it was made" in again) == (False, True)
    characters = boxes[certain & (boxes["label_1"] != "rare")]
    rare = int((certain & (boxes["label_1"] == "rare")).sum())
    count, right = int((~certain).sum()), (characters["unicode"] == characters["label_1"]).mean()
    assert (
        f"〓 for {count + rare} boxes ({rare} `rare`, {count} less probable than {least:g}); "
        f"accuracy of the others {right:.4f}\n" in printed
    )
    pd.testing.assert_frame_equal(table(tmp_path / "out"), boxes)  # unchanged, with all probabilities
    shown = boxes["character_1"].where(certain, "〓")
    for page_id, text in table(tmp_path / "out", "pages").set_index("image_id")["text"].items():
        of_page = boxes["image_id"] == page_id
        lines = ["".join(column) for _, column in shown[of_page].groupby(boxes["column"][of_page])]
        assert text == "\n".join(lines)
    manifest = PredictionsManifest.model_validate_json((tmp_path / "out" / "manifest.json").read_bytes())
    assert (manifest.min_confidence, manifest.counts["uncertain"]) == (least, count)
    assert {path.stem for path in (tmp_path / "pictures").iterdir()} == {
        path.stem for path in (read.parent / "pictures").iterdir()
    }


def test_an_uncertain_character_is_drawn_as_a_geta_mark_with_the_best_ones_beside_it_and_may_be_wrong() -> None:
    cut = Cut("a", [0, 0, 8, 8], crop=None, placed=[0, 0, 8, 8])
    top = np.array([[0, 1, 2], [2, 0, 1]])
    probabilities = np.array([[0.4, 0.3, 0.2], [0.4, 0.3, 0.2]], np.float32)
    names = ["U+306F", "U+3042", "rare"]
    columns_of_page = {"a": [[0, 1]]}
    code_points = np.array([ord("の"), ord("の")], np.int32)
    readings = Readings([cut, cut], code_points, np.arange(2), top, probabilities, names, columns_of_page, 0.5)
    _, characters, _, wrong = readings.for_picture("a")
    assert characters == [["〓", "は", "あ"], ["〓", "は", "あ"]]
    assert wrong.tolist() == [True, False]  # the second: の has no class of its own


def test_columns_are_read_from_right_to_left_and_from_top_to_bottom() -> None:
    # Three columns of four that lean to the left, with a narrow character in one and a wide one in another.
    boxes = [[300 - 100 * c - 9 * r, 10 + 60 * r, 50, 50] for c in range(3) for r in range(4)]
    boxes[1][0], boxes[1][2] = boxes[1][0] + 32, 12
    boxes[6][0], boxes[6][2] = boxes[6][0] - 10, 75
    shuffled = np.random.default_rng(3).permutation(12)
    found = columns(np.array(boxes)[shuffled])
    assert [[int(shuffled[i]) for i in column] for column in found] == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9, 10, 11]]


def test_a_narrow_note_beside_a_column_does_not_take_over_the_text_below() -> None:
    boxes = [(100, 0, 60, 70), (100, 80, 60, 70), (150, 155, 26, 30), (104, 200, 76, 70), (100, 280, 60, 70)]
    assert columns(np.array([*boxes, (104, 360, 76, 70)])) == [[2], [0, 1, 3, 4, 5]]


@given(st.lists(st.tuples(*[st.integers(-50, 2000)] * 2, *[st.integers(1, 300)] * 2), max_size=30))
def test_the_reading_order_has_every_box_once(boxes: list[tuple[int, ...]]) -> None:
    found = columns(np.array(boxes, np.int64).reshape(-1, 4))
    assert sorted(i for column in found for i in column) == list(range(len(boxes)))
