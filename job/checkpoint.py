"""What a training goes on from: `state.json`, and `arrays.npz`, which holds what training changes, once.

Frozen layers are not in it: a training that goes on reads their weights where it began. No pickle.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import keras
import numpy as np
from numpy.typing import NDArray

STATE_FILE = "state.json"
ARRAYS_FILE = "arrays.npz"


@dataclass
class State:
    """Where a training stands, besides its weights."""

    epoch: int = 0
    """Epochs done."""
    best_epoch: int = 0
    best_accuracy: float = -1.0
    history: list[dict[str, Any]] = field(default_factory=list)


def changing_variables(model: keras.Model) -> list[Any]:
    """Weights and batch norm statistics of the layers that are not frozen."""
    return [variable for layer in model.layers if layer.trainable for variable in layer.variables]


def write_checkpoint(folder: Path, state: State, variables: Sequence[Any], best: Sequence[NDArray[Any]]) -> None:
    """variables: the model's changing ones, then the optimizer's. best: the model's at its best epoch, left out where
    that is this epoch.
    """
    # Variables go in as they are: NumPy copies one at a time out of TensorFlow.
    arrays = {f"variable_{i}": variable for i, variable in enumerate(variables)}
    if state.best_epoch != state.epoch:
        arrays |= {f"best_{i}": weights for i, weights in enumerate(best)}
    np.savez(folder / ARRAYS_FILE, allow_pickle=False, **arrays)
    (folder / STATE_FILE).write_text(json.dumps(vars(state)))


def read_checkpoint(folder: Path, variables: Sequence[Any]) -> tuple[State, list[NDArray[Any]]]:
    """Set the variables; returns the state, and the best weights, empty where they are the variables."""
    state = State(**json.loads((folder / STATE_FILE).read_text()))
    with np.load(folder / ARRAYS_FILE, allow_pickle=False) as arrays:
        for i, variable in enumerate(variables):
            variable.assign(arrays[f"variable_{i}"])
        best = [arrays[f"best_{i}"] for i in range(sum(name.startswith("best_") for name in arrays.files))]
    return state, best
