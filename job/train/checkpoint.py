"""Checkpoints: what a training needs to resume, and how Ray Train saves and restores it.

A checkpoint is a folder with `state.json` and `arrays.npz`. The arrays hold each variable that training changes, once.
Weights of frozen layers are not saved: a resumed training loads them from the pretrained weights again. No pickle.
"""

import json
import tempfile
import zipfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any

import keras
import numpy as np
import ray.train
from numpy.typing import NDArray
from upath import UPath

from cluster.errors import DamageError, squeezed
from cluster.storage import list_folders, remove_folder

STATE_FILE = "state.json"
ARRAYS_FILE = "arrays.npz"


@dataclass(frozen=True)
class EpochRow:
    """Metrics of one epoch: a line of `history.jsonl`."""

    epoch: int
    """Counted from 1."""
    step: int
    """Finished steps since the start of the training."""
    loss: float
    """Mean cross-entropy over the training crops. That of a crop is computed before the update of its step."""
    accuracy: float
    val_loss: float
    """Without the temperature, see `temperature.py`."""
    val_accuracy: float
    learning_rate: float
    seconds: float
    """Seconds of training, without validation."""
    crops_per_s: float
    data_wait: float
    """Fraction of `seconds` spent waiting for crops."""


@dataclass
class State:
    """Progress of a training, without its weights."""

    epoch: int = 0
    """Finished epochs."""
    step: int = 0
    """Finished steps of the current epoch. `totals`, `sums`, `seconds` and `waited` cover these steps."""
    totals: list[float] = field(default_factory=lambda: [0.0, 0.0])
    """Sums of cross-entropy and of correct predictions over all workers, without those in `sums`."""
    sums: list[list[float]] = field(default_factory=list)
    """One row per worker: its sums since `totals` last changed. Set when a checkpoint is saved."""
    seconds: float = 0.0
    """Seconds of training."""
    waited: float = 0.0
    """Seconds of training spent waiting for crops."""
    best_epoch: int = 0
    """The epoch with the highest validation accuracy, the earliest on ties; 0 before the first one ends."""
    best_accuracy: float = -1.0
    history: list[EpochRow] = field(default_factory=list)

    @property
    def is_best(self) -> bool:
        """Whether the current weights are those of the best epoch."""
        return self.step == 0 and self.epoch == self.best_epoch

    def is_finished(self, epochs: int, patience: int | None) -> bool:
        """Return whether all epochs are done, or `patience` epochs have passed without a better validation accuracy."""
        since_best = self.epoch - self.best_epoch
        return self.epoch >= epochs or (patience is not None and since_best >= patience)

    def end_epoch(self, row: EpochRow) -> bool:
        """Add a finished epoch to the history. Return whether it is the best epoch so far."""
        self.epoch = row.epoch
        self.step, self.totals, self.sums, self.seconds, self.waited = 0, [0.0, 0.0], [], 0.0, 0.0
        self.history.append(row)
        improved = row.val_accuracy > self.best_accuracy
        if improved:
            self.best_epoch, self.best_accuracy = row.epoch, row.val_accuracy
        return improved

    def sums_of(self, rank: int, workers: int) -> list[float]:
        """Return the sums that a worker resumes with: an equal share of the total if the number of workers changed."""
        if len(self.sums) == workers:
            return self.sums[rank]
        return [sum(column) / workers for column in zip(*self.sums, strict=True)] or [0.0, 0.0]


def changing_variables(model: keras.Model) -> list[Any]:
    """Return the variables of all layers that are not frozen: weights and batch norm statistics."""
    return [variable for layer in model.layers if layer.trainable for variable in layer.variables]


