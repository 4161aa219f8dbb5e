"""What a training goes on from, and how it gets to Ray Train.

`state.json`, and `arrays.npz`, which holds what training changes, once.
Frozen layers are not in it: a training that goes on reads their weights where it began. No pickle.
"""

import json
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any

import keras
import numpy as np
import ray.train
from numpy.typing import NDArray
from upath import UPath

from cluster.storage import list_folders, remove_folder
from job.train.result import EpochRow

STATE_FILE = "state.json"
ARRAYS_FILE = "arrays.npz"


@dataclass
class State:
    """Where a training stands, besides its weights."""

    epoch: int = 0
    """Epochs done."""
    step: int = 0
    """Steps done of the next one; what follows is of these."""
    sums: list[list[float]] = field(default_factory=list)
    """A row a worker: its sums of cross-entropy and of correct predictions."""
    seconds: float = 0.0
    waited: float = 0.0
    best_epoch: int = 0
    best_accuracy: float = -1.0
    history: list[EpochRow] = field(default_factory=list)

    @property
    def is_best(self) -> bool:
        """Whether the weights are those of the best epoch."""
        return self.step == 0 and self.epoch == self.best_epoch

    def sums_of(self, rank: int, workers: int) -> list[float]:
        """What a worker goes on from; of a run of another number of workers, an equal share of all."""
        if len(self.sums) == workers:
            return self.sums[rank]
        return [sum(column) / workers for column in zip(*self.sums, strict=True)] or [0.0, 0.0]


def changing_variables(model: keras.Model) -> list[Any]:
    """Weights and batch norm statistics of the layers that are not frozen."""
    return [variable for layer in model.layers if layer.trainable for variable in layer.variables]


def write_checkpoint(folder: Path, state: State, variables: Sequence[Any], best: Sequence[NDArray[Any]]) -> None:
    """variables: the model's changing ones, then the optimizer's. best: the model's at its best epoch, left out where
    these are the variables.
    """
    # Variables go in as they are: NumPy copies one at a time out of TensorFlow.
    arrays = {f"variable_{i}": variable for i, variable in enumerate(variables)}
    if not state.is_best:
        arrays |= {f"best_{i}": weights for i, weights in enumerate(best)}
    np.savez(folder / ARRAYS_FILE, allow_pickle=False, **arrays)
    (folder / STATE_FILE).write_text(json.dumps(asdict(state)))


def read_checkpoint(folder: Path, variables: Sequence[Any]) -> tuple[State, list[NDArray[Any]]]:
    """Set the variables; returns the state, and the best weights, empty where they are the variables."""
    content = json.loads((folder / STATE_FILE).read_text())
    content["history"] = [EpochRow(**row) for row in content["history"]]
    state = State(**content)
    with np.load(folder / ARRAYS_FILE, allow_pickle=False) as arrays:
        for i, variable in enumerate(variables):
            variable.assign(arrays[f"variable_{i}"])
        best = [arrays[f"best_{i}"] for i in range(sum(name.startswith("best_") for name in arrays.files))]
    return state, best


def upload_checkpoint(
    row: dict[str, Any], state: State, variables: Sequence[Any], best: Sequence[NDArray[Any]], scratch: Path
) -> None:
    """Write a checkpoint into a folder within `scratch`, and hand it to Ray Train with a row of numbers."""
    wait_for_upload()
    folder = tempfile.mkdtemp(dir=scratch)
    try:
        write_checkpoint(Path(folder), state, variables, best)
    except OSError as error:  # that of a full disk names no place
        raise OSError(error.errno, error.strerror, folder) from error
    ray.train.report(
        row,
        checkpoint=ray.train.Checkpoint.from_directory(folder),
        # Training goes on meanwhile. Ray removes the folder after it; if it can't, it goes with `scratch`.
        checkpoint_upload_mode=ray.train.CheckpointUploadMode.ASYNC,
    )


def wait_for_upload() -> list[Any]:
    """For the last checkpoint, on the rank that uploads; returns all that Ray Train keeps. One at a time: Ray queues
    any number, of which a lost worker would lose all.
    """
    kept: list[Any] = ray.train.get_all_reported_checkpoints(ray.train.CheckpointConsistencyMode.COMMITTED)
    return kept


def remove_unknown(folder: UPath) -> None:
    """Remove what Ray Train does not keep, by its own form of name: what a lost worker had not wholly uploaded, or what
    should have been removed when the controller was lost.
    """
    known = {PurePosixPath(reported.checkpoint.path).name for reported in wait_for_upload()}
    for name in list_folders(folder):
        if name.startswith("checkpoint_") and name not in known:
            remove_folder(folder / name)
