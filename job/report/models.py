"""The HTML report of trained models: metrics, learning curves, confusions, and responses of convolutions."""

import hashlib
import io
import json
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray
from upath import UPath

from cluster.errors import DamageError, OptionError, one_line
from cluster.manifest import read_manifest
from cluster.models import ModelManifest, latest_runs
from cluster.storage import read_bytes
from job.config import STUDY
from job.data.staging import StagedDataset, staged_shards
from job.metrics import confusions, shown
from job.model.folder import CONFIG_FILE, METRICS_FILE, load_model
from job.model.load_tensorflow import load_tensorflow
from job.report import html, pictures, plots
from preprocessing.config import SPLITS
from preprocessing.dataset import DatasetManifest

if TYPE_CHECKING:
    import keras

# The keys and columns that the report reads from a model folder.
SPLIT_METRICS = ("examples", "accuracy", "accuracy_without_rare", "top5", "macro_f1", "loss")
CERTAINTY = ("ece", "at_99")  # models of earlier releases lack them, and `errors_by_share`
RUN_METRICS = ("parameters", "seconds", "best_epoch")
CURVES = ("loss", "val_loss", "accuracy", "val_accuracy", "seconds", "crops_per_s", "data_wait")
PER_CLASS = {"label": str, "examples": np.int64, "recall": np.float64}
MISCLASSIFIED = dict.fromkeys(("image_id", "label", "predicted"), str) | dict.fromkeys(pictures.BOX_FIELDS, np.int64)

RISK_CAPTION = (
    "Errors among the most certain crops of the test split. In the table, at 99 %: the largest share of which 99 % are "
    "right. ECE: expected calibration error."
)
MAX_LINES = 100  # of the list of confusions


@dataclass(frozen=True)
class Trained:
    """The content of a model folder that the report shows."""

    architecture: str
    folder: UPath
    dataset_manifest_sha256: str
    augment: str
    metrics: dict[str, Any]
    errors_by_share: list[float]
    """Of the test split, see `SplitMetrics`; empty in models of earlier releases."""
    history: pd.DataFrame
    per_class: pd.DataFrame
    misclassified: pd.DataFrame


def model_report(models: UPath, dataset: UPath | None = None) -> bytes:
    """Return the report of the latest run of each architecture as HTML.

    dataset: the dataset of the trainings, to show crops, books and responses of convolutions. It is staged on this
    machine's disk during the call.

    Raises:
        InputError: there is no model, or the dataset can't be used.
        OptionError: a model was trained on another dataset.
        DamageError: a file does not match its manifest.
    """
    runs = [_read(models, name, run) for name, run in latest_runs(models).items()]
    title = f"Models: {models.name}"
    if dataset is None:
        sections = (section for run in runs for section in _run_sections(run, None, None))
        return html.page(title, [*_comparison(runs), *sections])
    manifest = read_manifest(dataset, DatasetManifest)
    for run in runs:
        if run.dataset_manifest_sha256 != manifest.sha256:
            raise OptionError(
                f"--dataset must be the one that the models were trained on. Received: {dataset}, which is not that "
                f"of {run.folder}"
            )
    load_tensorflow()
    with staged_shards(dataset, manifest, {split: manifest.shards_of(split) for split in SPLITS}) as data:
        sections = (section for run in runs for section in _run_sections(run, data, load_model(run.folder)[0]))
        return html.page(title, [*_comparison(runs), *sections])


def run_report(
    folder: UPath, texts: Mapping[str, str], model: "keras.Model", dataset_sha256: str, data: StagedDataset | None
) -> bytes:
    """Return the report of one run as HTML; the worker that trained it calls this.

    texts: name to content of the files in the model folder. dataset_sha256: of the dataset's manifest. data: the staged
    dataset of the training; None: the report has no pictures of crops.
    """
    run = _parse(folder, dataset_sha256, lambda name: texts[name].encode())
    return html.page(f"{run.architecture}, run {folder.name}", _run_sections(run, data, model))


