"""The config of a training, the same for the command line, the workers, and `config.json` in the model folder."""

from collections.abc import Sequence
from typing import Any, Literal, NamedTuple, get_args

from pydantic import BaseModel, ConfigDict, Field, PositiveInt, ValidationError

from cluster.errors import OptionError

ArchitectureName = Literal["resnet", "baseline", "xception", "resnet152v2", "inceptionresnetv2", "fcn"]
NAMES: tuple[ArchitectureName, ...] = get_args(ArchitectureName)
ALL = "all"

# Architectures with a pretrained base: ImageNet weights exist.
TRANSFER: tuple[ArchitectureName, ...] = ("xception", "resnet152v2", "inceptionresnetv2")


class Study(NamedTuple):
    """Results of the earlier study on Kaggle's 683,464 crops with a random split."""

    accuracy: float
    """On the test split."""
    macro_f1: float


class Recipe(BaseModel):
    """Settings of a training: the defaults of `train`. Those of the study's architectures are the study's own.

    The study trained with Adam on one GPU.
    """

    model_config = ConfigDict(frozen=True)

    epochs: int
    global_batch_size: int
    learning_rate: float
    schedule: Literal["constant", "cosine"] = "constant"
    augment: Literal["none", "standard"] = "none"
    weight_decay: float = 0.0
    label_smoothing: float = 0.0


RECIPES: dict[ArchitectureName, Recipe] = {
    "resnet": Recipe(
        epochs=12, global_batch_size=128, learning_rate=1e-2, schedule="cosine", augment="standard", weight_decay=0.01
    ),
    "baseline": Recipe(epochs=10, global_batch_size=512, learning_rate=1e-4),  # 80 s per epoch
    "xception": Recipe(epochs=30, global_batch_size=512, learning_rate=1e-3),
    "resnet152v2": Recipe(epochs=30, global_batch_size=512, learning_rate=1e-3),
    "inceptionresnetv2": Recipe(epochs=30, global_batch_size=512, learning_rate=1e-3),  # did not converge
    "fcn": Recipe(epochs=40, global_batch_size=200, learning_rate=1e-3),
}
STUDY: dict[str, Study] = {
    "baseline": Study(0.95, 0.92),
    "xception": Study(0.90, 0.81),
    "resnet152v2": Study(0.85, 0.72),
    "fcn": Study(0.65, 0.38),
}

# Options that may change when a run is resumed: they change the weights by rounding alone, or not at all.
MAY_DIFFER = {
    "workers", "gpus_per_worker", "cpus_per_worker", "deterministic", "checkpoint_every", "max_failures", "step_limit"
}  # fmt: skip


