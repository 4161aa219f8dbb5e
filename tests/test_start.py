"""Fine-tuning one of our models: for other classes, for another handwriting."""

import csv
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import Kuzushiji
from PIL import Image, ImageOps

from cluster.errors import DamageError, InputError, OptionError
from cluster.manifest import read_manifest
from cluster.models import ModelManifest, point_to_latest
from cluster.places import place
from job.config import configs_of
from job.model.pretrained import obtain, weights_option
from job.train.driver import train
from preprocessing.config import PrepareConfig
from preprocessing.prepare import prepare

OLD, NEW = ["A", "B", "C", "D", "rare"], ["D", "E", "B", "rare"]


@pytest.fixture
def narrow(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make a hidden layer as wide as the number of classes: it must not be mistaken for the layer of the classes."""
    monkeypatch.setattr("job.model.architectures.BASELINE_HEAD", (6, len(OLD)))
    monkeypatch.setattr("job.model.architectures.FCN_FILTERS", (4, len(OLD)))


def named(classes: list[str]) -> list[str]:
    """Return the class names of characters, as `U+0041`; `rare` stays."""
    return [name if name == "rare" else f"U+{ord(name):04X}" for name in classes]


def write(folder: Path, architecture: str, margin: float = 0.0, classes: list[str] | None = None) -> Any:
    """Write and seal a model folder. Return the model. classes: their names; None: those of `OLD`."""
    import keras

    from job.model.architectures import ARCHITECTURES
    from job.model.folder import write_model

    keras.utils.set_random_seed(1)
    classes = classes or named(OLD)
    model = ARCHITECTURES[architecture](len(classes))
    for variable in model.variables:
        variable.assign(np.random.default_rng(1).uniform(0.5, 1.5, variable.shape))
    texts = {
        "labels.txt": "".join(f"{name}\n" for name in classes),
        "config.json": json.dumps({"architecture": architecture, "margin": margin}),
    }
    write_model(place(folder), model, texts, "0" * 64)
    return model


@pytest.mark.usefixtures("narrow")
@pytest.mark.parametrize("architecture", ["resnet", "baseline", "fcn"])
def test_shared_classes_keep_their_weights_and_new_ones_start_fresh(architecture: str, tmp_path: Path) -> None:
    import keras
    import tensorflow as tf

    from job.model.start import initial_model

    tf.config.experimental.enable_tensor_float_32_execution(True)
    old = write(tmp_path / architecture / "first", architecture)
    given = weights_option(str(tmp_path / architecture / "first"))
    assert given
    config = configs_of([architecture], given.identity, None)[0]
    shared = obtain(config, given, place(tmp_path / "models"))
    assert shared
    assert shared.place == str(tmp_path / "models" / ".weights" / given.sha256)
    keras.utils.set_random_seed(2)
    fresh, none = initial_model(config, None, named(NEW))
    keras.utils.set_random_seed(2)
    tf32 = tf.config.experimental.tensor_float_32_execution_enabled()
    model, known = initial_model(config, shared, named(NEW))
    assert not none.any()
    assert known.tolist() == [True, False, True, True]
    # TF32 stays as a worker has set it. `load_model` would configure the process for inference, without TF32.
    assert tf.config.experimental.tensor_float_32_execution_enabled() == tf32
    of_classes = 0
    for own, before, new in zip(model.weights, old.weights, fresh.weights, strict=True):
        if own.shape == before.shape:
            assert np.array_equal(own, before), own.path
        else:
            of_classes += 1
            assert own.shape[-1] == len(NEW)
            values, trained = own.numpy(), before.numpy()
            assert np.array_equal(values[..., [0, 2, 3]], trained[..., [3, 1, 4]])  # D, B and rare
            assert np.array_equal(values[..., 1], new.numpy()[..., 1])
    assert of_classes == (6 if architecture == "fcn" else 2)  # kernel and bias; with fcn, batch norm too


@pytest.mark.usefixtures("narrow", "in_this_process")
def test_a_class_without_training_crops_is_not_unlearned_unless_it_starts_fresh(
    pages: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    import keras

    names = ["U+3044", "U+306B", "U+0041", "U+0042", "rare"]  # the pages have no A and no B, the model knows no B
    source = place(pages / "train_images"), place(pages / "train.csv")
    prepare(*source, place(tmp_path / "crops"), PrepareConfig(classes=names))
    write(tmp_path / "baseline" / "first", "baseline", classes=["U+0041", *names[:2], "U+0043", "rare"])
    given = weights_option(str(tmp_path / "baseline" / "first"))
    assert given
    (config,) = configs_of(["baseline"], given.identity, None, epochs=1, global_batch_size=64, learning_rate=1e-3)
    caplog.set_level("INFO", "kuzushiji")
    folder = train(place(tmp_path / "crops"), place(tmp_path / "models"), [config], "next", weights=given)[0].folder
    assert "left out of the loss: 1 of the classes that keep their weights; no training crops" in caplog.text
    trained = keras.saving.load_model(Path(folder.path) / "model.keras", compile=False).layers[-1].bias.numpy()
    first = keras.saving.load_model(tmp_path / "baseline" / "first" / "model.keras").layers[-1].bias.numpy()
    trained *= json.loads((Path(folder.path) / "metrics.json").read_text())["temperature"]
    assert trained[2] == pytest.approx(first[0], abs=5e-4)  # Adam enlarges gradients that are only rounding
    assert trained[3] < -0.005  # B began at 0, and no crop is of it
    assert all(abs(trained[[0, 1, 4]] - first[[1, 2, 4]]) > 0.005)


@pytest.mark.usefixtures("narrow")
def test_invalid_weights_are_errors_in_one_line(few: Path, kuzushiji: Kuzushiji, tmp_path: Path) -> None:
    write(tmp_path / "fcn" / "first", "fcn")
    write(tmp_path / "wide" / "first", "baseline", margin=0.25)
    (tmp_path / "empty").mkdir()
    run = place(tmp_path / "fcn" / "first")
    point_to_latest(run, read_manifest(run, ModelManifest))
    write(tmp_path / "damaged" / "first", "baseline")
    (tmp_path / "damaged" / "first" / "model.keras").write_bytes(b"damaged")
    for folder, message in {
        "damaged/first": "model.keras",
        "fcn": f"of a finished training. Received: {tmp_path / 'fcn'}. Name the run, such as {run}",
        "fcn/first": "--weights must be a model of the architecture that is trained, baseline",
        "wide/first": "--dataset must have the margin of the model of --weights, 0.25. Received: 0. Prepare it with",
        "empty": "--weights must be imagenet, none, a file that ends in .h5, or a model folder",
        "nowhere.h5": "--weights must be a file that exists",
    }.items():
        command = ["train", "--dataset", few, "--models", tmp_path / "models", "--architecture", "baseline"]
        done = kuzushiji(*command, "--weights", tmp_path / folder)
        assert done.code == (1 if folder in ("nowhere.h5", "damaged/first") else 2)
        assert len(done.lines) == 1
        assert message in done.lines[0]
    assert not (tmp_path / "models" / ".weights").exists()  # a refused model is not kept
    with pytest.raises(OptionError, match="--weights MODEL must come with one architecture"):
        configs_of(["resnet", "baseline"], f"model:{'0' * 64}", None)
    with pytest.raises(OptionError, match="a file that ends in .h5, or a model folder"):
        weights_option(str(tmp_path))


@pytest.mark.usefixtures("narrow")
def test_other_layers_are_refused_and_a_changed_model_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from job.model.start import initial_model

    write(tmp_path / "baseline" / "first", "baseline")
    given = weights_option(str(tmp_path / "baseline" / "first"))
    assert given
    config = configs_of(["baseline"], given.identity, None)[0]
    with pytest.raises(DamageError, match="must not change while it is read"):
        obtain(
            config.model_copy(update={"weights": f"model:{'0' * 64}"}), replace(given, sha256="0" * 64), place(tmp_path)
        )
    monkeypatch.setattr("job.model.architectures.BASELINE_HEAD", (7, 7))
    with pytest.raises(InputError, match="--weights must be a model with the layers of baseline"):
        initial_model(config, given, named(NEW))


def test_the_card_names_the_model_that_a_training_began_with() -> None:
    from job.train.card import _base

    config = configs_of(["baseline"], f"model:{'a' * 64}", None)[0].model_dump()
    assert "model:aaaa" in _base(config)
    of_base = configs_of(["xception"], f"model:{'a' * 64}", "last")[0].model_dump()
    assert "model:aaaa" in _base(of_base)
    assert _base(of_base).endswith("Its licence may differ. Of the base, its last layers were trained.")
    assert _base(configs_of(["baseline"], None, None)[0].model_dump()) == ""


def mirrored(pages: Path, out: Path) -> None:
    """Write mirrored pages: a handwriting that no model has seen."""
    (out / "images").mkdir(parents=True)
    with (pages / "train.csv").open() as source, (out / "labels.csv").open("w", newline="") as target:
        rows = csv.writer(target)
        rows.writerow(["image_id", "labels"])
        for row in csv.DictReader(source):
            image = Image.open(pages / "train_images" / f"{row['image_id']}.jpg")
            ImageOps.mirror(image).save(out / "images" / f"{row['image_id']}.jpg")
            boxes = np.array(row["labels"].split()).reshape(-1, 5)
            boxes[:, 1] = [str(image.width - int(x) - int(width)) for _, x, _, width, _ in boxes]
            rows.writerow([row["image_id"], " ".join(boxes.ravel())])


@pytest.mark.long
def test_fine_tuning_on_another_hand_beats_training_from_scratch_and_the_model_as_it_was(
    kuzushiji: Kuzushiji, tmp_path: Path
) -> None:
    def run(*command: object) -> None:
        done = kuzushiji(*command)
        assert done.code == 0, done.stderr

    def accuracy(model: Path) -> float:
        out = tmp_path / f"of-{model.name}"
        run("evaluate", "--model", model, "--dataset", tmp_path / "other", "--out", out)
        return float(json.loads((out / "metrics.json").read_text())["accuracy"])

    first, models, scale = tmp_path / "first", tmp_path / "models", ("--scale", 0.3)
    run("sample", "--out", first, "--num-pages", 40, *scale)
    run("sample", "--out", tmp_path / "more", "--num-pages", 8, "--seed", 7, *scale)
    mirrored(tmp_path / "more", tmp_path / "mirrored")
    pages = ("--pages", first / "train_images", "--labels", first / "train.csv")
    run("prepare", *pages, "--dataset", tmp_path / "dataset", "--coverage", 0.6)
    pages = ("--pages", tmp_path / "mirrored" / "images", "--labels", tmp_path / "mirrored" / "labels.csv")
    run("prepare", *pages, "--dataset", tmp_path / "other", "--classes", tmp_path / "dataset" / "label.labels.txt")
    recipe = ("--models", models, "--architecture", "resnet", "--global-batch-size", 32, "--augment", "none")
    run("train", "--dataset", tmp_path / "dataset", *recipe, "--epochs", 2, "--run", "as-it-was")
    few = ("train", "--dataset", tmp_path / "other", *recipe, "--epochs", 2)
    run(*few, "--run", "goes-on", "--weights", models / "resnet" / "as-it-was", "--learning-rate", 2e-3)
    run(*few, "--run", "from-scratch")
    run(*few, "--run", "from-scratch-slowly", "--learning-rate", 2e-3)
    found = {path.name: accuracy(path) for path in (models / "resnet").iterdir() if path.is_dir()}
    assert found["goes-on"] > max(found[name] for name in found if name != "goes-on") + 0.1, found