def _read(models: UPath, architecture: str, run: str) -> Trained:
    """Read a run, and check each file that is used.

    Raises:
        DamageError: a file does not match the manifest, or does not have the expected content.
    """
    folder = models / architecture / run
    manifest = read_manifest(folder, ModelManifest)
    listed = {entry.name: entry.sha256 for entry in manifest.files}

    def content(name: str) -> bytes:
        data = read_bytes(folder / name)
        if hashlib.sha256(data).hexdigest() != listed.get(name):
            raise ValueError(f"{name}, whose SHA-256 is not the manifest's")
        return data

    return _parse(folder, manifest.dataset_manifest_sha256, content)


def _number(value: Any) -> float | None:
    """Return a finite number of `metrics.json`, or None, as it is. Raise ValueError or OverflowError for others."""
    if value is not None and not (isinstance(value, int | float) and math.isfinite(value)):
        raise ValueError(f"{str(value)[:40]!r} instead of a number in {METRICS_FILE}")
    return value


def _parse(folder: UPath, dataset_manifest_sha256: str, content: Callable[[str], bytes]) -> Trained:
    """Parse the files of a model folder. content: returns the bytes of a file, by its name.

    Raises:
        DamageError: a file does not have the expected content.
    """

    def table(name: str, dtypes: dict[str, Any]) -> pd.DataFrame:
        texts = pd.read_csv(io.BytesIO(content(name)), dtype=str, keep_default_na=False)
        return texts[list(dtypes)].astype(dtypes)

    try:
        config, metrics = json.loads(content(CONFIG_FILE)), json.loads(content(METRICS_FILE))
        history = pd.DataFrame([json.loads(line) for line in content("history.jsonl").splitlines()])
        trained = Trained(
            folder.parent.name,
            folder,
            dataset_manifest_sha256,
            str(config.get("augment", "none")),  # models of earlier releases do not have it
            {
                split: {key: _number(metrics[split][key]) for key in SPLIT_METRICS}
                | {key: _number(metrics[split].get(key)) for key in CERTAINTY}
                for split in SPLITS
            }
            | {key: _number(float(metrics[key])) for key in RUN_METRICS},
            [float(value) for value in metrics["test"].get("errors_by_share", [])],
            history[["epoch", *CURVES]].astype(float),
            table("per_class.csv", PER_CLASS),
            table("misclassified.csv", MISCLASSIFIED),
        )
        for label in {
            *trained.per_class["label"],
            *trained.misclassified["label"],
            *trained.misclassified["predicted"],
        }:
            shown(label)  # raises ValueError if it is not the name of a class
        if unknown := {*trained.misclassified["label"]} - {*trained.per_class["label"]}:
            raise ValueError(f"misclassified crops of {min(unknown)}, which per_class.csv lacks")
        return trained
    except (FileNotFoundError, ValueError, KeyError, TypeError, AttributeError, RecursionError, OverflowError) as error:
        raise DamageError(f"{folder} must not change after it was sealed. Received: {one_line(error)}") from error


def _run_sections(run: Trained, data: StagedDataset | None, model: Any) -> Iterator[str]:
    """Yield the sections of a run. model: used only with `data`."""
    yield html.section(f"{run.architecture}, run {run.folder.name}: metrics", *_metrics(run))
    yield html.section(f"{run.architecture}: errors", *_errors(run, data))
    if data:
        if run.augment != "none":
            yield html.section(f"{run.architecture}: augmented crops", *pictures.augmented_crops(data))
        yield html.section(f"{run.architecture}: responses of convolutions", *pictures.responses(model, data))


def _comparison(runs: list[Trained]) -> Iterator[str]:
    if len(runs) > 1:
        yield html.section("All architectures", *_comparison_parts(runs))


