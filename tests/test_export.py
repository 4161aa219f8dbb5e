"""Exports: they predict what the model predicts, and nothing is left of one that does not."""

import json
import os
import runpy
import signal
from collections.abc import Callable
from contextlib import AbstractContextManager, suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import Kuzushiji
from huggingface_hub import ModelCard
from upath import UPath

from cluster.errors import KuzushijiError, OptionError
from cluster.places import place
from cluster.storage import TEMPORARY_PREFIX, new_file
from job.evaluate import evaluate
from job.export import export as command
from job.export.export import MAX_DIFFERENCE, Export, _accuracy, _convert, _difference, export
from job.model.folder import load_model
from job.report.models import model_report
from preprocessing.config import PrepareConfig
from preprocessing.prepare import prepare

FORMATS = ("savedmodel", "onnx", "tflite")
LAST = {"savedmodel": "saved_model.pb", "onnx": "model.onnx", "tflite": "model.tflite"}


@pytest.fixture(scope="module")
def crops(few: Path) -> np.ndarray:
    from job.data.staging import staged

    with staged(place(few), ["test"]) as data:
        return np.array(data.splits["test"].images, np.float32)


@pytest.fixture(scope="module")
def expected(trained: Path, crops: np.ndarray) -> np.ndarray:
    return np.asarray(load_model(place(trained))[0].predict(crops, verbose=0))


@pytest.fixture(scope="module")
def exports(trained: Path, few: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Path, Export]]:
    """The model in each format: its folder, and what `export` returned."""
    made = {}
    for form in FORMATS:
        folder = tmp_path_factory.mktemp(form)
        made[form] = folder, export(place(trained), form, place(folder), dataset=place(few))
    return made


def test_a_saved_model_is_what_tensorflow_serving_reads(
    trained: Path, exports: dict[str, tuple[Path, Export]], crops: np.ndarray, expected: np.ndarray
) -> None:
    """Read by TensorFlow's loader, because TensorFlow Serving is in no package registry."""
    import tensorflow as tf

    folder, _ = exports["savedmodel"]
    assert sorted(path.name for path in folder.iterdir()) == ["1", "README.md", "labels.txt"]
    signature = tf.saved_model.load(str(folder / "1")).signatures["serving_default"]
    assert set(signature.structured_input_signature[1]) == {"crops"}
    served = signature(crops=tf.constant(crops))
    assert set(served) == {"probabilities", "label"}
    np.testing.assert_allclose(served["probabilities"], expected, atol=1e-4)
    names = (trained / "labels.txt").read_text().split()
    assert [label.decode() for label in served["label"].numpy()] == [names[row] for row in expected.argmax(axis=1)]
    assert (folder / "labels.txt").read_text().split() == names
    weights = 4 * load_model(place(trained))[0].count_params()
    stored = (folder / "1" / "variables" / "variables.data-00000-of-00001").stat().st_size
    assert weights <= stored < 1.1 * weights  # each weight once


def test_an_onnx_model_predicts_what_the_model_does(
    exports: dict[str, tuple[Path, Export]], crops: np.ndarray, expected: np.ndarray
) -> None:
    import onnx
    import onnxruntime

    folder, _ = exports["onnx"]
    assert sorted(path.name for path in folder.iterdir()) == ["README.md", "labels.txt", "model.onnx"]
    (opset,) = [entry.version for entry in onnx.load(folder / "model.onnx").opset_import if entry.domain == ""]
    assert f"opset {opset} " in (folder / "README.md").read_text()
    session = onnxruntime.InferenceSession(folder / "model.onnx")
    (probabilities,) = session.run(["probabilities"], {"crops": crops})
    np.testing.assert_allclose(probabilities, expected, atol=1e-4)


@pytest.mark.filterwarnings("ignore:.*tf.lite.Interpreter is deprecated")
def test_a_tflite_model_predicts_what_the_model_does(
    exports: dict[str, tuple[Path, Export]], crops: np.ndarray, expected: np.ndarray
) -> None:
    import tensorflow as tf

    folder, _ = exports["tflite"]
    assert sorted(path.name for path in folder.iterdir()) == ["README.md", "labels.txt", "model.tflite"]
    run = tf.lite.Interpreter(str(folder / "model.tflite")).get_signature_runner()
    np.testing.assert_allclose(run(crops=crops)["probabilities"], expected, atol=1e-4)


