"""train: the same losses for any number of workers; a model folder that anyone can use and verify."""

import json
import random
import re
import shutil
from dataclasses import asdict
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pandas as pd
import pytest
from conftest import GIVEN, in_fresh_process, job_of, save_test_crops
from equal_workers import A_FEW, EQUAL_BATCH, MORE, measured, one_batch
from tensorboardX.proto.event_pb2 import Event

from cluster.errors import DamageError, InputError, KuzushijiError, OptionError
from cluster.manifest import read_manifest
from cluster.models import ModelManifest
from cluster.places import place
from job.config import MAY_DIFFER, TrainConfig, configs_of
from job.train.driver import train
from job.train.job import Failure
from job.verify import verify
from preprocessing.config import PrepareConfig
from preprocessing.prepare import prepare
from preprocessing.records import read_frames

pytestmark = pytest.mark.usefixtures("ray_here")

MODEL_FILES = {
    "README.md", "config.json", "history.jsonl", "labels.txt", "manifest.json", "metrics.json", "misclassified.csv",
    "model.keras", "per_class.csv",
}  # fmt: skip
EPOCH_KEYS = {
    "epoch", "step", "loss", "accuracy", "val_loss", "val_accuracy", "learning_rate", "seconds", "crops_per_s",
    "data_wait",
}  # fmt: skip
SPLIT_KEYS = {
    "accuracy", "accuracy_without_rare", "top5", "macro_f1", "loss", "ece", "at_99", "errors_by_share", "examples",
}  # fmt: skip


def config(**changes: Any) -> TrainConfig:
    few = {"architecture": "baseline", "epochs": 2, "global_batch_size": 64, "learning_rate": 1e-4}
    return TrainConfig.model_validate(few | changes)


def losses_of(
    workers: int, steps: dict[str, int], dataset: Path, out: Path, **changes: Any
) -> list[dict[str, np.ndarray]]:
    """Return what each rank measured (`equal_workers.py`). A single worker is this process (Ray Train's local mode)."""
    from ray.train import RunConfig, ScalingConfig
    from ray.train.v2.api.data_parallel_trainer import DataParallelTrainer

    from job.train.rendezvous import Rendezvous

    given = config(**{"workers": workers, "global_batch_size": EQUAL_BATCH, "weight_decay": 0.01} | changes)
    one = job_of(given, dataset=str(dataset))
    measure = one_batch(one, out / "equal", steps)

    def work(_: Any) -> None:
        from job.train.strategy import configure_tensorflow, make_strategy

        if workers > 1:  # a single worker is the process of the tests, which has used TensorFlow
            configure_tensorflow(one.config)
        measure(make_strategy(workers))

    DataParallelTrainer(
        work,
        backend_config=Rendezvous(),
        train_loop_config={},
        scaling_config=ScalingConfig(num_workers=workers if workers > 1 else 0, resources_per_worker={"CPU": 0.5}),
        run_config=RunConfig(name=f"losses-{workers}", storage_path=str(out)),
    ).fit()
    return measured(out / "equal", workers)


def check_equal(ranks: list[dict[str, np.ndarray]], alone: dict[str, np.ndarray]) -> None:
    for kind in alone.keys() - {"statistics"}:
        assert np.abs(ranks[0][kind] - alone[kind]).max() < 1e-3
        if kind != "augmented":  # each step has other copies of the crops
            assert alone[kind][-1] < alone[kind][0] - 1
    assert abs(alone["augmented"][0] - alone["with dropout"][0]) > 1e-2
    np.testing.assert_allclose(ranks[0]["statistics"], alone["statistics"], rtol=2e-2)
    # The statistics are the same on every rank, so it does not matter which rank saves them.
    for rank in ranks:
        assert np.array_equal(rank["statistics"], ranks[0]["statistics"])


def test_two_workers_give_the_losses_of_one(two_workers: Path, dataset: Path, tmp_path: Path) -> None:
    check_equal(measured(two_workers / "equal", 2), losses_of(1, A_FEW, dataset, tmp_path)[0])