def write_checkpoint(folder: Path, state: State, variables: Sequence[Any], best: Sequence[NDArray[Any]]) -> None:
    """Write a checkpoint into an existing folder.

    variables: the changing variables of the model, followed by those of the optimizer. best: values of the model's
    changing variables at the best epoch; not written if they are the current values.
    """
    # Variables are passed without a copy: NumPy copies them out of TensorFlow one at a time.
    arrays = {f"variable_{i}": variable for i, variable in enumerate(variables)}
    if not state.is_best:
        arrays |= {f"best_{i}": weights for i, weights in enumerate(best)}
    np.savez(folder / ARRAYS_FILE, allow_pickle=False, **arrays)
    (folder / STATE_FILE).write_text(json.dumps(asdict(state)))


def read_checkpoint(folder: Path, variables: Sequence[Any]) -> tuple[State, list[NDArray[Any]]]:
    """Assign the variables. Return the state and the best weights, which are empty if they are the current ones."""
    content = json.loads((folder / STATE_FILE).read_text())
    content["history"] = [EpochRow(**row) for row in content["history"]]
    state = State(**content)
    with open(folder / ARRAYS_FILE, "rb") as file, np.load(file, allow_pickle=False) as arrays:
        for i, variable in enumerate(variables):
            variable.assign(arrays[f"variable_{i}"])
        best = [arrays[f"best_{i}"] for i in range(sum(name.startswith("best_") for name in arrays.files))]
    return state, best


def restore_checkpoint(variables: Sequence[Any], checkpoints: UPath) -> tuple[State, list[NDArray[Any]]] | None:
    """Read the run's last checkpoint, as `read_checkpoint` does. Return None if Ray Train has none.

    checkpoints: the folder of all checkpoints, which the message of an error names.

    Raises:
        DamageError: it can't be read, for example because a power failure cut it off.
    """
    checkpoint = ray.train.get_checkpoint()
    if checkpoint is None:
        return None
    with checkpoint.as_directory() as folder:
        try:
            return read_checkpoint(Path(folder), variables)
        except (EOFError, KeyError, TypeError, ValueError, zipfile.BadZipFile) as error:
            last = checkpoints / PurePosixPath(checkpoint.path).name
            raise DamageError(
                f"the last checkpoint of a run must be readable. Received: {last}: {squeezed(error, 100)}. "
                f"Remove {checkpoints}: the run then begins at epoch 1"
            ) from error


def upload_checkpoint(
    row: dict[str, Any], state: State, variables: Sequence[Any], best: Sequence[NDArray[Any]], scratch: Path
) -> None:
    """Write a checkpoint into a new folder in `scratch`, and report it to Ray Train with a row of metrics."""
    wait_for_upload()
    folder = tempfile.mkdtemp(dir=scratch)
    try:
        write_checkpoint(Path(folder), state, variables, best)
    except OSError as error:  # the error of a full disk names no path
        raise OSError(error.errno, error.strerror, folder) from error
    ray.train.report(
        row,
        checkpoint=ray.train.Checkpoint.from_directory(folder),
        # Training continues during the upload. Ray removes the folder afterwards; if it can't, the folder is removed
        # together with `scratch`.
        checkpoint_upload_mode=ray.train.CheckpointUploadMode.ASYNC,
    )


def wait_for_upload() -> list[Any]:
    """Wait until the last checkpoint is uploaded, whichever rank saved it. Return all kept checkpoints.

    Uploads run one at a time: Ray would queue any number of them, and a lost worker would lose the whole queue.
    """
    kept: list[Any] = ray.train.get_all_reported_checkpoints(ray.train.CheckpointConsistencyMode.COMMITTED)
    return kept


def remove_unknown(folder: UPath) -> None:
    """Remove checkpoints that are not in Ray Train's list.

    These are incomplete uploads of a lost worker, and checkpoints that a lost controller did not remove. Only folders
    with Ray Train's own naming (`checkpoint_...`) are removed.
    """
    known = {PurePosixPath(reported.checkpoint.path).name for reported in wait_for_upload()}
    for name in list_folders(folder):
        if name.startswith("checkpoint_") and name not in known:
            remove_folder(folder / name)
