"""What the driver of a run gives each of its workers, and what it gets back."""

from dataclasses import dataclass
from typing import Any

from cluster.errors import KuzushijiError
from job.config import TrainConfig
from job.model.pretrained import Weights


@dataclass(frozen=True)
class TrainJob:
    """Input of each worker of a run."""

    config: TrainConfig
    weights: Weights | None
    """The pretrained weights; None: random initialization."""
    dataset: str
    """Path or URL of the dataset folder."""
    dataset_manifest_sha256: str
    """SHA-256 of the manifest with which the run began."""
    folder: str
    """Path or URL of the model folder to write."""
    checkpoints: str
    """Path or URL of the folder with all checkpoints of the run."""
    curves: str
    """Path or URL of the folder with the curves for TensorBoard."""
    run: str
    """Name of the run."""
    board: Any
    """Handle of the actor `board.Board`."""


@dataclass(frozen=True)
class Failure:
    """A failure that ends all workers, because a restart would not fix it. (Ray Train would retry an exception.)"""

    message: str
    """One line for the user."""
    traceback: str
    """Shown with --debug."""
    kind: type[KuzushijiError] = KuzushijiError
    """What the command raises, which decides its exit code."""
