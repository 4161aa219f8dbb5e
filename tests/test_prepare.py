"""prepare: boxes = crops + listed losses; always the same bytes; an unfinished folder is not taken for a dataset."""

import hashlib
import io
import json
import shutil
import zipfile
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tensorflow as tf
from PIL import Image

from cluster.errors import DamageError, InputError, OptionError
from cluster.manifest import read_manifest
from cluster.places import place
from cluster.storage import write_bytes
from job.verify import verify
from preprocessing.config import PrepareConfig
from preprocessing.crop import MAX_PAGE_BYTES
from preprocessing.dataset import DatasetManifest
from preprocessing.group_files import write_groups
from preprocessing.labels.read import read_labels
from preprocessing.plan import make_plan
from preprocessing.prepare import prepare
from preprocessing.shards import CutGroup, GroupReport, resumable

pytestmark = pytest.mark.usefixtures("ray_here")

EVERY_LOSS = PrepareConfig(max_bad_fraction=1)


def page(width: int = 100, height: int = 200, seed: int = 0) -> bytes:
    out = io.BytesIO()
    Image.fromarray(np.random.default_rng(seed).integers(0, 255, (height, width), np.uint8)).save(out, "JPEG")
    return out.getvalue()


def write_pages(folder: Path, files: dict[str, bytes], rows: dict[str, str]) -> None:
    (folder / "train_images").mkdir(parents=True)
    for name, data in files.items():
        (folder / "train_images" / name).write_bytes(data)
    text = "".join(f"{page_id},{cell}\n" for page_id, cell in rows.items())
    (folder / "train.csv").write_text("image_id,labels\n" + text)


def run(
    source: Path, dataset: Path, config: PrepareConfig = EVERY_LOSS, pages: str = "train_images"
) -> DatasetManifest:
    return prepare(place(source / pages), place(source / "train.csv"), place(dataset), config)[0]


def boxes(count: int, character: str = "U+306F") -> str:
    return " ".join(f"{character} {5 * i} {7 * i} {20 + i} {30 + i}" for i in range(count))


def records(dataset: Path) -> list[dict[str, Any]]:
    """Read all records of a dataset folder with TensorFlow."""
    found = []
    for path in sorted(dataset.glob("*.tfrecord-*")):
        for record in tf.data.TFRecordDataset(str(path)).as_numpy_iterator():
            feature = tf.train.Example.FromString(record).features.feature
            found.append(
                {
                    "image": feature["image"].bytes_list.value[0],
                    "label": feature["label"].int64_list.value[0],
                    "unicode": feature["unicode"].bytes_list.value[0].decode(),
                    "image_id": feature["image_id"].bytes_list.value[0].decode(),
                    "box": tuple(feature["box"].int64_list.value),
                }
            )
    return found


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def test_the_three_real_pages_give_219_crops(real_dataset: Path, shared: Path) -> None:
    manifest = read_manifest(place(real_dataset), DatasetManifest)
    assert sum(shard.examples for shard in manifest.shards) == 219
    assert {split: counts["examples"] for split, counts in manifest.counts.items()} == {
        "train": 155,
        "validation": 32,
        "test": 32,
    }
    labels = read_labels(place(shared / "train.csv"))
    assert Counter(r["box"] for r in records(real_dataset)) == Counter(tuple(b) for b in labels.boxes.tolist())


def test_tfds_reads_the_folder_as_it_is(dataset: Path) -> None:
    import tensorflow_datasets as tfds

    builder = tfds.builder_from_directory(str(dataset))
    manifest = read_manifest(place(dataset), DatasetManifest)
    names = (dataset / "label.labels.txt").read_text().splitlines()
    assert builder.info.features["label"].names == names
    ours = {(r["image_id"], r["box"]): r for r in records(dataset)}
    for split, counts in manifest.counts.items():
        assert builder.info.splits[split].num_examples == counts["examples"]
        examples = list(tfds.as_numpy(builder.as_dataset(split=split)))
        assert len(examples) == counts["examples"]
        for example in examples:
            record = ours[(example["image_id"].decode(), tuple(example["box"].tolist()))]
            assert example["image"].shape == (80, 80, 1)
            assert example["image"].tobytes() == record["image"]
            assert example["label"] == record["label"]


