"""train --partitions: what a worker holds, trains on and evaluates; the same result for any number of workers."""

import json
import threading
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pandas as pd
import pytest
from conftest import GIVEN, WorkersDo, draw, job_of, work_in_this_process
from hypothesis import given
from hypothesis import strategies as st
from test_start import write

from cluster.errors import OptionError
from cluster.manifest import read_manifest
from cluster.places import place
from job.config import TrainConfig
from job.data import staging
from job.data.order import balanced_order
from job.data.partitions import Partitions, deal
from job.data.staging import staged, staged_shards, unpack
from job.model.pretrained import weights_option
from job.train.batches import fit_to_dataset
from job.train.driver import train
from preprocessing.config import SPLITS, PrepareConfig
from preprocessing.dataset import DatasetManifest, Shard
from preprocessing.prepare import prepare

SIZES = st.lists(st.integers(0, 12), min_size=1, max_size=30)


def shards_of(sizes: list[int]) -> list[Shard]:
    return [Shard(name=f"shard-{number}", bytes=0, sha256="0" * 64, examples=size) for number, size in enumerate(sizes)]


def dealt(sizes: list[int], count: int, each: int, workers: int) -> list[Partitions]:
    """Return the `Partitions` of each worker; all splits have the same shards. each: rows of a partition in a batch."""
    shards = dict.fromkeys(SPLITS, deal(shards_of(sizes), count, seed=1))
    return [Partitions(shards, count * each, 1, rank, workers) for rank in range(workers)]


def rows(part: slice) -> list[int]:
    return list(range(part.start, part.stop))


@given(SIZES, st.integers(1, 6), st.integers(1, 4), st.integers(1, 6))
def test_batches_are_the_same_for_any_number_of_workers_and_draw_equally_from_each_partition(
    sizes: list[int], count: int, each: int, workers: int
) -> None:
    workers = min(workers, count * each)
    (alone,) = dealt(sizes, count, each, 1)
    parts = dealt(sizes, count, each, workers)
    expected = alone.batches(3)
    together = np.concatenate([part.held_rows("train").start + part.batches(3) for part in parts], axis=1)
    assert np.array_equal(together, expected)
    assert len(np.unique(expected)) == expected.size == alone.steps * count * each
    ends = np.cumsum(alone.sizes("train"))
    assert alone.steps == min(alone.sizes("train")) // each
    partition = np.searchsorted(ends, expected.ravel(), side="right").reshape(-1, count, each)
    assert (partition == np.arange(count)[None, :, None]).all()
    assert sorted(alone.held_shards("train"), key=str) == sorted(shards_of(sizes), key=str)


@given(st.lists(st.integers(0, 6), max_size=60), st.integers(0, 3))
def test_balanced_sampling_draws_each_class_and_each_crop_of_a_class_equally_often(
    of_crops: list[int], epoch: int
) -> None:
    labels = np.array(of_crops, np.int64)
    order = balanced_order(labels, seed=1, epoch=epoch)
    assert len(order) == len(labels)
    assert np.array_equal(order, balanced_order(labels, seed=1, epoch=epoch))
    of_classes = [np.bincount(order, minlength=len(labels))[labels == name] for name in set(of_crops)]
    totals = [int(appearances.sum()) for appearances in of_classes]
    assert max(totals, default=0) - min(totals, default=0) <= 1
    assert all(np.ptp(appearances) <= 1 for appearances in of_classes)


def test_balanced_sampling_differs_by_epoch_and_draws_the_classes_of_each_partition_for_any_number_of_workers() -> None:
    sizes, labels = [40, 20, 25, 35], np.repeat([0, 1, 2], [90, 20, 10])
    (alone,) = dealt(sizes, 2, 8, 1)
    assert not np.array_equal(alone.batches(3, labels), alone.batches(4, labels))
    parts = dealt(sizes, 2, 8, 3)
    held = [part.held_rows("train") for part in parts]
    together = [rows.start + part.batches(3, labels[rows]) for part, rows in zip(parts, held, strict=True)]
    expected = alone.batches(3, labels)
    assert np.array_equal(np.concatenate(together, axis=1), expected)
    for partition, first in enumerate((0, 60)):
        drawn = expected[:, 8 * partition : 8 * partition + 8].ravel()
        assert set(drawn) <= set(range(first, first + 60))
        counts = np.bincount(labels[drawn], minlength=3)
        assert np.ptp(counts[counts > 0]) <= 60 - 56 + 1  # seven batches of 8 do not have the last four of 60 rows


