"""The result of a finished training: the text files of its model folder (metrics, tables, card), and its report."""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

import pandas as pd
from upath import UPath

from cluster.places import place
from job.config import TrainConfig
from job.data.staging import StagedDataset
from job.metrics import per_class
from job.model.folder import CONFIG_FILE, LABELS_FILE, METRICS_FILE, write_model
from job.report.side_files import report_file, write_side_file
from job.train.card import model_card
from preprocessing.classes import labels_text
from preprocessing.config import SPLITS

if TYPE_CHECKING:
    import keras

    from job.train.evaluation import Predicted
    from job.train.job import TrainJob


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


def write_result(
    job: "TrainJob",
    model: "keras.Model",
    texts: dict[str, str],
    dataset: StagedDataset,
    log: Callable[[str], object],
) -> None:
    """Write and seal the model folder, then write its report next to it. texts: of `folder_texts`.

    If the report can't be written, this is logged; the training does not fail.
    """
    target = place(job.folder)
    write_model(target, model, texts, dataset.manifest.sha256)
    report = report_file(target)
    data = dataset if job.config.partitions == 1 else None  # only a part of the crops is staged on this worker
    if write_side_file(report, lambda: _report_of(target, texts, model, dataset.manifest.sha256, data), log):
        log(f"report: {report}")


def _report_of(
    folder: UPath, texts: dict[str, str], model: "keras.Model", dataset_sha256: str, data: StagedDataset | None
) -> bytes:
    from job.report.models import run_report  # imports the plotting library: not before the first step

    return run_report(folder, texts, model, dataset_sha256, data)


def folder_texts(
    config: TrainConfig,
    run: str,
    model: "keras.Model",
    predictions: Mapping[str, "Predicted"],
    misclassified: pd.DataFrame,
    dataset: StagedDataset,
    history: Sequence[EpochRow],
    best_epoch: int,
    temperature: float,
) -> dict[str, str]:
    """Return the text files of a model folder, name to content, except for the manifest.

    predictions: for each split. misclassified: of the test split, as `metrics.misclassified` returns it. temperature:
    already applied to the weights.
    """
    names, test = dataset.class_names, predictions["test"]
    recorded = config.model_dump() | {"margin": dataset.manifest.margin, "license": dataset.manifest.license}
    numbers: dict[str, Any] = {split: asdict(predictions[split].metrics(names)) for split in SPLITS}
    numbers |= {
        "parameters": model.count_params(),
        "classes": len(names),
        "best_epoch": best_epoch,
        "temperature": temperature,
        "seconds": sum(row.seconds for row in history),
        "versions": {package: version(package) for package in ("kuzushiji", "keras", "ray", "tensorflow")},
    }
    return {
        LABELS_FILE: labels_text(names),
        CONFIG_FILE: json.dumps(recorded, indent=2) + "\n",
        METRICS_FILE: json.dumps(numbers, indent=2) + "\n",
        "history.jsonl": "".join(json.dumps(asdict(row)) + "\n" for row in history),
        "per_class.csv": per_class(test.predictions, test.labels, names).to_csv(index=False),
        "misclassified.csv": misclassified.to_csv(index=False),
        "README.md": model_card(recorded, numbers, run, dataset.manifest),
    }