def test_records_hold_label_code_point_page_and_box(dataset: Path, pages: Path) -> None:
    names = (dataset / "label.labels.txt").read_text().splitlines()
    labels = read_labels(place(pages / "train.csv"))
    found = records(dataset)
    assert len(found) == len(labels.boxes)
    for record in found:
        assert len(record["image"]) == 6400
        name = names[record["label"]]
        assert name == (record["unicode"] if record["unicode"] in names else "rare")
    assert {name for record in found if (name := names[record["label"]]) == "rare"} == {"rare"}
    assert Counter(r["image_id"] for r in found) == Counter(
        dict(zip(labels.page_ids, labels.boxes_per_page.tolist(), strict=True))
    )


def test_every_fault_of_a_page_or_box_is_a_listed_loss_and_moves_no_other_crop(tmp_path: Path) -> None:
    rows = {f"good_{i}": boxes(10) for i in range(4)}
    rows |= {"boxes_1": "U+306F 1 1 0 9 U+306F 1 1 9 -9 U+306F 500 1 9 9 U+306F -5 -5 20 20 U+306F 1 1 30 30"}
    rows |= {
        "cut_1": boxes(2),
        "gif_1": boxes(3),
        "none_1": boxes(1),
        "bomb_1": boxes(1),
        "empty_1": "",
        "nan_1": "nan",
    }
    files = {f"good_{i}.jpg": page(seed=i) for i in range(4)} | {"boxes_1.jpg": page(), "unknown_1.jpg": page()}
    gif, bomb = io.BytesIO(), bytearray(page())
    Image.new("L", (100, 200)).save(gif, "GIF")
    at = bomb.index(b"\xff\xc0")
    bomb[at + 5 : at + 9] = (30_000).to_bytes(2, "big") * 2
    files |= {"cut_1.jpg": page()[:-500], "gif_1.jpg": gif.getvalue(), "bomb_1.jpg": bytes(bomb), "notes.txt": b"hello"}
    write_pages(tmp_path, files, rows)
    manifest = run(tmp_path, tmp_path / "out")
    whats = Counter((loss["page"], loss["what"].split(":")[0]) for loss in manifest.losses)
    assert whats == {
        ("boxes_1", "box of no area"): 2,
        ("boxes_1", "box is off its page of 100 x 200 pixels"): 1,
        ("cut_1", "page can't be decoded"): 2,
        ("gif_1", "page is not a JPEG, PNG, TIFF, JPEG 2000, WebP or BMP file"): 3,
        ("none_1", "page has no file"): 1,
        ("bomb_1", "page of 30000 x 30000 pixels is over 250000000 pixels"): 1,
    }
    assert manifest.clipped == [{"page": "boxes_1", "box": [-5, -5, 20, 20]}]
    assert manifest.unlabelled == ["unknown_1"]
    found = records(tmp_path / "out")
    total = len(read_labels(place(tmp_path / "train.csv")).boxes)
    assert len(found) + len(manifest.losses) == total
    assert (-5, -5, 20, 20) in {r["box"] for r in found}
    # The same labels with intact pages give the same crops and more: same splits, same bytes.
    whole = tmp_path / "whole"
    write_pages(
        whole, {f"{page_id}.jpg": page() for page_id in rows} | {f: d for f, d in files.items() if "good" in f}, rows
    )
    run(whole, whole / "out")

    def crops_by_split(folder: Path) -> set[Any]:
        return {
            (path.name.split(".")[0], r)
            for path in folder.glob("*.tfrecord*")
            for r in tf.data.TFRecordDataset(str(path)).as_numpy_iterator()
        }

    assert crops_by_split(tmp_path / "out") < crops_by_split(whole / "out")