@given(SIZES, st.integers(1, 6), st.integers(1, 4), st.integers(1, 6), st.integers(1, 5))
def test_each_crop_is_evaluated_once_by_a_worker_that_staged_it_and_owned_by_one(
    sizes: list[int], count: int, each: int, workers: int, most: int
) -> None:
    workers = min(workers, count * each)
    parts = dealt(sizes, count, each, workers)
    steps = list(parts[0].evaluated("test", most))
    for rank, part in enumerate(parts):
        held = set(rows(part.held_rows("test")))
        assert all(set(rows(step[rank])) <= held and len(rows(step[rank])) <= most for step in steps)
        assert [row for step in part.evaluated("test", most) for row in map(rows, step)] == [
            row for step in steps for row in map(rows, step)
        ]
        assert set(rows(part.own_rows("test"))) <= held
        assert sum(shard.examples for shard in part.held_shards("test")) == len(held)
    assert sorted(row for step in steps for of_worker in step for row in rows(of_worker)) == list(range(sum(sizes)))
    assert [row for part in parts for row in rows(part.own_rows("test"))] == list(range(sum(sizes)))


def test_one_partition_keeps_the_batch_order_of_earlier_releases() -> None:
    sizes = [40, 0, 25, 35]
    for workers in (1, 3):
        parts = dealt(sizes, 1, 16, workers)
        assert parts[0].held_shards("train") == shards_of(sizes)
        order = np.random.default_rng([1, 7]).permutation(100)
        batches = np.concatenate([part.batches(7) for part in parts], axis=1)
        assert np.array_equal(batches, order[:96].reshape(6, 16))


def test_partitions_are_shared_evenly_if_their_number_is_a_multiple_of_the_workers() -> None:
    parts = dealt([99, 100, 101, 100] * 16, 8, 16, 4)
    assert [part.held_by(rank) for rank, part in enumerate(parts)] == [
        range(2 * rank, 2 * rank + 2) for rank in range(4)
    ]
    assert max(abs(size - 800) for size in parts[0].sizes("train")) <= 1
    assert deal(shards_of([100] * 64), 8, seed=2) != deal(shards_of([100] * 64), 8, seed=1)


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"partitions": 3}, "^--partitions must divide --global-batch-size. Received: 3 and 64$"),
        (
            {"partitions": 32},
            "^--partitions must be at most the number of training shards, [0-9]+. Received: 32. Lower it$",
        ),
    ],
)
def test_partitions_that_a_dataset_does_not_allow_are_refused(
    dataset: Path, changes: dict[str, int], says: str
) -> None:
    config = TrainConfig.model_validate(GIVEN | {"global_batch_size": 64} | changes)
    with pytest.raises(OptionError, match=says):
        fit_to_dataset(read_manifest(place(dataset), DatasetManifest), config)