@pytest.mark.parametrize("form", FORMATS)
def test_with_a_dataset_the_accuracy_of_export_and_model_is_reported(
    form: str, trained: Path, few: Path, tmp_path: Path, kuzushiji: Kuzushiji
) -> None:
    done = kuzushiji("export", "--model", trained, "--format", form, "--dataset", few, "--out", tmp_path / "out")
    assert done.code == 0, done.stderr
    accuracy = json.loads((trained / "metrics.json").read_text())["test"]["accuracy"]
    assert f"{accuracy:.4f} (model: {accuracy:.4f}); the same class predicted for 100.00%" in done.stdout
    card = ModelCard.load(tmp_path / "out" / "README.md")  # as a hub reads it
    assert f"| the model | {accuracy:.4f} |\n| this export | {accuracy:.4f} |" in card.text
    assert (card.data.license, card.data.language, card.data.library_name) == ("unknown", ["ja"], form)
    assert card.text.strip().startswith(f"# `baseline/first` as {form}\n")


@pytest.mark.filterwarnings("ignore:.*tf.lite.Interpreter is deprecated")
@pytest.mark.parametrize("form", FORMATS)
def test_the_script_of_a_card_reads_a_crop(
    form: str,
    trained: Path,
    exports: dict[str, tuple[Path, Export]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    folder, _ = exports[form]
    script = tmp_path / "script.py"
    script.write_text((folder / "README.md").read_text().split("```python\n")[1].split("```")[0])
    monkeypatch.chdir(folder)
    capsys.readouterr()
    runpy.run_path(str(script))
    label, probability = capsys.readouterr().out.split()
    predicted = np.asarray(load_model(place(trained))[0](np.zeros((1, 80, 80, 1), np.float32)))[0]
    assert label == (trained / "labels.txt").read_text().split()[predicted.argmax()]
    assert float(probability) == pytest.approx(predicted.max(), abs=1e-4)


@pytest.mark.parametrize(("quantize", "size"), [("float16", 0.55), ("int8", 0.35)])
def test_a_quantized_model_is_smaller_and_its_accuracy_is_told(
    quantize: Any,
    size: float,
    trained: Path,
    exports: dict[str, tuple[Path, Export]],
    few: Path,
    tmp_path: Path,
) -> None:
    _, whole = exports["tflite"]
    small = export(place(trained), "tflite", place(tmp_path / "small"), quantize, place(few))
    assert small.files["model.tflite"] < size * whole.files["model.tflite"]
    assert whole.accuracy
    assert small.accuracy
    assert small.accuracy.of_model == whole.accuracy.of_model
    assert f"| this export | {small.accuracy.of_export:.4f} |" in (tmp_path / "small" / "README.md").read_text()
    assert quantize in (tmp_path / "small" / "README.md").read_text()


@pytest.fixture(scope="module")
def learned(few: Path) -> Any:
    """Return a small model that overfits the test crops of `few`."""
    import keras
    from keras import layers

    from job.data.staging import staged

    keras.utils.set_random_seed(1)
    inputs = keras.Input((80, 80, 1))
    x = layers.Conv2D(8, 8, strides=8, activation="relu")(layers.Rescaling(1 / 255)(inputs))
    with staged(place(few), ["test"]) as data:
        model = keras.Model(inputs, layers.Dense(len(data.class_names), activation="softmax")(layers.Flatten()(x)))
        model.compile(keras.optimizers.Adam(3e-3), "sparse_categorical_crossentropy")
        crops = data.splits["test"]
        model.fit(np.array(crops.images), np.array(crops.labels), epochs=60, batch_size=len(crops), verbose=0)
    return model


@pytest.mark.parametrize("quantize", ["float16", "int8"])
def test_a_quantized_model_keeps_the_accuracy_of_its_model(
    quantize: Any, learned: Any, few: Path, crops: np.ndarray, tmp_path: Path
) -> None:
    from job.data.staging import staged
    from job.export.formats import in_float32

    predict = _convert(in_float32(learned), [], "tflite", quantize, tmp_path, crops)
    with staged(place(few), ["test"]) as data:
        accuracy = _accuracy(learned, predict, "test", data.splits["test"])
    assert accuracy.of_model > 0.95
    assert accuracy.of_export > 0.95
    assert accuracy.same > 0.95
    np.testing.assert_allclose(predict(crops).sum(axis=1), 1, atol=1e-5)


def test_a_loss_of_accuracy_by_quantization_is_a_warning(
    learned: Any, few: Path, caplog: pytest.LogCaptureFixture
) -> None:
    from job.data.staging import staged

    with staged(place(few), ["test"]) as data:
        crops = data.splits["test"]
        last = np.eye(len(data.class_names), dtype=np.float32)[-1:]
        accuracy = _accuracy(learned, lambda crops: last.repeat(len(crops), axis=0), "test", crops)
        assert accuracy.of_export == float(np.mean(crops.labels == len(data.class_names) - 1))
    assert f"lowers the accuracy on test from {accuracy.of_model:.4f} to {accuracy.of_export:.4f}" in caplog.text


@pytest.mark.parametrize("form", FORMATS)
@pytest.mark.parametrize("architecture", ["resnet", "baseline", "fcn"])
def test_a_model_trained_in_bfloat16_is_exported_in_float32(
    form: Any, architecture: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from job.export.formats import in_float32

    model = small(architecture, "mixed_bfloat16", monkeypatch)
    wide = in_float32(model)
    assert {layer.dtype_policy.name for layer in wide.layers} == {"float32"}
    assert _difference(wide, _convert(wide, ["a", "b", "rare"], form, "none", tmp_path), "none") <= MAX_DIFFERENCE
    crops = np.random.default_rng(0).integers(0, 256, (4, 80, 80, 1)).astype(np.float32)
    difference = np.abs(np.asarray(model(crops)) - np.asarray(wide(crops)["probabilities"])).max()
    assert 0 < difference < 0.03  # bfloat16 has 8 significant bits


def small(architecture: str, precision: str, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Return a narrow classifier of three classes, with gamma 1 in all batch norms; some start with 0."""
    import keras

    from job.model import architectures

    monkeypatch.setattr(architectures, "BASELINE_HEAD", (16, 8))
    monkeypatch.setattr(architectures, "FCN_FILTERS", (4, 4))
    keras.utils.set_random_seed(1)
    keras.config.set_dtype_policy(precision)
    try:
        model = architectures.ARCHITECTURES[architecture](3)
    finally:
        keras.config.set_dtype_policy("float32")
    for layer in model.layers:
        if isinstance(layer, keras.layers.BatchNormalization) and layer.scale:
            layer.gamma.assign(np.ones(layer.gamma.shape))
    return model


@pytest.mark.parametrize("form", FORMATS)
def test_an_fcn_keeps_its_free_height_and_width(form: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from job.export.formats import in_float32

    wide = in_float32(small("fcn", "float32", monkeypatch))
    predict = _convert(wide, ["a", "b", "rare"], form, "none", tmp_path)
    for size in ((40, 120), (96, 33)):
        crops = np.random.default_rng(0).integers(0, 256, (2, *size, 1)).astype(np.float32)
        np.testing.assert_allclose(predict(crops), np.asarray(wide(crops)["probabilities"]), atol=1e-4)


@pytest.mark.parametrize(("form", "wrong_by"), [*zip(FORMATS, (2e-4, -2e-4, np.nan), strict=True)])
def test_an_export_that_predicts_differently_is_not_written(
    form: Any, wrong_by: float, trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def wrong(model: Any, *_: object) -> Callable[[np.ndarray], np.ndarray]:
        return lambda crops: np.asarray(model(crops)["probabilities"]) + wrong_by

    name = {"savedmodel": "save_saved_model", "onnx": "save_onnx", "tflite": "save_tflite"}[form]
    monkeypatch.setattr(f"job.export.formats.{name}", wrong)
    with pytest.raises(KuzushijiError, match="must predict the same as the model. Received: probabilities that"):
        export(place(trained), form, place(tmp_path / "out"))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("instead", [None, RuntimeError])
def test_ctrl_c_stops_an_export_also_where_a_converter_loses_it(
    instead: type[Exception] | None, trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stubborn(*_: object) -> None:
        with suppress(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
        if instead:
            raise instead

    before = signal.getsignal(signal.SIGINT)
    monkeypatch.setattr("job.export.formats.save_tflite", stubborn)
    with pytest.raises(KeyboardInterrupt):
        export(place(trained), "tflite", place(tmp_path / "out"))
    assert not (tmp_path / "out").exists()
    assert signal.getsignal(signal.SIGINT) is before


@pytest.mark.parametrize("form", FORMATS)
@pytest.mark.parametrize("reason", [KuzushijiError, KeyboardInterrupt])
def test_nothing_is_left_of_what_could_not_be_written_whole(
    form: Any, reason: type[BaseException], trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(target: UPath) -> AbstractContextManager[Path]:
        if target.name == LAST[form]:  # written after labels.txt and the variables of a SavedModel
            raise reason("full")
        return new_file(target)

    with monkeypatch.context() as patch:
        patch.setattr(command, "new_file", full)
        with pytest.raises(reason, match="full"):
            export(place(trained), form, place(tmp_path / "out"))
    assert list((tmp_path / "out").iterdir()) == []
    if reason is KuzushijiError:
        export(place(trained), form, place(tmp_path / "out"))


def test_a_folder_that_cannot_take_an_export_is_refused_before_the_model_is_loaded(
    trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(command, "load_model", None)
    (tmp_path / "mine").mkdir()
    with pytest.raises(OptionError, match=r"new or empty folder. Received: .*, with mine"):
        export(place(trained), "savedmodel", place(tmp_path))
    (tmp_path / "file").touch()
    with pytest.raises(KuzushijiError, match="a folder must exist"):
        export(place(trained), "savedmodel", place(tmp_path / "file" / "out"))


def test_the_temporary_file_of_a_killed_export_is_removed(trained: Path, tmp_path: Path) -> None:
    left = tmp_path / f"{TEMPORARY_PREFIX}model"
    left.touch()
    os.utime(left, (0, 0))
    export(place(trained), "savedmodel", place(tmp_path))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["1", "README.md", "labels.txt"]


def test_options_that_do_not_fit_are_refused(
    trained: Path, few: Path, tmp_path: Path, kuzushiji: Kuzushiji, monkeypatch: pytest.MonkeyPatch
) -> None:
    given = ("export", "--model", trained, "--format", "onnx", "--out", tmp_path / "out")
    assert "--split must be given with --dataset. Received: --split test alone" in (
        kuzushiji(*given, "--split", "test").stderr
    )
    out = place(tmp_path / "out")
    with pytest.raises(OptionError, match="--quantize is for --format tflite. Received: --format onnx"):
        export(place(trained), "onnx", out, "float16")
    with pytest.raises(OptionError, match="int8 needs crops to calibrate on. Received: no --dataset"):
        export(place(trained), "tflite", out, "int8")
    source = place(few.parent / "pages" / "train_images"), place(few.parent / "pages" / "train.csv")
    prepare(*source, place(tmp_path / "other"), PrepareConfig(coverage=0.9))
    other = place(tmp_path / "other")
    with monkeypatch.context() as patched:  # found in files of some kB, before the shards are fetched
        patched.setattr("job.evaluate.staged_shards", lambda *_: pytest.fail("not needed"))
        patched.setattr("job.report.models.staged_shards", lambda *_: pytest.fail("not needed"))
        with pytest.raises(OptionError, match="the classes of --dataset must be the model's"):
            export(place(trained), "onnx", out, dataset=other)
        with pytest.raises(OptionError, match="the classes of --dataset must be the model's"):
            evaluate(place(trained), other, "test")
        with pytest.raises(OptionError, match="must be the one that the models were trained on"):
            model_report(place(trained.parents[1]), other)
    assert not (tmp_path / "out").exists()