def test_too_many_losses_fail_without_a_manifest_and_may_be_allowed_later(tmp_path: Path) -> None:
    rows = {f"a_{i}": boxes(10) for i in range(3)}
    write_pages(tmp_path, {"a_0.jpg": page(), "a_1.jpg": page(), "a_2.jpg": b"GIF"}, rows)
    with pytest.raises(InputError, match="Received: 10 of 30, first page a_2: page is not a JPEG, PNG"):
        run(tmp_path, tmp_path / "out", PrepareConfig())
    assert not (tmp_path / "out" / "manifest.json").exists()
    assert len(run(tmp_path, tmp_path / "out", PrepareConfig(max_bad_fraction=0.4)).losses) == 10
    assert not (tmp_path / "out" / ".prepare").exists()
    with pytest.raises(InputError, match="Received: 10 of 30"):
        run(tmp_path, tmp_path / "out", PrepareConfig())


def test_a_split_whose_boxes_are_all_lost_is_refused_though_few_of_all_boxes_are(tmp_path: Path) -> None:
    rows = {f"a_{i}": boxes(70) for i in range(10)} | {"b_0": boxes(1), "c_0": boxes(1)}
    rows["a_0"] += " U+306F 1 1 0 9"
    whole = {f"{page_id}.jpg": page(400, 600) for page_id in rows}
    config = PrepareConfig(split="book", val_fraction=0.001, test_fraction=0.001)
    write_pages(tmp_path, whole | {"b_0.jpg": b"GIF", "c_0.jpg": b"GIF"}, rows)
    with pytest.raises(InputError, match=r"Received: validation, whose boxes are all lost, first page [bc]_0: "):
        run(tmp_path, tmp_path / "out", config)
    assert not (tmp_path / "out" / "manifest.json").exists()
    (tmp_path / "train_images" / "b_0.jpg").write_bytes(page(400, 600))
    (tmp_path / "train_images" / "c_0.jpg").write_bytes(page(400, 600))
    assert run(tmp_path, tmp_path / "new", config).counts["test"]["examples"] == 1


def test_as_many_losses_as_are_allowed_are_no_error(tmp_path: Path) -> None:
    """In floating-point numbers, 0.29 x 100 is less than 29."""
    write_pages(tmp_path, {"a_0.jpg": page(400, 600)}, {"a_0": boxes(71) + " U+306F 1 1 0 9" * 29, "a_1": ""})
    assert len(run(tmp_path, tmp_path / "out", PrepareConfig(max_bad_fraction=0.29)).losses) == 29


def test_a_report_with_a_damaged_file_name_counts_as_missing(tmp_path: Path) -> None:
    folder = resumable(place(tmp_path / "out"))
    folder.progress_folder.mkdir(parents=True)
    for kept in (tmp_path / "kept", tmp_path / "out" / "kept"):
        kept.write_bytes(b"kept")
    for name, is_whole in (("kept", True), ("../kept", False)):
        shard = {"name": name, "bytes": 4, "sha256": hashlib.sha256(b"kept").hexdigest(), "examples": 1}
        report = {"losses": [], "shards": {"train": shard}, "clipped": [], "pages": []}
        folder.report_path(0).write_text(json.dumps(report))
        assert (folder.finished_report(0, GroupReport) is not None) == is_whole


def test_losses_that_labels_and_names_of_pages_show_are_refused_before_a_page_is_read(tmp_path: Path) -> None:
    rows = {"a_0": boxes(9) + " U+306F 1 1 0 9", "a_1": "", "a_2": boxes(10), "a_3": boxes(16)}
    write_pages(tmp_path, {"a_0.jpg": page(), "a_3.jpg": page()}, rows)
    config = PrepareConfig(max_bad_fraction=0.30)
    with pytest.raises(InputError, match="Received: 11 of 36, first page a_0: box of no area"):
        run(tmp_path, tmp_path / "out", config)
    assert list((tmp_path / "out").iterdir()) == [tmp_path / "out" / ".prepare"]
    losses = make_plan(place(tmp_path / "train_images"), place(tmp_path / "train.csv"), config).losses
    assert losses == run(tmp_path, tmp_path / "out").losses


