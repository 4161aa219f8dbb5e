"""What a finished training says of itself: the texts of its model folder."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from job.config import TRANSFER, TrainConfig
from job.data.staging import StagedDataset
from job.metrics import metrics, misclassified, per_class
from job.model.folder import CONFIG_FILE, LABELS_FILE, METRICS_FILE, MODEL_FILE
from job.tables import optional
from preprocessing.config import SPLITS

if TYPE_CHECKING:
    import keras


@dataclass(frozen=True)
class EpochRow:
    """The numbers of one epoch: a line of `history.jsonl`."""

    epoch: int
    """From 1."""
    step: int
    """Steps done since the training began."""
    loss: float
    """Mean cross-entropy over the crops trained on, each before the update of its step."""
    accuracy: float
    val_loss: float
    val_accuracy: float
    learning_rate: float
    seconds: float
    """Of training, without validation."""
    crops_per_s: float
    data_wait: float
    """Fraction of `seconds` spent waiting for crops."""


def folder_texts(
    config: TrainConfig,
    run: str,
    model: "keras.Model",
    predictions: Mapping[str, NDArray[np.float32]],
    dataset: StagedDataset,
    history: Sequence[EpochRow],
    best_epoch: int,
) -> dict[str, str]:
    """All files of a model folder except the model: name to content.

    predictions: (N, 4) of each split, as `inference.predictions_of`.
    """
    names, test = dataset.class_names, dataset.splits["test"]
    recorded = config.model_dump()
    numbers: dict[str, Any] = {
        split: asdict(metrics(predictions[split], dataset.splits[split].labels, names)) for split in SPLITS
    }
    numbers |= {
        "parameters": model.count_params(),
        "classes": len(names),
        "best_epoch": best_epoch,
        "seconds": sum(row.seconds for row in history),
        "versions": {package: version(package) for package in ("kuzushiji", "keras", "ray", "tensorflow")},
    }
    return {
        LABELS_FILE: "".join(f"{name}\n" for name in names),
        CONFIG_FILE: json.dumps(recorded, indent=2) + "\n",
        METRICS_FILE: json.dumps(numbers, indent=2) + "\n",
        "history.jsonl": "".join(json.dumps(asdict(row)) + "\n" for row in history),
        "per_class.csv": per_class(predictions["test"], test.labels, names).to_csv(index=False),
        "misclassified.csv": misclassified(predictions["test"], test, names).to_csv(index=False),
        "README.md": model_card(recorded, numbers, run, dataset.manifest.config.get("split", "unknown")),
    }


def model_card(config: Mapping[str, Any], metrics: Mapping[str, Any], run: str, dataset: str) -> str:
    """README.md of a model folder, in Markdown."""
    header = "| split | crops | accuracy | without rare | top 5 | macro F1 | loss |\n|---|---|---|---|---|---|---|"
    rows = "\n".join(
        f"| {split} | {m['examples']:,} | {m['accuracy']:.4f} | {optional(m['accuracy_without_rare'])} "
        f"| {m['top5']:.4f} | {m['macro_f1']:.4f} | {m['loss']:.4f} |"
        for split, m in ((split, metrics[split]) for split in SPLITS)
    )
    return f"""# {config["architecture"]}, run {run}

A classifier of Kuzushiji characters: {metrics["parameters"]:,} parameters, {metrics["classes"]} classes
(`{LABELS_FILE}`, a line each).

{header}
{rows}

- Input: N x 80 x 80 x 1, uint8 or float, 0..255, cut as in `kuzushiji prepare`; scaling is inside.{_any_size(config)}
  Output: probabilities.
- Load it: `keras.saving.load_model("{MODEL_FILE}", compile=False)`, safe mode on, no package of ours needed.
- Trained with Adam, learning rate {config["learning_rate"]:g}, global batch {config["global_batch_size"]},
  epochs at most: {config["epochs"]}, seed {config["seed"]}, {config["precision"]},
  class weights: {config["class_weights"]}; the weights are those of epoch {metrics["best_epoch"]},
  the best in validation.{_base(config)}
- Split of the dataset: {dataset}. What `rare` holds is not told apart.
- The licence of the training data binds what is made from them: CC BY-SA 4.0 for Kaggle's *Kuzushiji Recognition*
pages.
"""


def _any_size(config: Mapping[str, Any]) -> str:
    return " Any height and width will do." if config["architecture"] == "fcn" else ""


def _base(config: Mapping[str, Any]) -> str:
    if config["architecture"] not in TRANSFER:
        return ""
    trained = {"last": "its last layers were trained", "all": "all its layers were trained"}[config["unfreeze"]]
    return f"\n- The base began with the weights: {config['weights']}; {trained}."
