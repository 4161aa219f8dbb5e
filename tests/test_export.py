"""Models for other programs: they predict what ours do, and nothing is left of one that does not."""

from contextlib import AbstractContextManager
from pathlib import Path

import numpy as np
import pytest
from upath import UPath

from cluster.errors import KuzushijiError, OptionError
from cluster.storage import new_file, place
from job.export import export
from job.model.folder import load_model


@pytest.fixture(scope="module")
def crops(few: Path) -> np.ndarray:
    from job.data.staging import staged

    with staged(place(few), ["test"]) as data:
        return np.array(data.splits["test"].images, np.float32)


def test_a_saved_model_predicts_what_the_model_does(trained: Path, crops: np.ndarray, tmp_path: Path) -> None:
    import tensorflow as tf

    export(place(trained), "savedmodel", place(tmp_path / "out"))
    model, names, _ = load_model(place(trained))
    written = tf.saved_model.load(str(tmp_path / "out"))
    np.testing.assert_allclose(written.serve(crops), model.predict(crops, verbose=0), atol=1e-4)
    assert (tmp_path / "out" / "labels.txt").read_text().split() == names


@pytest.mark.filterwarnings("ignore:.*tf.lite.Interpreter is deprecated")
def test_a_tflite_model_predicts_what_the_model_does(trained: Path, crops: np.ndarray, tmp_path: Path) -> None:
    import tensorflow as tf

    export(place(trained), "tflite", place(tmp_path / "out"))
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["labels.txt", "model.tflite"]
    interpreter = tf.lite.Interpreter(str(tmp_path / "out" / "model.tflite"))
    interpreter.resize_tensor_input(interpreter.get_input_details()[0]["index"], crops.shape)
    interpreter.allocate_tensors()
    interpreter.set_tensor(interpreter.get_input_details()[0]["index"], crops)
    interpreter.invoke()
    predicted = interpreter.get_tensor(interpreter.get_output_details()[0]["index"])
    np.testing.assert_allclose(predicted, load_model(place(trained))[0].predict(crops, verbose=0), atol=1e-4)


def test_resnet_can_be_a_tflite_model(tmp_path: Path) -> None:
    import keras

    from job.export import MAX_DIFFERENCE, _as_tflite, _difference
    from job.model.architectures import resnet

    keras.utils.set_random_seed(1)
    model = resnet(5)
    assert _difference(model, _as_tflite(model, tmp_path)) <= MAX_DIFFERENCE


def test_what_predicts_something_else_is_not_written(
    trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("job.export._as_tflite", lambda model, folder: lambda crops: 1 - np.asarray(model(crops)))
    with pytest.raises(KuzushijiError, match="must predict the same as the model. Received: probabilities that"):
        export(place(trained), "tflite", place(tmp_path / "out"))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(("form", "last"), [("tflite", "model.tflite"), ("savedmodel", "saved_model.pb")])
@pytest.mark.parametrize("reason", [KuzushijiError, KeyboardInterrupt])
def test_nothing_is_left_of_what_could_not_be_written_whole(
    form: str, last: str, reason: type[BaseException], trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(target: UPath) -> AbstractContextManager[Path]:
        if target.name == last:  # after labels.txt, and the variables of a SavedModel
            raise reason("full")
        return new_file(target)

    with monkeypatch.context() as patch:
        patch.setattr("job.export.new_file", full)
        with pytest.raises(reason, match="full"):
            export(place(trained), form, place(tmp_path / "out"))
    assert list((tmp_path / "out").iterdir()) == []
    if reason is KuzushijiError:
        export(place(trained), form, place(tmp_path / "out"))


def test_a_folder_with_something_in_it_is_refused(trained: Path, tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    with pytest.raises(OptionError, match="new or empty folder"):
        export(place(trained), "savedmodel", place(tmp_path))
