"""`export`: convert a trained model for other programs, and check that it predicts the same."""

import logging
import math
import shutil
import signal
import tempfile
import threading
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray
from upath import UPath

from cluster.errors import KuzushijiError, OptionError
from cluster.places import is_local
from cluster.progress import progress, waiting
from cluster.storage import (
    TEMPORARY_PREFIX,
    check_writable,
    list_files,
    list_folders,
    new_file,
    remove_file,
    remove_folder,
    remove_temporaries,
    writing_in,
)
from job.data.staging import Crops
from job.evaluate import staged_for
from job.export.card import CARD_FILE, export_card
from job.model.folder import LABELS_FILE, load_model, read_trained_on
from job.model.load_tensorflow import without_chatter
from preprocessing.classes import labels_text

if TYPE_CHECKING:
    import keras

    from job.export.formats import Format, Predict, Quantize

log = logging.getLogger("kuzushiji")

WRITTEN_LAST = ("model.tflite", "model.onnx", "1/saved_model.pb")  # an export without it is incomplete
CHECKED_CROPS = 16
MAX_DIFFERENCE = 1e-4  # of a probability: other kernels add in another order
CALIBRATION_CROPS = 256
MAX_LOSS = 0.01  # of accuracy, without a warning


@dataclass(frozen=True)
class Accuracy:
    """Accuracies of the model and of the export on a split."""

    split: str
    crops: int
    of_model: float
    of_export: float
    same: float
    """Share of the crops for which both predict the same class."""


@dataclass(frozen=True)
class Export:
    """What an export wrote, and how it differs from the model."""

    files: dict[str, int]
    """File to its size in bytes."""
    largest_difference: float
    """The largest difference between the probabilities of the export and of the model that computes in float32, over
    synthetic crops.
    """
    accuracy: Accuracy | None


def export(
    model_place: UPath,
    form: "Format",
    out: UPath,
    quantize: "Quantize" = "none",
    dataset: UPath | None = None,
    split: str = "test",
) -> Export:
    """Write a model for other programs, with its `labels.txt` and a card, to a folder.

    The exported model takes N x 80 x 80 x 1 float32, 0..255, and returns N x K probabilities. It computes in float32,
    except for layers that are quantized to int8.

    Args:
        model_place: a model folder, or an architecture's folder for its latest run.
        form: `savedmodel`, `onnx` or `tflite`.
        out: new or empty folder.
        quantize: precision of a `tflite`, see `formats.save_tflite`.
        dataset: folder made by `prepare`, to measure accuracies; `int8` is calibrated on its validation split.
        split: split of the dataset for the accuracies.

    Raises:
        OptionError: `out` is not empty; `quantize` does not fit the other options; the classes or margins of the
            dataset and of the model differ.
        InputError, DamageError: the model or the dataset can't be used, or does not match its manifest.
        KuzushijiError: the export predicts differently, or `out` can't be written. No files are left in `out`.
    """
    _check_options(form, quantize, dataset)
    _check_out(out)
    model, names, folder = load_model(model_place)
    trained_on = read_trained_on(folder)
    with writing_in(Path(tempfile.gettempdir())), tempfile.TemporaryDirectory() as temporary:
        local = Path(temporary)
        from job.export.formats import in_float32  # imports TensorFlow, which `load_model` has set up

        wide = in_float32(model)
        if dataset is None:
            predict, accuracy = _convert(wide, names, form, quantize, local), None
        else:
            splits = sorted({split, "validation"} if quantize == "int8" else {split})
            with staged_for(folder, names, trained_on.margin, dataset, splits) as data:
                calibration = _some(data.splits["validation"]) if quantize == "int8" else None
                predict = _convert(wide, names, form, quantize, local, calibration)
                accuracy = _accuracy(model, predict, split, data.splits[split])
        difference = _difference(wide, predict, quantize)
        (local / LABELS_FILE).write_text(labels_text(names))
        card = export_card(folder, trained_on, form, quantize, accuracy, wide.input_shape, len(names))
        (local / CARD_FILE).write_text(card, encoding="utf-8")  # it names the model's folder
        sizes = {path.relative_to(local).as_posix(): path.stat().st_size for path in local.rglob("*") if path.is_file()}
        with _emptied_on_failure(out, sizes):
            for name in sorted(sizes, key=lambda name: (name in WRITTEN_LAST, name)):
                with new_file(out / name) as target:
                    shutil.copyfile(local / name, target)
    return Export(sizes, difference, accuracy)


