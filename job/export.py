"""A trained model in the forms of other programs, each checked to predict what the model does."""

import logging
import tempfile
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from upath import UPath

from cluster.errors import KuzushijiError, OptionError
from cluster.storage import list_files, list_folders, new_file, remove_file, writing_in
from job.model.folder import LABELS_FILE, load_model

log = logging.getLogger("kuzushiji")

TFLITE_FILE = "model.tflite"
SAVED_MODEL_FILE = "saved_model.pb"
LAST = (TFLITE_FILE, SAVED_MODEL_FILE)  # without it a folder is no model yet
CHECKED_CROPS = 16
MOST_DIFFERENCE = 1e-4  # of a probability: other kernels add in another order

Predict = Callable[[NDArray[np.float32]], NDArray[np.float32]]


def export(model_place: UPath, form: str, out: UPath) -> float:
    """Write a model as a SavedModel or for LiteRT (TensorFlow Lite), and `labels.txt` beside it.

    Either takes N x 80 x 80 x 1 float32, 0..255, and gives N x K probabilities. form: `savedmodel` or `tflite`.
    Returns the largest difference of a probability from the model's, over crops of blots.

    Raises:
        OptionError: `out` holds something.
        InputError, DamageError: the model can't be used, or is not what its manifest says.
        KuzushijiError: what was written predicts something else; nothing is left of it.
    """
    if list_files(out) or list_folders(out):
        raise OptionError(f"--out must be a new or empty folder. Received: {out}, with files in it")
    model, names, _ = load_model(model_place)
    with writing_in(Path(tempfile.gettempdir())), tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        log.info("writes the model as %s", form)
        predict = _as_saved_model(model, folder) if form == "savedmodel" else _as_tflite(model, folder)
        difference = _difference(model, predict)
        (folder / LABELS_FILE).write_text("".join(f"{name}\n" for name in names))
        files = sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())
        with _nothing_left_of(out, files):
            for name in sorted(files, key=lambda name: name in LAST):
                with new_file(out / name) as target:
                    target.write_bytes((folder / name).read_bytes())
    return difference


@contextmanager
def _nothing_left_of(out: UPath, files: Sequence[str]) -> Iterator[None]:
    """Where writing fails, so that the same command can be run again."""
    try:
        yield
    except Exception:
        for name in files:
            with suppress(OSError, KuzushijiError):
                remove_file(out / name)
        raise


def _as_saved_model(model: Any, folder: Path) -> Predict:
    import tensorflow as tf

    model.export(folder, format="tf_saved_model", verbose=False)
    written = tf.saved_model.load(str(folder))  # of which its functions hold no more than the names of its variables
    return lambda crops: np.asarray(written.serve(crops))


def _as_tflite(model: Any, folder: Path) -> Predict:
    import tensorflow as tf

    model.export(folder / TFLITE_FILE, format="litert", verbose=False)
    with warnings.catch_warnings():
        # Until TensorFlow comes without it and ai-edge-litert is needed (ai.google.dev/edge/litert/migration).
        warnings.filterwarnings("ignore", r"\s*Warning: tf\.lite\.Interpreter is deprecated", UserWarning)
        interpreter = tf.lite.Interpreter(str(folder / TFLITE_FILE))

    def predict(crops: NDArray[np.float32]) -> NDArray[np.float32]:
        (given,), (gives,) = interpreter.get_input_details(), interpreter.get_output_details()
        interpreter.resize_tensor_input(given["index"], crops.shape)
        interpreter.allocate_tensors()
        interpreter.set_tensor(given["index"], crops)
        interpreter.invoke()
        predicted: NDArray[np.float32] = interpreter.get_tensor(gives["index"])
        return predicted

    return predict


def _difference(model: Any, predict: Predict) -> float:
    rng = np.random.default_rng(0)
    strokes = rng.integers(0, 256, (CHECKED_CROPS, 10, 10, 1)).repeat(8, axis=1).repeat(8, axis=2)
    crops = np.clip(strokes + rng.normal(0, 20, strokes.shape), 0, 255).astype(np.float32)
    ours, theirs = np.asarray(model(crops, training=False)), predict(crops)
    difference = float(np.abs(ours - theirs).max()) if ours.shape == theirs.shape else 1.0
    if not difference <= MOST_DIFFERENCE:
        raise KuzushijiError(
            f"what is written must predict what the model does. Received: probabilities that differ by {difference:g}. "
            "Use model.keras itself, and tell the maintainers"
        )
    return difference