@pytest.mark.parametrize("what", ["losses", "unlabelled", "shards"])
def test_a_manifest_that_will_be_too_large_is_refused_before_a_page_is_read(
    what: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with_file = {"losses": 1, "unlabelled": 100, "shards": 20}[what]
    labelled = {"losses": 9, "unlabelled": 1, "shards": 20}[what]
    files = {f"a_{i:03}.jpg": page() for i in range(with_file)}
    write_pages(tmp_path, files, {f"a_{i:03}": boxes(10) for i in range(labelled)})
    monkeypatch.setattr("cluster.manifest.MAX_MANIFEST_VALUES", 150)
    with pytest.raises(InputError, match=rf"and 150 values. Received: .*, the longest list: \d+ {what}. Fix the input"):
        run(tmp_path, tmp_path / "out", PrepareConfig(max_bad_fraction=1, shards=20))
    assert list((tmp_path / "out").iterdir()) == [tmp_path / "out" / ".prepare"]


def test_a_shard_whose_crops_are_all_lost_is_valid_and_empty(tmp_path: Path) -> None:
    write_pages(tmp_path, {"a_0.jpg": page()}, {"a_0": boxes(30), "b_0": boxes(30)})
    manifest = run(tmp_path, tmp_path / "out", PrepareConfig(max_bad_fraction=1, split="random", shards=2))
    assert [shard.examples for shard in manifest.shards if shard.bytes == 0] == [0, 0, 0]
    assert verify(place(tmp_path / "out"))[1:] == ([], [])
    info = json.loads((tmp_path / "out" / "dataset_info.json").read_text())
    lengths = [length for split in info["splits"] for length in split["shardLengths"]]
    assert lengths.count("0") == 3


def test_the_same_input_gives_the_same_bytes_from_a_folder_or_a_zip(dataset: Path, pages: Path, tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "train_images.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        for path in sorted((pages / "train_images").iterdir()):
            archive.write(path, f"train_images/{path.name}")
    shutil.copy(pages / "train.csv", tmp_path / "train.csv")
    run(tmp_path, tmp_path / "out", PrepareConfig(coverage=0.5), pages="train_images.zip")
    assert contents(tmp_path / "out") == contents(dataset)


def test_one_process_that_cuts_all_groups_from_the_last_to_the_first_writes_the_same_bytes(
    dataset: Path, pages: Path, tmp_path: Path
) -> None:
    plan = make_plan(place(pages / "train_images"), [place(pages / "train.csv")], PrepareConfig(coverage=0.5))
    (tmp_path / ".prepare").mkdir()
    (tmp_path / ".prepare" / "plan.json").write_text("{}")
    write_groups(plan.groups, place(tmp_path / ".prepare"), "alone")
    cut = CutGroup(str(pages / "train_images"), str(tmp_path), "alone")
    for number in reversed(range(len(plan.groups))):
        cut(number)
    shards = read_manifest(place(dataset), DatasetManifest).shards
    assert sorted(path.name for path in tmp_path.glob("*.tfrecord-*")) == sorted(shard.name for shard in shards)
    for shard in shards:
        assert (tmp_path / shard.name).read_bytes() == (dataset / shard.name).read_bytes()


def test_a_second_run_writes_nothing(dataset: Path, pages: Path) -> None:
    before = {path.name: path.stat().st_mtime_ns for path in dataset.iterdir()}
    source = (place(pages / "train_images"), place(pages / "train.csv"))
    assert prepare(*source, place(dataset), PrepareConfig(coverage=0.5))[1] is False
    assert {path.name: path.stat().st_mtime_ns for path in dataset.iterdir()} == before


def _flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def _cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


@pytest.mark.parametrize("damage", [_flip, _cut, Path.unlink], ids=["flipped byte", "cut off", "deleted"])
def test_a_damaged_shard_alone_is_made_again(
    damage: Callable[[Path], None], dataset: Path, pages: Path, tmp_path: Path
) -> None:
    copy = tmp_path / "out"
    shutil.copytree(dataset, copy)
    shard = sorted(copy.glob("*train.tfrecord*"))[1]
    damage(shard)
    names = {path.name for path in copy.glob("*.tfrecord*")} - {shard.name}
    before = {name: (copy / name).stat().st_ino for name in names if f"-{shard.name[-14:-9]}-" not in name}
    assert verify(place(copy))[1] != []
    source = (place(pages / "train_images"), place(pages / "train.csv"))
    assert prepare(*source, place(copy), PrepareConfig(coverage=0.5))[1] is True
    assert contents(copy) == contents(dataset)
    assert {name: (copy / name).stat().st_ino for name in before} == before


def test_a_damaged_dataset_whose_manifest_lists_other_pages_is_made_again(
    dataset: Path, pages: Path, tmp_path: Path
) -> None:
    copy = tmp_path / "out"
    shutil.copytree(dataset, copy)
    sorted(copy.glob("*train.tfrecord*"))[1].unlink()
    manifest = json.loads((copy / "manifest.json").read_text())
    manifest["clipped"].append({"page": "nobody", "box": [0, 0, 1, 1]})
    (copy / "manifest.json").write_text(json.dumps(manifest))
    source = (place(pages / "train_images"), place(pages / "train.csv"))
    assert prepare(*source, place(copy), PrepareConfig(coverage=0.5))[1] is True
    assert contents(copy) == contents(dataset)


def test_an_interrupted_run_is_finished_without_making_again_what_is_done(
    dataset: Path, pages: Path, tmp_path: Path
) -> None:
    source = (place(pages / "train_images"), place(pages / "train.csv"))
    config = PrepareConfig(coverage=0.5)
    out = tmp_path / "out"
    broken = tmp_path / "broken"
    shutil.copytree(pages, broken)
    for path in sorted((broken / "train_images").iterdir())[6:]:  # an attempt that can read only half of the pages
        path.write_bytes(b"\xff\xd8" + bytes(path.stat().st_size - 2))
    with pytest.raises(InputError, match="boxes may be lost"):
        prepare(place(broken / "train_images"), place(broken / "train.csv"), place(out), config)
    done = [json.loads(path.read_text()) for path in (out / ".prepare").glob("group-*.json")]
    assert not any(report["losses"] for report in done)  # a group with losses has no report: it is cut again
    (out / ".tmp-0123").write_bytes(b"left by a killed task")
    kept = [shard["name"] for report in done[1:] for shard in report["shards"].values()]
    (torn,) = [path for path in (out / ".prepare").glob("group-*.json") if json.loads(path.read_text()) == done[0]]
    torn.write_bytes(torn.read_bytes()[:-9])  # its group is cut again
    again = [shard["name"] for shard in done[0]["shards"].values()]
    assert again
    before = {name: (out / name).stat().st_ino for name in kept}
    assert kept
    plan = out / ".prepare" / "plan.json"
    for damaged in ("[]", "{"):
        intact = plan.read_bytes()
        plan.write_text(damaged)
        with pytest.raises(DamageError, match="plan.json must be a JSON object"):
            prepare(*source, place(out), config)
        plan.write_bytes(intact)
    prepare(*source, place(out), config)
    assert contents(out) == contents(dataset)
    assert {name: (out / name).stat().st_ino for name in kept} == before


def test_a_folder_of_another_job_is_refused_with_what_differs(dataset: Path, pages: Path, tmp_path: Path) -> None:
    with pytest.raises(OptionError, match=r"coverage .was 0.5, now 0.9."):
        run(pages, dataset, PrepareConfig())
    with pytest.raises(OptionError, match="seed"):
        run(pages, dataset, PrepareConfig(coverage=0.5, seed=1))
    other = tmp_path / "other"
    shutil.copytree(pages, other)
    next((other / "train_images").iterdir()).unlink()
    with pytest.raises(OptionError, match="differ: input"):
        run(other, dataset, PrepareConfig(coverage=0.5))
    longer = tmp_path / "longer"
    shutil.copytree(pages, longer)
    with next((longer / "train_images").iterdir()).open("ab") as scan:
        scan.write(b"\0")
    with pytest.raises(OptionError, match="differ: input"):
        run(longer, dataset, PrepareConfig(coverage=0.5))
    for mine in ("mine/thesis.txt", "my/photos/cat.jpg"):
        file = tmp_path / mine
        file.parent.mkdir(parents=True)
        file.write_text("mine")
        with pytest.raises(OptionError, match="new or empty folder.*, with (thesis.txt|photos). Name"):
            run(pages, tmp_path / mine.partition("/")[0], PrepareConfig(coverage=0.5))


def test_a_dataset_of_another_version_of_a_library_is_accepted_whole_and_not_mended(
    dataset: Path, pages: Path, tmp_path: Path
) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(dataset, copy)
    manifest = json.loads((copy / "manifest.json").read_text())
    manifest["versions"]["numpy"] = "0"
    (copy / "manifest.json").write_text(json.dumps(manifest))
    before = contents(copy)
    run(pages, copy, PrepareConfig(coverage=0.5))
    assert contents(copy) == before
    min(copy.glob("*.tfrecord*")).unlink()
    with pytest.raises(OptionError, match=r"differ: version of numpy .was 0, now"):
        run(pages, copy, PrepareConfig(coverage=0.5))


def test_the_classes_of_an_earlier_dataset_are_used_in_their_order(pages: Path, tmp_path: Path) -> None:
    names = ["U+3044", "U+306B", "U+0041", "rare"]
    run(pages, tmp_path / "out", PrepareConfig(classes=names))
    assert (tmp_path / "out" / "label.labels.txt").read_text() == "U+3044\nU+306B\nU+0041\nrare\n"
    for record in records(tmp_path / "out"):
        assert names[record["label"]] == (record["unicode"] if record["unicode"] in names else "rare")


def test_shards_are_cut_at_nearly_equal_box_counts_and_counted_per_split(pages: Path, tmp_path: Path) -> None:
    manifest = run(pages, tmp_path / "out", PrepareConfig(coverage=0.5, shards=4))
    for split in ("train", "validation", "test"):
        shards = manifest.shards_of(split)
        assert [s.name for s in shards] == [f"kuzushiji-{split}.tfrecord-{i:05d}-of-00004" for i in range(4)]
    per_group = [sum(manifest.shards_of(split)[i].examples for split in manifest.counts) for i in range(4)]
    assert max(per_group) - min(per_group) <= 2 * int(read_labels(place(pages / "train.csv")).boxes_per_page.max())


def test_split_by_book_keeps_each_book_in_one_split(pages: Path, tmp_path: Path) -> None:
    manifest = run(pages, tmp_path / "out", PrepareConfig(split="book", coverage=0.5))
    books: dict[str, set[str]] = {}
    for path in (tmp_path / "out").glob("*.tfrecord*"):
        for record in tf.data.TFRecordDataset(str(path)).as_numpy_iterator():
            page_id = tf.train.Example.FromString(record).features.feature["image_id"].bytes_list.value[0].decode()
            books.setdefault(page_id.replace("-", "_").split("_")[0], set()).add(path.name.split(".")[0])
    assert all(len(sides) == 1 for sides in books.values())
    assert sum(counts["books"] for counts in manifest.counts.values()) == len(books)


def test_links_to_pages_are_pages(dataset: Path, pages: Path, tmp_path: Path) -> None:
    shutil.copy(pages / "train.csv", tmp_path / "train.csv")
    (tmp_path / "links").mkdir()
    for path in (pages / "train_images").iterdir():
        (tmp_path / "links" / path.name).symlink_to(path)
    run(tmp_path, tmp_path / "out", PrepareConfig(coverage=0.5), pages="links")
    assert contents(tmp_path / "out") == contents(dataset)


def test_a_manifest_that_lost_shards_is_damage(dataset: Path, pages: Path, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(dataset, copy)
    manifest = json.loads((copy / "manifest.json").read_text())
    (copy / "manifest.json").write_text(json.dumps(manifest | {"shards": manifest["shards"][:3]}))
    with pytest.raises(DamageError, match="must list the planned shards"):
        run(pages, copy, PrepareConfig(coverage=0.5))


@pytest.mark.parametrize("bad", ["no folder", "empty folder", "no zip", "a folder named as a zip", "twice in a zip"])
def test_invalid_pages_are_refused_before_any_work(bad: str, pages: Path, tmp_path: Path) -> None:
    shutil.copy(pages / "train.csv", tmp_path / "train.csv")
    name = "x.zip" if "zip" in bad else "x"
    if bad in ("empty folder", "a folder named as a zip"):
        (tmp_path / name).mkdir()
    elif bad == "no zip":
        (tmp_path / name).write_bytes(b"PK no zip")
    elif bad == "twice in a zip":
        with zipfile.ZipFile(tmp_path / name, "w") as archive:
            archive.writestr("a/p.jpg", b"")
            archive.writestr("a/p.png", b"")
    with pytest.raises(InputError, match="--pages must be|must hold one file per page"):
        run(tmp_path, tmp_path / "out", pages=name)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("method", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA])
def test_a_page_that_is_broken_in_the_archive_is_a_loss(method: int, tmp_path: Path) -> None:
    rows = {f"a_{i}": boxes(10) for i in range(4)}
    write_pages(tmp_path, {}, rows)
    archive = tmp_path / "pages.zip"
    with zipfile.ZipFile(archive, "w", method) as out:
        for i in range(4):
            out.writestr(f"a_{i}.jpg", page(seed=i))
    data = bytearray(archive.read_bytes())
    at = data.index(b"a_1.jpg") + 60
    data[at : at + 100] = bytes(100)
    archive.write_bytes(data)
    manifest = run(tmp_path, tmp_path / "out", pages="pages.zip")
    assert {loss["page"] for loss in manifest.losses} == {"a_1"}
    assert "page can't be read from the archive" in manifest.losses[0]["what"]


@pytest.mark.parametrize("change", ["gone", "longer", "over the bound"])
@pytest.mark.parametrize("source", ["train_images", "pages.zip"])
def test_a_page_that_changes_during_prepare_is_an_error_not_a_loss(source: str, change: str, tmp_path: Path) -> None:
    """The same happens if `--pages` names another folder on another host."""
    write_pages(tmp_path, {"a_1.jpg": page()}, {"a_1": boxes(10)})
    files = tmp_path / "train_images"
    shutil.make_archive(str(tmp_path / "pages"), "zip", files)
    places = place(tmp_path / source), place(tmp_path / "train.csv")
    write_bytes(place(tmp_path / "out" / ".prepare" / "plan.json"), b"{}")
    cut = CutGroup(str(places[0]), str(tmp_path / "out"))
    write_groups(make_plan(*places, PrepareConfig()).groups, place(tmp_path / "out" / ".prepare"), cut.attempt)
    if change == "gone":
        (files / "a_1.jpg").rename(files / "a_2.jpg")
    else:
        (files / "a_1.jpg").write_bytes(page(150) if change == "longer" else bytes(MAX_PAGE_BYTES + 2))
    shutil.make_archive(str(tmp_path / "pages"), "zip", files)
    with pytest.raises(InputError, match=r"--pages must stay unchanged .* Received: [^\n]*a_1\.jpg"):
        cut(0)
    assert not list(tmp_path.glob("out/*.tfrecord-*"))