def _check_options(form: "Format", quantize: "Quantize", dataset: UPath | None) -> None:
    if quantize != "none" and form != "tflite":
        raise OptionError(f"--quantize is for --format tflite. Received: --format {form}. Leave out --quantize")
    if quantize == "int8" and dataset is None:
        raise OptionError("--quantize int8 needs crops to calibrate on. Received: no --dataset. Name one")


def _check_out(out: UPath) -> None:
    """Check that an export can be written into a folder, before work starts. Remove the folder again if it is new.

    Raises:
        OptionError: it is not empty.
        KuzushijiError: it is read-only or not a folder.
    """
    names = [name for name in list_files(out) if not name.startswith(TEMPORARY_PREFIX)]  # left by killed exports
    if there := [*names, *list_folders(out)]:
        raise OptionError(f"--out must be a new or empty folder. Received: {out}, with {sorted(there)[0]}")
    new = is_local(out) and not Path(out.path).exists()
    check_writable(out)
    remove_temporaries(out)
    if new:
        with suppress(OSError):  # another process has written into it
            Path(out.path).rmdir()


@contextmanager
def _emptied_on_failure(out: UPath, files: Iterable[str]) -> Iterator[None]:
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


def _convert(
    model: "keras.Model",
    class_names: Sequence[str],
    form: "Format",
    quantize: "Quantize",
    folder: Path,
    calibration: NDArray[np.float32] | None = None,
) -> "Predict":
    """Write the model to a local folder, and return a function that predicts with it. Parameters: as in `formats`."""
    from job.export import formats

    log.info("converting the model to %s", form)
    with waiting(f"{form} ..."), without_chatter(), _interruptible():
        if form == "savedmodel":
            return formats.save_saved_model(model, class_names, folder)
        if form == "onnx":
            return formats.save_onnx(model, folder)
        return formats.save_tflite(model, folder, quantize, calibration)


@contextmanager
def _interruptible() -> Iterator[None]:
    """Raise KeyboardInterrupt at the end of the block if Ctrl-C was pressed during it: TensorFlow's converters lose it.

    In other threads than the main one, this does nothing: they can't handle signals.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    interrupted = threading.Event()

    def interrupt(*_: object) -> None:
        interrupted.set()
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGINT, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
        if interrupted.is_set():
            raise KeyboardInterrupt


def _some(crops: Crops) -> NDArray[np.float32]:
    """Return up to `CALIBRATION_CROPS` random crops of a split, the same ones each time."""
    count = min(CALIBRATION_CROPS, len(crops))
    rows = np.sort(np.random.default_rng(0).choice(len(crops), count, replace=False))
    return np.array(crops.images[rows], np.float32)


def _accuracy(model: "keras.Model", predict: "Predict", split: str, crops: Crops) -> Accuracy:
    from job.model.inference import Inference, crops_per_step

    with progress(f"{split} crops read by the model", len(crops), "crops") as advance:
        expected = Inference(model).predict(crops.images, crops.labels, advance)[:, 0]
    step, classes = crops_per_step(model), []
    with progress(f"{split} crops read by the export", len(crops), "crops") as advance:
        for start in range(0, len(crops), step):
            classes.append(predict(np.array(crops.images[start : start + step], np.float32)).argmax(axis=1))
            advance(len(classes[-1]))
    exported = np.concatenate(classes)
    of_model, of_export = (float(np.mean(predicted == crops.labels)) for predicted in (expected, exported))
    if of_export < of_model - MAX_LOSS:
        log.warning("the export lowers the accuracy on %s from %.4f to %.4f", split, of_model, of_export)
    return Accuracy(split, len(crops), of_model, of_export, float(np.mean(expected == exported)))


def _difference(model: "keras.Model", predict: "Predict", quantize: "Quantize") -> float:
    """Return the largest difference of a probability between model and export, over crops of noisy 8 x 8 px blocks.

    Raises:
        KuzushijiError: it is not a number, or exceeds `MAX_DIFFERENCE` although nothing is quantized.
    """
    rng = np.random.default_rng(0)
    blocks = rng.integers(0, 256, (CHECKED_CROPS, 10, 10, 1)).repeat(8, axis=1).repeat(8, axis=2)
    crops = np.clip(blocks + rng.normal(0, 20, blocks.shape), 0, 255).astype(np.float32)
    expected, exported = np.asarray(model(crops, training=False)["probabilities"]), predict(crops)
    difference = float(np.abs(expected - exported).max()) if expected.shape == exported.shape else math.nan
    if not difference <= (MAX_DIFFERENCE if quantize == "none" else 1):
        raise KuzushijiError(
            f"an export must predict the same as the model. Received: probabilities that differ by {difference:g}. "
            "Use model.keras itself, and report this to the maintainers"
        )
    return difference