def test_a_too_large_batch_is_lowered_to_fit_the_smallest_partition_and_crops_per_epoch_are_logged(
    dataset: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO", "kuzushiji")
    manifest = read_manifest(place(dataset), DatasetManifest)
    config = TrainConfig.model_validate(GIVEN | {"global_batch_size": 4 * 10**6, "partitions": 4})
    fitted = fit_to_dataset(manifest, config)
    smallest = min(Partitions.of(manifest, 4, 4, config.seed).sizes("train"))
    crops = manifest.counts["train"]["examples"]
    assert fitted.global_batch_size == 4 * smallest
    assert f"is lowered to {4 * smallest}, 4 times the crops of the smallest partition" in caplog.text
    assert f"4 partitions, {4 * smallest} of {crops} training crops in an epoch" in caplog.text


def test_a_slice_of_crops_keeps_its_page_ids(dataset: Path) -> None:
    manifest = read_manifest(place(dataset), DatasetManifest)
    with staged_shards(place(dataset), manifest, {"train": manifest.shards_of("train")}) as data:
        crops = data.splits["train"]
        ids = list(crops.page_ids())
        assert len(ids) == len(crops)
        assert len(set(ids)) > 1
        assert list(crops[5:90][3:].page_ids()) == ids[8:90]
        assert np.array_equal(crops[5:90][3:].boxes, crops.boxes[8:90])


def test_staging_stops_and_cleans_up_when_its_worker_exits_early(
    dataset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A worker whose GPUs TensorFlow does not see ends early."""
    import ray.train

    from job.train.staging_ahead import staging_ahead

    context = {"get_world_rank": lambda: 0, "get_world_size": lambda: 1, "get_node_rank": lambda: 1}
    monkeypatch.setattr(ray.train, "get_context", lambda: SimpleNamespace(**context))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    begun, end, names = threading.Event(), threading.Event(), []

    def unpack_at_the_end(dataset: Any, shard: Any, *rest: Any) -> None:
        names.append(shard.name)
        begun.set()
        assert end.wait(60)
        unpack(dataset, shard, *rest)

    monkeypatch.setattr(staging, "unpack", unpack_at_the_end)
    config = TrainConfig.model_validate(GIVEN)
    with staging_ahead(job_of(config, dataset=str(dataset))):
        assert begun.wait(60)
        threading.Timer(2, end.set).start()  # once the block has ended: leaving it waits for the staging
    assert len(names) == 1
    assert [path.name for path in (tmp_path / "kuzushiji" / "staged").iterdir()] == ["lock"]
    with staging_ahead(job_of(config, dataset=str(dataset))) as staged:
        partitions, data = staged()
        assert {split: len(crops) for split, crops in data.splits.items()} == {
            split: partitions.crops(split) for split in SPLITS
        }


def remembers_what_is_staged(folder: Path) -> Any:
    """Return a change of the workers (see `small_head.work_after`): each writes the names of the shards it stages."""
    folder_text = str(folder)

    def change(_: dict[str, Any]) -> None:
        import ray.train

        from job.train import staging_ahead

        staged_shards = staging_ahead.staged_shards

        def remembering(dataset: Any, manifest: Any, shards: Any, *rest: Any) -> Any:
            names = [shard.name for of_split in shards.values() for shard in of_split]
            Path(folder_text, f"{ray.train.get_context().get_world_rank()}.json").write_text(json.dumps(names))
            return staged_shards(dataset, manifest, shards, *rest)

        staging_ahead.staged_shards = remembering

    return change


def test_two_workers_with_one_partition_each_train_like_one_with_both_and_leave_out_the_same_classes(
    ray_here: None,
    tmp_path: Path,
    workers_do: WorkersDo,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """They start from a model, so classes of which neither has a training crop stay out of the loss of both."""
    draw(tmp_path / "pages", num_pages=2, seed=42)
    source = place(tmp_path / "pages" / "train_images"), place(tmp_path / "pages" / "train.csv")
    dataset = tmp_path / "crops"
    many_classes = PrepareConfig(coverage=0.9, val_fraction=0.35, test_fraction=0.35)
    assert len(prepare(*source, place(dataset), many_classes)[0].shards_of("train")) == 2
    with staged(place(dataset), ["train"]) as data:
        classes, labels = list(data.class_names), data.splits["train"].labels
        left_out = len(classes) - len(np.unique(labels))
    assert left_out > 1
    assert len(np.unique(labels)) > len(np.unique(labels[: len(labels) // 2]))  # one worker's crops do not tell
    options = {"partitions": 2, "global_batch_size": 16, "epochs": 2, "sampling": "balanced"}
    caplog.set_level("INFO", "kuzushiji")
    monkeypatch.setattr("job.model.architectures.BASELINE_HEAD", (16, 8))  # as in the workers
    write(tmp_path / "baseline" / "first", "baseline", classes=classes)
    weights = weights_option(str(tmp_path / "baseline" / "first"))
    assert weights
    folders = []
    for workers in (1, 2):
        models = tmp_path / str(workers)
        models.mkdir()
        config = TrainConfig.model_validate(GIVEN | options | {"workers": workers, "weights": weights.identity})
        with pytest.MonkeyPatch.context() as patch:
            if workers == 1:
                work_in_this_process(patch)
            else:
                workers_do(remembers_what_is_staged(models))
            (outcome,) = train(place(dataset), place(models), [config], "parts", weights=weights)
        folders.append(Path(outcome.folder.path))
        assert f"left out of the loss: {left_out} of the classes that keep their weights" in caplog.text
        caplog.clear()
    manifest = DatasetManifest.model_validate_json((dataset / "manifest.json").read_bytes())
    of_workers = [json.loads((tmp_path / "2" / f"{rank}.json").read_text()) for rank in range(2)]
    assert sorted(of_workers[0] + of_workers[1]) == sorted(shard.name for shard in manifest.shards)
    one, two = (
        [json.loads(line) for line in (folder / "history.jsonl").read_text().splitlines()] for folder in folders
    )
    assert [row["loss"] for row in two] == pytest.approx([row["loss"] for row in one], abs=2e-2)
    one, two = (json.loads((folder / "metrics.json").read_text()) for folder in folders)
    for split in SPLITS:
        assert two[split]["examples"] == one[split]["examples"] == manifest.counts[split]["examples"]
        assert two[split]["loss"] == pytest.approx(one[split]["loss"], abs=5e-2)
    tables = [pd.read_csv(folder / "misclassified.csv") for folder in folders]
    for table, numbers in zip(tables, (one, two), strict=True):
        wrong = round((1 - numbers["test"]["accuracy"]) * numbers["test"]["examples"])
        assert len(table) == len(table.drop_duplicates(["image_id", "x", "y", "width", "height"])) == wrong
        assert (table["label"] != table["predicted"]).all()