def _comparison_parts(runs: list[Trained]) -> Iterator[str]:
    histories = {run.architecture: run.history for run in runs}
    names, accuracies = list(histories), [run.metrics["test"]["accuracy"] for run in runs]
    yield html.plots(
        (plots.curves(histories, ["val_accuracy"], "accuracy"), "Validation accuracy."),
        (plots.curves(histories, ["val_loss"], "loss"), "Validation loss."),
        (
            plots.points(names, [run.metrics["parameters"] / 1e6 for run in runs], accuracies, "million parameters"),
            "Accuracy against size.",
        ),
        (
            plots.points(names, [run.metrics["seconds"] / 60 for run in runs], accuracies, "minutes of training"),
            "Accuracy against training time.",
        ),
    )
    rows = [
        (
            run.architecture,
            accuracy,
            run.metrics["test"]["macro_f1"],
            *STUDY.get(run.architecture, (float("nan"), float("nan"))),
            int(run.metrics["parameters"]),
            round(run.metrics["seconds"] / 60, 1),
        )
        for run, accuracy in zip(runs, accuracies, strict=True)
    ]
    header = [
        "architecture", "test accuracy", "macro F1", "study: accuracy", "study: macro F1", "parameters", "minutes",
    ]  # fmt: skip
    yield html.table(header, rows)
    yield html.paragraph("The study used a random split of Kaggle's 683,464 crops.", "quiet")


def _metrics(run: Trained) -> Iterator[str]:
    keys = (*SPLIT_METRICS, *CERTAINTY)
    rows = [
        (split, *(float("nan") if (value := run.metrics[split][key]) is None else value for key in keys))
        for split in SPLITS
    ]
    header = ["split", "crops", "accuracy", "without rare", "top 5", "macro F1", "loss", "ECE", "at 99 %"]
    yield html.table(header, rows)
    history = run.history
    yield html.plots(
        (
            plots.curves({"": history}, ["loss", "val_loss"], "loss"),
            "Loss: training, and validation (dashed), before the temperature.",
        ),
        (
            plots.curves({"": history}, ["accuracy", "val_accuracy"], "accuracy"),
            "Accuracy: training, and validation (dashed).",
        ),
        (
            plots.accuracy_by_frequency(*_examples_and_recall(run.per_class)),
            "Recall of each class over its number of crops in the test split.",
        ),
        *([(plots.risk(run.errors_by_share), RISK_CAPTION)] if run.errors_by_share else []),
    )
    yield html.paragraph(
        f"{history['crops_per_s'].median():,.0f} crops/s, {history['seconds'].median():,.1f} s per epoch, "
        f"at most {history['data_wait'].median():.1%} of it waiting for data (medians). The weights are those of epoch "
        f"{run.metrics['best_epoch']:.0f}."
    )


def _examples_and_recall(per_class: pd.DataFrame) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
    """Return the numbers of examples and the recalls of the classes that have examples."""
    present = per_class[per_class["examples"] > 0]
    return present["examples"].to_numpy(np.int64), present["recall"].to_numpy(np.float64)


def _errors(run: Trained, data: StagedDataset | None) -> Iterator[str]:
    misclassified = run.misclassified
    if data:
        yield from _books(misclassified, data)
        yield html.paragraph(
            "The most frequent confusions: a test crop, and a training crop of the class that was predicted for it."
        )
        yield from pictures.pairs(misclassified, data)
    lines = confusions(misclassified, run.per_class)
    yield html.paragraph("Character (number of its test crops): characters predicted by mistake.")
    yield html.lines(lines[:MAX_LINES])
    if len(lines) > MAX_LINES:
        yield html.paragraph(f"... and {len(lines) - MAX_LINES:,} more: misclassified.csv lists each crop.")


def _books(misclassified: pd.DataFrame, data: StagedDataset) -> Iterator[str]:
    """Plot the accuracy per book of the test split, in ascending order."""
    book_of_page = data.books()
    examples = pd.Series(list(data.splits["test"].page_ids())).map(book_of_page).value_counts()
    errors = misclassified["image_id"].map(book_of_page).value_counts().reindex(examples.index, fill_value=0)
    accuracy = (1 - errors / examples).sort_values(kind="stable")
    few = len(accuracy) <= plots.MAX_BARS
    caption = "Test accuracy per book." if few else f"Test accuracy per book: the lowest of {len(accuracy):,} books."
    yield html.plots((plots.shares(list(accuracy.index), np.asarray(accuracy, np.float64), "accuracy"), caption))