@pytest.mark.long
@pytest.mark.parametrize(
    ("numbers", "changes"),
    [((2, 3, 4), {}), ((2, 3, 4), {"partitions": 4, "global_batch_size": 20})],
    ids=["whole", "of four partitions"],
)
def test_any_number_of_workers_gives_the_same_losses(
    numbers: tuple[int, ...], changes: dict[str, int], dataset: Path, tmp_path: Path
) -> None:
    alone = losses_of(1, MORE, dataset, tmp_path / "1", **changes)[0]
    assert alone["without"][-1] < 0.2 < 2 < alone["without"][0]
    for workers in numbers:
        check_equal(losses_of(workers, MORE, dataset, tmp_path / str(workers), **changes), alone)


def test_damage_found_by_one_worker_is_reported_to_all(two_workers: Path) -> None:
    assert [(two_workers / "equal" / f"received-{rank}").read_text() for rank in range(2)] == [
        "a shard was changed"
    ] * 2


LOGICAL_DEVICES = """
import sys, json
import keras, numpy as np, tensorflow as tf
tf.config.threading.set_intra_op_parallelism_threads(1)
cpu = tf.config.list_physical_devices("CPU")[0]
tf.config.set_logical_device_configuration(cpu, [tf.config.LogicalDeviceConfiguration()] * 2)
from job.model import architectures
from job.train.optimizer import FusedAdam
from job.train.step import Steps, training_form
from job.train.strategy import make_strategy
architectures.BASELINE_HEAD = (500, 100)
rng = np.random.default_rng(0)
images, labels = rng.integers(0, 255, (21, 80, 80, 1), dtype=np.uint8), rng.integers(0, 20, 21)
found = []
for devices, strategy in ((1, tf.distribute.get_strategy()), (2, make_strategy(1))):
    assert strategy.num_replicas_in_sync == devices
    losses = []
    for kind, count in json.loads(sys.argv[1]).items():
        keras.utils.set_random_seed(1)
        plain = architectures.baseline(20)
        with strategy.scope():
            model = training_form(plain, 42, kind != "without")
            optimizer = FusedAdam(1e-4)
            optimizer.build(model.trainable_variables)
        steps = Steps(strategy, 1, model, optimizer, 21, augment_seed=42 if kind == "augmented" else None)
        losses += [float(steps.train(images, labels, 0)[0]) / 21 for _ in range(count)]
    steps.estimate_statistics([images])
    found.append([losses, steps.predict(images, labels)[:, 1].tolist()])
print(json.dumps(found))
"""


@pytest.mark.long
def test_two_devices_of_one_worker_give_the_losses_of_one(tmp_path: Path) -> None:
    one, two = json.loads(in_fresh_process(LOGICAL_DEVICES, json.dumps(MORE), cwd=tmp_path))
    assert np.abs(np.array(one[0]) - two[0]).max() < 1e-3
    assert np.abs(np.array(one[1]) - two[1]).max() < 1e-2


@pytest.mark.parametrize("shape", [(512,), (13,), (3, 5, 2)])
def test_a_worker_draws_only_its_rows_and_they_match_the_whole_batch(shape: tuple[int, ...]) -> None:
    import tensorflow as tf

    from job.data.chance import BatchRows

    step = tf.constant(3, tf.int64)
    whole = BatchRows(step, 0, 8).uniform(42, shape).numpy()
    assert whole.shape == (8, *shape)
    assert 0 <= whole.min() < 0.1
    assert 0.9 < whole.max() < 1
    assert len({row.tobytes() for row in whole}) == 8
    draw = tf.function(lambda first, count: BatchRows(step, first, 8).own_uniform(42, shape, count))
    for first, end in ((0, 8), (0, 3), (3, 8), (7, 8)):
        assert np.array_equal(draw(tf.constant(first), tf.constant(end - first)), whole[first:end])


def test_a_dropout_of_the_usual_width_draws_what_tensorflow_draws_for_the_seed_and_the_step() -> None:
    """A run of an earlier release then resumes with the same masks."""
    import tensorflow as tf

    from job.data.chance import BatchRows

    drawn = BatchRows(tf.constant(3, tf.int64), 2, 8).own_uniform(42, (512,), 4)
    assert np.array_equal(drawn, tf.random.stateless_uniform((8, 512), seed=[42, 3])[2:6])


