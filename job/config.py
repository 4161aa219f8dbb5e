"""The one representation of a training: command line -> `TrainConfig` -> workers -> `config.json` beside the model."""

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, PositiveInt

ArchitectureName = Literal["baseline"]


class Recipe(BaseModel):
    """What the study trained an architecture with; the defaults of `train`."""

    model_config = ConfigDict(frozen=True)

    epochs: int
    global_batch_size: int
    learning_rate: float


# What each reached there, on Kaggle's 683,464 crops split at random (test accuracy, macro F1), with Adam on one GPU:
RECIPES: dict[ArchitectureName, Recipe] = {
    "baseline": Recipe(epochs=10, global_batch_size=512, learning_rate=1e-4),  # .95, .92; 80 s an epoch
}


class TrainConfig(BaseModel):
    """What decides the weights, besides the dataset. B is the global batch size, W the number of workers."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    architecture: ArchitectureName
    workers: PositiveInt = 1
    """W Ray Train workers, each a process that holds the whole model."""
    gpus_per_worker: int = Field(0, ge=0)
    cpus_per_worker: PositiveInt = 1
    """Threads of a worker too: bits depend on it."""
    epochs: PositiveInt
    global_batch_size: PositiveInt
    """Crops of a step over all workers: the result does not depend on W."""
    learning_rate: float = Field(gt=0, allow_inf_nan=False)
    seed: int = Field(42, ge=0, lt=2**31)
    patience: PositiveInt | None = None
    """Epochs without a better validation accuracy after which to stop; None: never."""
    dropout: bool = True
    """Off only to compare runs step by step."""
