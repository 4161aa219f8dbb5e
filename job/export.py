"""Export a trained model to other formats, and check that the export predicts the same."""

import logging
import tempfile
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
from numpy.typing import NDArray
from upath import UPath

from cluster.errors import KuzushijiError, OptionError
from cluster.storage import list_files, list_folders, new_file, remove_file, remove_folder, writing_in
from job.model.folder import LABELS_FILE, load_model

log = logging.getLogger("kuzushiji")

TFLITE_FILE = "model.tflite"
SAVED_MODEL_FILE = "saved_model.pb"
WRITTEN_LAST = (TFLITE_FILE, SAVED_MODEL_FILE)  # without it, an export is incomplete
CHECKED_CROPS = 16
MAX_DIFFERENCE = 1e-4  # of a probability: other kernels add in another order

Predict = Callable[[NDArray[np.float32]], NDArray[np.float32]]


def export(model_place: UPath, form: str, out: UPath) -> float:
    """Write a model as a SavedModel or for LiteRT (TensorFlow Lite), and its `labels.txt`, to a folder.

    The exported model takes N x 80 x 80 x 1 float32, 0..255, and returns N x K probabilities.

    Args:
        model_place: a model folder, or an architecture's folder for its latest run.
        form: `savedmodel` or `tflite`.
        out: new or empty folder.

    Returns:
        The largest difference between the probabilities of export and model, over synthetic crops.

    Raises:
        OptionError: `out` is not empty.
        InputError, DamageError: the model can't be used, or does not match its manifest.
        KuzushijiError: the export predicts something else, or `out` can't be written. No files are left in `out`.
    """
    if list_files(out) or list_folders(out):
        raise OptionError(f"--out must be a new or empty folder. Received: {out}, with files in it")
    model, names, _ = load_model(model_place)
    with writing_in(Path(tempfile.gettempdir())), tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        log.info("exports the model as %s", form)
        predict = _as_saved_model(model, folder) if form == "savedmodel" else _as_tflite(model, folder)
        difference = _difference(model, predict)
        (folder / LABELS_FILE).write_text("".join(f"{name}\n" for name in names))
        files = sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())
        with _emptied_on_failure(out, files):
            for name in sorted(files, key=lambda name: name in WRITTEN_LAST):
                with new_file(out / name) as target:
                    target.write_bytes((folder / name).read_bytes())
    return difference


@contextmanager
def _emptied_on_failure(out: UPath, files: Sequence[str]) -> Iterator[None]:
    """Remove the files and their folders from `out` if the block fails or is stopped, so that the command can be run
    again.
    """
    try:
        yield
    except BaseException:
        for name in {PurePosixPath(file).parts[0] for file in files}:
            with suppress(OSError, KuzushijiError):
                remove_file(out / name) if name in files else remove_folder(out / name)
        raise


def _as_saved_model(model: Any, folder: Path) -> Predict:
    import tensorflow as tf

    model.export(folder, format="tf_saved_model", verbose=False)
    written = tf.saved_model.load(str(folder))  # referenced by the lambda: its functions do not keep variables alive
    return lambda crops: np.asarray(written.serve(crops))


def _as_tflite(model: Any, folder: Path) -> Predict:
    import tensorflow as tf

    model.export(folder / TFLITE_FILE, format="litert", verbose=False)
    with warnings.catch_warnings():
        # Once TensorFlow drops it, ai-edge-litert is needed (ai.google.dev/edge/litert/migration).
        warnings.filterwarnings("ignore", r"\s*Warning: tf\.lite\.Interpreter is deprecated", UserWarning)
        interpreter = tf.lite.Interpreter(str(folder / TFLITE_FILE))

    def predict(crops: NDArray[np.float32]) -> NDArray[np.float32]:
        (model_input,), (model_output,) = interpreter.get_input_details(), interpreter.get_output_details()
        interpreter.resize_tensor_input(model_input["index"], crops.shape)
        interpreter.allocate_tensors()
        interpreter.set_tensor(model_input["index"], crops)
        interpreter.invoke()
        predicted: NDArray[np.float32] = interpreter.get_tensor(model_output["index"])
        return predicted

    return predict


def _difference(model: Any, predict: Predict) -> float:
    """Return the largest difference of a probability between model and export, over noisy 8 x 8 px blocks.

    Raises:
        KuzushijiError: it exceeds `MAX_DIFFERENCE`, or is not a number.
    """
    rng = np.random.default_rng(0)
    blocks = rng.integers(0, 256, (CHECKED_CROPS, 10, 10, 1)).repeat(8, axis=1).repeat(8, axis=2)
    crops = np.clip(blocks + rng.normal(0, 20, blocks.shape), 0, 255).astype(np.float32)
    expected, exported = np.asarray(model(crops, training=False)), predict(crops)
    difference = float(np.abs(expected - exported).max()) if expected.shape == exported.shape else 1.0
    if not difference <= MAX_DIFFERENCE:
        raise KuzushijiError(
            f"an export must predict the same as the model. Received: probabilities that differ by {difference:g}. "
            "Use model.keras itself, and report this to the maintainers"
        )
    return difference