def test_dropout_masks_of_rows_differ_and_each_worker_uses_its_rows_of_one_mask() -> None:
    import tensorflow as tf

    from job.data.chance import BatchRows
    from job.train.dropout import SharedDropout, dropout_masks

    layer = SharedDropout(0.4, seed=7, name="drop")
    layer.build((None, 1000))
    ones = tf.ones((6, 1000))

    def mask(first: int, rows: int, step: int) -> Any:
        kept = layer.mask(BatchRows(tf.constant(step, tf.int64), first, 6), rows)
        with dropout_masks({"drop": kept}):
            return layer(ones[:rows], training=True).numpy()

    whole = mask(0, 6, step=1)
    assert np.array_equal(np.concatenate([mask(0, 2, 1), mask(2, 4, 1)]), whole)
    assert len({row.tobytes() for row in whole}) == 6
    assert not np.array_equal(mask(0, 6, step=2), whole)
    assert abs((whole == 0).mean() - 0.4) < 0.03
    assert np.allclose(whole[whole > 0], 1 / 0.6)
    assert np.array_equal(layer(ones, training=True).numpy(), ones)


def test_the_model_folder_holds_what_the_contract_says(trained: Path, few: Path) -> None:
    assert {path.name for path in trained.iterdir()} == MODEL_FILES
    manifest, faults, strangers = verify(place(trained))
    assert isinstance(manifest, ModelManifest)
    assert (faults, strangers) == ([], [])
    assert (trained / "labels.txt").read_bytes() == (few / "label.labels.txt").read_bytes()
    history = [json.loads(line) for line in (trained / "history.jsonl").read_text().splitlines()]
    assert [row["epoch"] for row in history] == [1, 2, 3]
    assert all(set(row) == EPOCH_KEYS for row in history)
    assert 0 < history[-1]["learning_rate"] < 0.1 * GIVEN["learning_rate"]  # cosine
    metrics = json.loads((trained / "metrics.json").read_text())
    assert all(set(metrics[split]) == SPLIT_KEYS for split in ("train", "validation", "test"))
    # The temperature improves the probabilities of the validation split, and changes no prediction.
    best = history[metrics["best_epoch"] - 1]
    assert metrics["validation"]["accuracy"] == pytest.approx(best["val_accuracy"])
    assert metrics["validation"]["loss"] < best["val_loss"]
    assert 0.25 <= metrics["temperature"] <= 4
    assert metrics["temperature"] != 1
    assert json.loads((trained / "config.json").read_text()) == TrainConfig.model_validate(GIVEN).model_dump() | {
        "margin": 0.0,
        "license": None,
    }
    assert json.loads((trained.parent / "latest.json").read_text())["run"] == "first"
    counts = json.loads((few / "manifest.json").read_text())["counts"]
    assert metrics["test"]["examples"] == counts["test"]["examples"]
    assert pd.read_csv(trained / "per_class.csv")["examples"].sum() == counts["test"]["examples"]
    wrong = pd.read_csv(trained / "misclassified.csv")
    assert len(wrong) == round((1 - metrics["test"]["accuracy"]) * counts["test"]["examples"])
    assert (wrong["label"] != wrong["predicted"]).all()


LOAD_ALONE = """
import sys
sys.modules.update(dict.fromkeys(["job", "cluster", "preprocessing"]))  # any import of ours fails
import keras, numpy as np
model = keras.saving.load_model(sys.argv[1], safe_mode=True)
assert getattr(model, "optimizer", None) is None
assert {type(layer).__module__.split(".")[0] for layer in model.layers} == {"keras"}
assert not any(getattr(layer, "synchronized", False) for layer in model.layers)
images = np.load(sys.argv[2])
of_bytes, of_floats = model.predict(images, verbose=0), model.predict(images.astype("float32"), verbose=0)
assert np.array_equal(of_bytes, of_floats)
np.save(sys.argv[3], of_bytes)
"""


def test_the_saved_model_loads_without_our_package_and_predicts_the_same(
    trained: Path, few: Path, tmp_path: Path
) -> None:
    from job.evaluate import evaluate

    labels = save_test_crops(few, tmp_path / "images.npy")
    arguments = [str(trained / "model.keras"), str(tmp_path / "images.npy"), str(tmp_path / "out.npy")]
    in_fresh_process(LOAD_ALONE, *arguments, cwd=tmp_path)
    probabilities = np.load(tmp_path / "out.npy")
    assert np.allclose(probabilities.sum(axis=1), 1, atol=1e-5)
    of_training = json.loads((trained / "metrics.json").read_text())["test"]
    assert (probabilities.argmax(axis=1) == labels).mean() == pytest.approx(of_training["accuracy"], abs=1e-9)
    loss = -np.log(probabilities[np.arange(len(labels)), labels]).mean()
    assert loss == pytest.approx(of_training["loss"], rel=1e-4)
    again = asdict(evaluate(place(trained.parent), place(few), "test").metrics)
    assert again["accuracy"] == of_training["accuracy"]
    assert again["loss"] == pytest.approx(of_training["loss"], rel=1e-4)


