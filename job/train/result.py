"""The result of a finished training: the text files of its model folder (metrics, tables, card), and its report."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

import keras
import pandas as pd
from upath import UPath

from cluster.places import place
from job.config import TrainConfig
from job.data.staging import StagedDataset
from job.metrics import per_class
from job.model.folder import CONFIG_FILE, LABELS_FILE, METRICS_FILE, write_model
from job.report.side_files import report_file, write_side_file
from job.train.card import model_card
from job.train.checkpoint import EpochRow, wait_for_upload
from job.train.rendezvous import gathered
from preprocessing.classes import labels_text
from preprocessing.config import SPLITS

if TYPE_CHECKING:
    from job.train.evaluation import Predicted
    from job.train.training import Training

SECONDS_FOR_CURVES = 30  # the longest wait of a finished training for its last curves


def write_result(training: "Training", predictions: Mapping[str, "Predicted"]) -> None:
    """Write and seal the model folder, then write its report next to it, on rank 0. All ranks call it.

    predictions: what `Training.predict_best` returned. If the report can't be written, this is logged; the training
    does not fail.

    Raises:
        DamageError: another training of the same name was faster.
    """
    # Before sealing, because a failed upload restarts the workers. On all ranks, because any may be the one that saved.
    wait_for_upload()
    job, dataset, reporter = training.job, training.dataset, training.reporter
    own = training.evaluation.own_misclassified("test", predictions["test"])
    # With one partition, all crops are worker 0's own.
    parts = [own] if job.config.partitions == 1 else gathered(job.board, job.config.architecture, own)
    if training.rank > 0:
        return
    reporter.show_activity("writing the model and its report")
    model = keras.Model.from_config(training.plain_config)
    model.set_weights(training.model.get_weights())
    state, misclassified = training.state, pd.concat(parts, ignore_index=True)
    texts = folder_texts(
        job.config, job.run, model, predictions, misclassified, dataset, state.history, state.best_epoch,
        training.temperature,
    )  # fmt: skip
    target = place(job.folder)
    write_model(target, model, texts, dataset.manifest.sha256)
    report = report_file(target)
    data = dataset if job.config.partitions == 1 else None  # only a part of the crops is staged on this worker
    if write_side_file(report, lambda: _report_of(target, texts, model, dataset.manifest.sha256, data), reporter.log):
        reporter.log(f"report: {report}")
    if training.curves_thread:
        training.curves_thread.join(timeout=SECONDS_FOR_CURVES)


def _report_of(
    folder: UPath, texts: dict[str, str], model: keras.Model, dataset_sha256: str, data: StagedDataset | None
) -> bytes:
    from job.report.models import run_report  # imports the plotting library: not before the first step

    return run_report(folder, texts, model, dataset_sha256, data)


def folder_texts(
    config: TrainConfig,
    run: str,
    model: keras.Model,
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