class TrainConfig(BaseModel):
    """Options of a training of one architecture. The docstring of a field is its `--help`.

    B is the global batch size, W the number of workers.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    architecture: ArchitectureName
    weights: str = Field("none", pattern=r"^(none|imagenet|(sha256|model):[0-9a-f]{64})$")  # files have their hash
    """imagenet, none, FILE, or a model folder.  [default: from the architecture]"""
    unfreeze: Literal["last", "all"] = "all"
    """Layers of the base to train.  [default: last; all with --weights none]"""
    workers: PositiveInt = 1
    """Data-parallel workers, spread over the hosts."""
    gpus_per_worker: int = Field(0, ge=0)
    """GPUs of each worker; each holds a model replica."""
    cpus_per_worker: PositiveInt = 1
    """CPUs and threads of a worker.  [default: equal share; on a cluster 1]"""
    epochs: PositiveInt
    """Passes over the crops, in whole batches.  [default: from the recipe]"""
    global_batch_size: PositiveInt
    """Crops per step over all workers.  [default: from the recipe]"""
    partitions: PositiveInt = 1
    """Parts of the dataset; a worker fetches those that it needs."""
    learning_rate: float = Field(gt=0, allow_inf_nan=False)
    """Learning rate of Adam, never scaled.  [default: from the recipe]"""
    schedule: Literal["constant", "cosine"] = "constant"
    """cosine: 5 % warm-up, then down to 0.  [default: from the recipe]"""
    augment: Literal["none", "standard"] = "none"
    """standard: distort each crop a little.  [default: from the recipe]"""
    weight_decay: float = Field(0.0, ge=0, lt=1)
    """Weight decay of AdamW; 0: Adam.  [default: from the recipe]"""
    label_smoothing: float = Field(0.0, ge=0, le=0.05)
    """Share of the label spread over the classes.  [default: from the recipe]"""
    precision: Literal["float32", "mixed_bfloat16"] = "float32"
    """Precision of layers: float32 or mixed_bfloat16."""
    deterministic: bool = True
    """Bit-identical results, or faster kernels.  [default: --fast on GPUs]"""
    sampling: Literal["uniform", "balanced"] = "uniform"
    """balanced: draw each class equally often."""
    seed: int = Field(42, ge=0, lt=2**31)
    """Random seed of weights, order, dropout and augmentation."""
    patience: PositiveInt | None = None
    """Stop after this many epochs without improvement.  [default: never]"""
    dropout: bool = True
    """Off only in tests that compare runs step by step."""
    checkpoint_every: PositiveInt | None = None
    """Save a checkpoint within epochs too.  [default: at the end of each]"""
    max_failures: int = Field(5, ge=0)
    """Restarts allowed after a worker failure."""
    step_limit: PositiveInt = 600
    """Longest time of a step; after it, all workers restart."""


def configs_of(
    architectures: Sequence[str], weights: str | None, unfreeze: str | None, **options: Any
) -> list[TrainConfig]:
    """Return one config per architecture (`all`: all of them), in the order of `NAMES`.

    An option that is None gets its default, from the recipe of the architecture if it has one; the default of
    `deterministic` is True on CPUs and False on GPUs. weights: `imagenet`, `none`, or `Weights.identity`. Those of a
    base, and unfreeze, are ignored for architectures without a base.

    Raises:
        OptionError: an architecture is unknown, an option is invalid, or options contradict each other.
    """
    if unknown := sorted(set(architectures) - {*NAMES, ALL}):
        raise OptionError(f"--architecture must be one of {', '.join(NAMES)}, {ALL}. Received: {unknown[0]!r}")
    names = [*NAMES] if ALL in architectures else [name for name in NAMES if name in architectures]
    transfer = [name for name in names if name in TRANSFER]
    from_model = (weights or "").startswith("model:")
    if from_model and len(names) > 1:
        raise OptionError(f"--weights MODEL must come with one architecture. Received: {', '.join(names)}")
    if not transfer and (unfreeze or (weights and not from_model)):
        option = "--unfreeze" if unfreeze else "--weights"
        model = ", or be a model folder" if option == "--weights" else ""
        raise OptionError(f"{option} must come with one of {', '.join(TRANSFER)}{model}. Received: {', '.join(names)}")
    if len(transfer) > 1 and weights not in (None, "imagenet", "none"):
        raise OptionError(f"--weights FILE must come with one architecture. Received: {', '.join(transfer)}")
    if weights == "none" and unfreeze == "last":
        raise OptionError(
            "--unfreeze last must come with weights. Received: --weights none, which trains the whole base"
        )
    base = {"weights": weights or "imagenet", "unfreeze": unfreeze or ("all" if weights == "none" else "last")}
    model_weights = {"weights": weights} if from_model else {}
    values: dict[str, Any] = {"deterministic": not options.get("gpus_per_worker")}
    values |= {key: value for key, value in options.items() if value is not None}
    try:
        return [
            TrainConfig(
                **{
                    "architecture": name,
                    **RECIPES[name].model_dump(),
                    **(base if name in TRANSFER else model_weights),
                    **values,
                }
            )
            for name in names
        ]
    except ValidationError as error:
        raise OptionError.of(error) from error