def test_a_finished_run_is_left_as_it_is_and_keeps_no_checkpoints(
    trained: Path, few: Path, pages: Path, tmp_path: Path
) -> None:
    models = place(trained.parents[1])
    assert list((trained.parents[1] / ".runs").iterdir()) == []
    (trained.parent / "latest.json").unlink()  # as if the training had been killed just before
    given = TrainConfig.model_validate(GIVEN)
    (outcome,) = train(place(few), models, [given], "first")
    assert (outcome.folder, outcome.trained, outcome.error) == (place(trained), False, None)
    assert json.loads((trained.parent / "latest.json").read_text())["run"] == "first"
    with pytest.raises(OptionError, match="epochs .was 3, now 4."):
        train(place(few), models, [given.model_copy(update={"epochs": 4})], "first")
    source = (place(pages / "train_images"), place(pages / "train.csv"))
    prepare(*source, place(tmp_path), PrepareConfig(coverage=0.5, split="book"))
    with pytest.raises(OptionError, match="dataset_manifest_sha256"):
        train(place(tmp_path), models, [given], "first")


def test_what_cannot_be_trained_is_refused_before_ray_train_starts(dataset: Path, tmp_path: Path) -> None:
    for run in ("..", "a/b", "", "a.json", "a.lock", "a.report.html"):
        with pytest.raises(OptionError, match="--run must"):
            train(place(dataset), place(tmp_path), [config()], run)
    with pytest.raises(OptionError, match="must get a crop of each batch. Received: 3 for a batch of 2"):
        train(place(dataset), place(tmp_path), [config(workers=3, global_batch_size=2)], "few")
    damaged = tmp_path / "damaged"
    shutil.copytree(dataset, damaged)
    shard = sorted(damaged.glob("*test.tfrecord*"))[0]
    shard.write_bytes(shard.read_bytes()[:-1] + b"\0")
    with pytest.raises(DamageError, match=f"{shard.name} was changed"):
        train(place(damaged), place(tmp_path), [config()], "damaged")


