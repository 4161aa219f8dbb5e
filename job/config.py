"""The one representation of a training: command line -> `TrainConfig` -> workers -> `config.json` beside the model."""

from collections.abc import Sequence
from typing import Any, Literal, get_args

from pydantic import BaseModel, ConfigDict, Field, PositiveInt, ValidationError

from cluster.errors import OptionError

ArchitectureName = Literal["baseline", "xception", "resnet152v2", "inceptionresnetv2", "fcn"]
NAMES: tuple[ArchitectureName, ...] = get_args(ArchitectureName)
ALL = "all"

# Those that have a base which ImageNet weights fit.
TRANSFER: tuple[ArchitectureName, ...] = ("xception", "resnet152v2", "inceptionresnetv2")


class Recipe(BaseModel):
    """What the study trained an architecture with; the defaults of `train`."""

    model_config = ConfigDict(frozen=True)

    epochs: int
    global_batch_size: int
    learning_rate: float


# What each reached there, on Kaggle's 683,464 crops split at random (test accuracy, macro F1), with Adam on one GPU:
RECIPES: dict[ArchitectureName, Recipe] = {
    "baseline": Recipe(epochs=10, global_batch_size=512, learning_rate=1e-4),  # .95, .92; 80 s an epoch
    "xception": Recipe(epochs=30, global_batch_size=512, learning_rate=1e-3),  # .90, .81
    "resnet152v2": Recipe(epochs=30, global_batch_size=512, learning_rate=1e-3),  # .85, .72
    "inceptionresnetv2": Recipe(epochs=30, global_batch_size=512, learning_rate=1e-3),  # did not converge
    "fcn": Recipe(epochs=40, global_batch_size=200, learning_rate=1e-3),  # .65, .38
}


# What may differ when a run is called again: the weights hang on none of these but, by rounding, on the first four.
MAY_DIFFER = {
    "workers",
    "gpus_per_worker",
    "cpus_per_worker",
    "deterministic",
    "checkpoint_every",
    "max_failures",
    "step_limit",
}


class TrainConfig(BaseModel):
    """A training of one architecture, besides the dataset. B is the global batch size, W the number of workers."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    architecture: ArchitectureName
    weights: str = Field("none", pattern=r"^(none|imagenet|sha256:[0-9a-f]{64})$")
    """What the base begins with; a file that was handed over is known by its hash."""
    unfreeze: Literal["last", "all"] = "all"
    """Which layers of the base are trained: the study's last few, or all."""
    workers: PositiveInt = 1
    """W Ray Train workers, each a process that holds the whole model."""
    gpus_per_worker: int = Field(0, ge=0)
    cpus_per_worker: PositiveInt = 1
    """Threads of a worker too: bits depend on it."""
    epochs: PositiveInt
    global_batch_size: PositiveInt
    """Crops of a step over all workers: the result does not depend on W."""
    learning_rate: float = Field(gt=0, allow_inf_nan=False)
    """Of Adam, as it is given: never scaled with B."""
    precision: Literal["float32", "mixed_bfloat16"] = "float32"
    """What layers compute in; weights, scaling and softmax are float32 in both."""
    deterministic: bool = True
    """Only kernels that give the same bits each time: on a GPU slower ones, and no XLA."""
    class_weights: Literal["none", "balanced"] = "none"
    """What a crop counts in the loss that is minimised: 1, or the less the more crops its class has."""
    seed: int = Field(42, ge=0, lt=2**31)
    patience: PositiveInt | None = None
    """Epochs without a better validation accuracy after which to stop; None: never."""
    dropout: bool = True
    """Off only to compare runs step by step."""
    checkpoint_every: PositiveInt | None = None
    """Steps from one checkpoint within an epoch to the next; each epoch's end has one besides. None: only there."""
    max_failures: int = Field(5, ge=0)
    """How often lost workers are replaced in one call; a host that is lost after it was drained does not count."""
    step_limit: PositiveInt = 600
    """Seconds after which a worker whose step has not ended does."""


def configs_of(
    architectures: Sequence[str], weights: str | None, unfreeze: str | None, **options: Any
) -> list[TrainConfig]:
    """One config for each architecture named (`all` names all), in order; what is None comes from its recipe.

    weights, unfreeze: for the architectures that have a base, and ignored for the others. deterministic: where it is
    None, on CPUs yes and on GPUs no.

    Raises:
        OptionError: an architecture is unknown, or options contradict one another.
    """
    if unknown := sorted(set(architectures) - {*NAMES, ALL}):
        raise OptionError(f"--architecture must be one of {', '.join(NAMES)}, {ALL}. Received: {unknown[0]!r}")
    names = [*NAMES] if ALL in architectures else [name for name in NAMES if name in architectures]
    transfer = [name for name in names if name in TRANSFER]
    if not transfer and (weights or unfreeze):
        option = "--weights" if weights else "--unfreeze"
        raise OptionError(f"{option} must come with one of {', '.join(TRANSFER)}. Received: {', '.join(names)}")
    if len(transfer) > 1 and weights not in (None, "imagenet", "none"):
        raise OptionError(f"--weights FILE must come with one architecture. Received: {', '.join(transfer)}")
    if weights == "none" and unfreeze == "last":
        raise OptionError(
            "--unfreeze last must come with weights. Received: --weights none, which trains the whole base"
        )
    base = {"weights": weights or "imagenet", "unfreeze": unfreeze or ("all" if weights == "none" else "last")}
    given = {"deterministic": not options.get("gpus_per_worker")}
    given |= {key: value for key, value in options.items() if value is not None}
    try:
        return [
            TrainConfig(
                **{"architecture": name, **RECIPES[name].model_dump(), **(base if name in TRANSFER else {}), **given}
            )
            for name in names
        ]
    except ValidationError as error:
        raise OptionError.of(error) from None