@pytest.mark.usefixtures("in_this_process")
def test_an_infinite_loss_seals_nothing_and_is_not_retried(
    real_dataset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("job.model.architectures.BASELINE_HEAD", (16, 8))
    given = config(epochs=1, global_batch_size=100, learning_rate=1e30)  # one step: its loss is that before the update
    with pytest.raises(KuzushijiError, match=r"the loss must stay finite\..*in validation, epoch 1") as failure:
        train(place(real_dataset), place(tmp_path), [given], "nan")
    # The text of a `Failure`, which a worker returns: Ray Train would retry after an exception.
    assert isinstance(failure.value.__cause__, RuntimeError)
    assert "run_epoch" in str(failure.value.__cause__)
    assert not (tmp_path / "baseline").exists()


@pytest.mark.usefixtures("in_this_process")
def test_the_losses_and_hits_of_a_long_epoch_are_all_counted(
    few: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A float32 sum of 2**24 does not change when 1 is added."""
    import tensorflow as tf

    def counted(self: Any, images: Any, labels: Any, masks: Any) -> Any:
        sums = tf.fill([2], tf.where(self.optimizer.iterations.value == 0, 2.0**24, 1.0))
        self.optimizer.iterations.assign_add(1)
        return sums

    monkeypatch.setattr("job.train.step.Steps._train_replica", counted)
    monkeypatch.setattr("job.train.training.SUM_CROPS", 3)
    monkeypatch.setattr("job.model.architectures.BASELINE_HEAD", (16, 8))
    folder = train(place(few), place(tmp_path), [config(epochs=1, global_batch_size=1)], "long")[0].folder
    row = json.loads((folder / "history.jsonl").read_text())
    assert row["step"] > 30
    assert row["loss"] == row["accuracy"] == pytest.approx((2**24 + row["step"] - 1) / row["step"], rel=2e-7)


@pytest.mark.usefixtures("in_this_process")
def test_the_slower_of_two_trainings_of_one_run_fails_in_one_line_without_retry(
    trained: Path, few: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from job.model import folder

    seal, manifest = folder.seal, tmp_path / "baseline" / "twice" / "manifest.json"

    def after_the_other(*arguments: Any) -> None:
        shutil.copyfile(trained / "manifest.json", manifest)
        seal(*arguments)

    monkeypatch.setattr(folder, "seal", after_the_other)
    monkeypatch.setattr("job.model.architectures.BASELINE_HEAD", (16, 8))
    with pytest.raises(KuzushijiError, match="^only one job at a time may .* sealed by another job in the") as failure:
        train(place(few), place(tmp_path), [config(epochs=1, global_batch_size=16)], "twice")
    assert isinstance(failure.value.__cause__, RuntimeError)  # the text of a `Failure`: Ray Train does not retry
    assert manifest.read_bytes() == (trained / "manifest.json").read_bytes()
    assert not (tmp_path / "baseline" / "latest.json").exists()


@pytest.mark.usefixtures("in_this_process")
def test_a_fault_that_another_worker_found_is_one_line_without_retry(
    few: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Otherwise, this worker would wait for the other one in the first collective."""
    own: list[Failure | None] = []

    def of_another(board: Any, architecture: str, failure: Failure | None) -> Failure:
        own.append(failure)
        return Failure("a shard was changed", "")

    monkeypatch.setattr("job.train.worker.shared_failure", of_another)
    with pytest.raises(KuzushijiError, match="^a shard was changed$"):
        train(place(few), place(tmp_path), [config(epochs=1, global_batch_size=4)], "damaged")
    assert own == [None]  # once


def test_a_dataset_that_was_replaced_since_the_run_began_is_not_staged(
    few: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import ray.train

    from job.train.staging_ahead import staged_partitions

    context = {"get_world_rank": lambda: 0, "get_world_size": lambda: 1, "get_node_rank": lambda: 0}
    monkeypatch.setattr(ray.train, "get_context", lambda: SimpleNamespace(**context))
    job = job_of(config(), dataset=str(few), dataset_manifest_sha256="0" * 64)
    says = f"--dataset must be the same on all hosts and not change .* Received: another one at {few} on "
    with pytest.raises(DamageError, match=says), staged_partitions(job):
        pass


@pytest.mark.usefixtures("in_this_process")
def test_a_damaged_dataset_is_one_line_without_retry(
    few: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def damaged(*arguments: Any) -> Any:
        raise DamageError("a shard was changed")

    monkeypatch.setattr("job.train.staging_ahead.staged_shards", damaged)
    with pytest.raises(KuzushijiError, match="^a shard was changed$") as failure:
        train(place(few), place(tmp_path), [config(epochs=1, global_batch_size=4)], "damaged")
    assert isinstance(failure.value.__cause__, RuntimeError)  # the text of a `Failure`


@pytest.mark.usefixtures("in_this_process")
def test_initial_weights_do_not_depend_on_what_else_drew_random_numbers_while_crops_were_staged(
    few: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Retried requests draw random numbers, for example."""
    from job.train import staging_ahead, worker

    draws, weights = [0, 3], []
    staged_shards, initial_model = staging_ahead.staged_shards, worker.initial_model

    def drawing(*arguments: Any) -> Any:
        for _ in range(draws[len(weights)]):
            random.random()
        return staged_shards(*arguments)

    def remembered(*arguments: Any) -> Any:
        weights.append(initial_model(*arguments)[0].get_weights())
        raise InputError("no more is needed")

    monkeypatch.setattr(staging_ahead, "staged_shards", drawing)
    monkeypatch.setattr(worker, "initial_model", remembered)
    monkeypatch.setattr("job.model.architectures.BASELINE_HEAD", (16, 8))
    for name in ("none", "three"):
        with pytest.raises(KuzushijiError, match="no more is needed"):
            train(place(few), place(tmp_path), [config(epochs=1, global_batch_size=16)], name)
    for one, other in zip(*weights, strict=True):
        assert np.array_equal(one, other)


@pytest.mark.usefixtures("in_this_process")
def test_out_of_memory_is_one_line_without_retry(few: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import tensorflow as tf

    def too_large(self: Any, images: Any, labels: Any, masks: Any) -> Any:
        return tf.reduce_sum(tf.fill([tf.shape(labels, tf.int64)[0] * 2**44, 2], 1.0), axis=0)

    monkeypatch.setattr("job.train.step.Steps._train_replica", too_large)
    monkeypatch.setattr("job.model.architectures.BASELINE_HEAD", (16, 8))
    line = r"^a step must fit into memory\. Received: OOM when allocating tensor with shape\[\d+,2\]\. Lower --global-"
    with pytest.raises(KuzushijiError, match=line) as failure:
        train(place(few), place(tmp_path), [config(epochs=1, global_batch_size=4)], "large")
    # The text of a `Failure`, which a worker returns.
    assert isinstance(failure.value.__cause__, RuntimeError)
    assert "ResourceExhaustedError" in str(failure.value.__cause__)


def test_deterministic_is_the_default_on_cpus_only() -> None:
    def deterministic(**options: Any) -> bool:
        return configs_of(["baseline"], None, None, **options)[0].deterministic

    assert deterministic()
    assert deterministic(gpus_per_worker=0)
    assert not deterministic(gpus_per_worker=1)
    assert deterministic(gpus_per_worker=1, deterministic=True)
    assert not deterministic(deterministic=False)
    assert "deterministic" in MAY_DIFFER  # like the number of workers, it only changes rounding


@pytest.mark.usefixtures("in_this_process")
@pytest.mark.parametrize(("epochs", "accuracy"), [(3, 0.1), pytest.param(12, 0.95, marks=pytest.mark.long)])
def test_a_training_fits_the_real_pages_though_they_are_less_than_a_batch(
    epochs: int,
    accuracy: float,
    real_dataset: Path,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("job.model.architectures.BASELINE_HEAD", (1000, 200))
    caplog.set_level("INFO", "kuzushiji")
    given = config(epochs=epochs, global_batch_size=512, learning_rate=1e-3)
    folder = train(place(real_dataset), place(tmp_path), [given], "heart")[0].folder
    assert "--global-batch-size 512 is lowered to 155" in caplog.text
    assert "baseline: global batch size 155, its default is 512; the learning rate stays 0.001" in caplog.text
    parts = ("loading TensorFlow", "connecting and staging", "building the model", "first step")
    listed = ", ".join(rf"{part} [0-9.]+" for part in parts)
    begun = [
        r"starting 1 worker, [0-9.]+ s after the command started",
        "the workers have started",
        rf"first step [0-9.]+ s \({listed}\)",
    ]
    assert re.search(".*".join(begun), caplog.text, re.DOTALL)
    assert caplog.text.count("after the worker started") == 1
    history = [json.loads(line) for line in (folder / "history.jsonl").read_text().splitlines()]
    assert [row["step"] for row in history] == list(range(1, epochs + 1))
    events = sorted((tmp_path / "tensorboard" / "baseline" / "heart").iterdir())
    summaries = [Event.FromString(record).summary.value for path in events for record in read_frames(path.read_bytes())]
    losses = [value.simple_value for values in summaries for value in values if value.tag == "loss/validation"]
    assert losses == pytest.approx([row["val_loss"] for row in history])
    assert "responses of convolutions" in (folder.parent / "heart.report.html").read_text()
    assert history[-1]["accuracy"] > accuracy


def test_a_changed_model_is_refused_before_it_is_loaded(trained: Path, few: Path, tmp_path: Path) -> None:
    from job.evaluate import evaluate

    copy = tmp_path / "model"
    shutil.copytree(trained, copy)
    data = bytearray((copy / "model.keras").read_bytes())
    data[len(data) // 2] ^= 1
    (copy / "model.keras").write_bytes(data)
    with pytest.raises(DamageError, match=r"model.keras was changed"):
        evaluate(place(copy), place(few), "test")


def test_a_dataset_with_other_classes_is_refused(trained: Path, real_dataset: Path) -> None:
    from job.evaluate import evaluate

    with pytest.raises(OptionError, match="must be the model's"):
        evaluate(place(trained), place(real_dataset), "test")
    assert read_manifest(place(trained), ModelManifest).finished_at
