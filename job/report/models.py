"""What trained models reached, and what they get wrong: `report.html`."""

import hashlib
import io
import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray
from upath import UPath

from cluster.errors import DamageError, InputError, OptionError, one_line
from cluster.manifest import read_manifest
from cluster.models import ModelManifest, read_latest
from cluster.storage import list_folders, read_bytes
from job.config import STUDY
from job.data.staging import Crops, StagedDataset, staged
from job.metrics import confusions, shown
from job.model.folder import METRICS_FILE, load_model
from job.model.load_tensorflow import load_tensorflow
from job.report import html as page
from job.report import plots
from preprocessing.config import SPLITS
from preprocessing.labels import book_of

if TYPE_CHECKING:
    import keras

SIDES = ("x", "y", "width", "height")  # of a box
# What is read of a model folder.
OF_SPLIT = ("examples", "accuracy", "accuracy_without_rare", "top5", "macro_f1", "loss")
OF_RUN = ("parameters", "seconds", "best_epoch")
CURVES = ("loss", "val_loss", "accuracy", "val_accuracy", "seconds", "crops_per_s", "data_wait")
PER_CLASS = {"label": str, "examples": np.int64, "recall": np.float64}
MISCLASSIFIED = dict.fromkeys(("image_id", "label", "predicted"), str) | dict.fromkeys(SIDES, np.int64)

MOST_LINES = 100  # of the list of what was taken for what
MOST_PAIRS = 24
MOST_CHANNELS = 24  # of a convolution
MOST_LAYERS = 4


@dataclass(frozen=True)
class Trained:
    """A run's own numbers."""

    architecture: str
    folder: UPath
    dataset_manifest_sha256: str
    metrics: dict[str, Any]
    history: pd.DataFrame
    per_class: pd.DataFrame
    misclassified: pd.DataFrame


def model_report(models: UPath, dataset: UPath | None = None) -> bytes:
    """The page of the latest runs. dataset: what they were trained on, to show crops and books; staged meanwhile.

    Raises:
        InputError: there is no model.
        OptionError: they were trained on another dataset.
        DamageError: a file is not what its manifest says.
    """
    runs = [_read(models, name) for name in _architectures(models)]
    title = f"Models: {models.name}"
    if dataset is None:
        return page.page(title, [*_compared(runs), *(part for run in runs for part in _of_run(run, None, None))])
    load_tensorflow()
    with staged(dataset, SPLITS) as data:
        for run in runs:
            if run.dataset_manifest_sha256 != data.manifest.sha256:
                raise OptionError(
                    f"--dataset must be what the models were trained on. Received: other than {run.folder}'s"
                )
        parts = (part for run in runs for part in _of_run(run, data, load_model(run.folder)[0]))
        return page.page(title, [*_compared(runs), *parts])


def run_report(folder: UPath, texts: Mapping[str, str], model: "keras.Model", data: StagedDataset) -> bytes:
    """The page of one run, by the worker that trained it. texts: what will stand in its folder."""
    run = _parsed(folder, data.manifest.sha256, lambda name: texts[name].encode())
    return page.page(f"{run.architecture}, run {folder.name}", _of_run(run, data, model))


def _architectures(models: UPath) -> list[str]:
    names = [name for name in list_folders(models) if not name.startswith(".") and read_latest(models / name)]
    if not names:
        raise InputError(f"--models must hold trained models. Received: {models}, with none")
    return sorted(names)


def _read(models: UPath, architecture: str) -> Trained:
    latest = read_latest(models / architecture)
    assert latest is not None
    folder = models / architecture / latest.run
    manifest = read_manifest(folder, ModelManifest)
    listed = {entry.name: entry.sha256 for entry in manifest.files}

    def content(name: str) -> bytes:
        data = read_bytes(folder / name)
        if hashlib.sha256(data).hexdigest() != listed.get(name):
            raise ValueError(f"{name}, whose SHA-256 is not the manifest's")
        return data

    return _parsed(folder, manifest.dataset_manifest_sha256, content)


def _parsed(folder: UPath, dataset_manifest_sha256: str, content: Callable[[str], bytes]) -> Trained:
    def table(name: str, kinds: dict[str, Any]) -> pd.DataFrame:
        read = pd.read_csv(io.BytesIO(content(name)), dtype=str, keep_default_na=False)
        return read[list(kinds)].astype(kinds)

    try:
        metrics = json.loads(content(METRICS_FILE))
        history = pd.DataFrame([json.loads(line) for line in content("history.jsonl").splitlines()])
        trained = Trained(
            folder.parent.name,
            folder,
            dataset_manifest_sha256,
            {split: {key: metrics[split][key] for key in OF_SPLIT} for split in SPLITS}
            | {key: float(metrics[key]) for key in OF_RUN},
            history[["epoch", *CURVES]].astype(float),
            table("per_class.csv", PER_CLASS),
            table("misclassified.csv", MISCLASSIFIED),
        )
        for label in {
            *trained.per_class["label"],
            *trained.misclassified["label"],
            *trained.misclassified["predicted"],
        }:
            shown(label)
        return trained
    except (FileNotFoundError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise DamageError(f"{folder} must be as it was sealed. Received: {one_line(error)}") from None


def _of_run(run: Trained, data: StagedDataset | None, model: Any) -> Iterator[str]:
    """model: with `data`, to show what it responds to."""
    yield page.section(f"{run.architecture}, run {run.folder.name}: what it reached", *_numbers(run))
    yield page.section(f"{run.architecture}: what it gets wrong", *_wrong(run, data))
    if data:
        yield page.section(f"{run.architecture}: what its convolutions respond to", *_responses(model, data))


def _compared(runs: list[Trained]) -> Iterator[str]:
    if len(runs) > 1:
        yield page.section("All architectures", *_side_by_side(runs))


def _side_by_side(runs: list[Trained]) -> Iterator[str]:
    histories = {run.architecture: run.history for run in runs}
    names, accuracies = list(histories), [run.metrics["test"]["accuracy"] for run in runs]
    yield page.plots(
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
    header = ["architecture", "test accuracy", "macro F1", "the study's", "its macro F1", "parameters", "minutes"]
    yield page.table(header, rows)
    yield page.paragraph("The study's figures are of a random split of Kaggle's 683,464 crops.", "quiet")


def _numbers(run: Trained) -> Iterator[str]:
    rows = [
        (split, *(float("nan") if (value := run.metrics[split][key]) is None else value for key in OF_SPLIT))
        for split in SPLITS
    ]
    yield page.table(["split", "crops", "accuracy", "without rare", "top 5", "macro F1", "loss"], rows)
    history = run.history
    yield page.plots(
        (plots.curves({"": history}, ["loss", "val_loss"], "loss"), "Loss in training and in validation (dashed)."),
        (plots.curves({"": history}, ["accuracy", "val_accuracy"], "accuracy"), "Accuracy, likewise."),
        (
            plots.accuracy_by_frequency(*_seen(run.per_class)),
            "Each class of the test: how many crops it has, and how many of them were recognised.",
        ),
    )
    yield page.paragraph(
        f"{history['crops_per_s'].median():,.0f} crops/s, {history['seconds'].median():,.1f} s an epoch; "
        f"at most {history['data_wait'].median():.1%} of a step waited for data. The weights are those of epoch "
        f"{run.metrics['best_epoch']:.0f}."
    )


def _seen(per_class: pd.DataFrame) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
    seen = per_class[per_class["examples"] > 0]
    return seen["examples"].to_numpy(np.int64), seen["recall"].to_numpy(np.float64)


def _wrong(run: Trained, data: StagedDataset | None) -> Iterator[str]:
    wrong = run.misclassified
    if data:
        yield from _books(wrong, data.splits["test"])
        yield page.paragraph("The worst confusions: a crop of the test, and one to train on of what it was taken for.")
        yield from _pairs(wrong, data)
    lines = confusions(wrong, run.per_class)
    yield page.paragraph("Character (its crops in the test): what they were taken for.")
    yield page.lines(lines[:MOST_LINES])
    if len(lines) > MOST_LINES:
        yield page.paragraph(f"... and {len(lines) - MOST_LINES:,} more: misclassified.csv lists each crop.")


def _books(wrong: pd.DataFrame, test: Crops) -> Iterator[str]:
    of_books = pd.Series([book_of(page_id) for page_id in test.page_ids]).value_counts()
    missed = wrong["image_id"].map(book_of).value_counts().reindex(of_books.index, fill_value=0)
    accuracy = (1 - missed / of_books).sort_values(kind="stable")
    caption = f"Accuracy of each book of the test; the lowest of {len(accuracy):,}."
    yield page.plots((plots.shares(list(accuracy.index), np.asarray(accuracy, np.float64), "recognised"), caption))


def _pairs(wrong: pd.DataFrame, data: StagedDataset) -> Iterator[str]:
    test, train = data.splits["test"], data.splits["train"]
    where = {
        (page_id, *box): i for i, (page_id, box) in enumerate(zip(test.page_ids, test.boxes.tolist(), strict=True))
    }
    index = {name: i for i, name in enumerate(data.class_names)}
    images, captions = [], []
    counts = wrong.groupby(["label", "predicted"], sort=True).size().sort_values(ascending=False, kind="stable")
    for label, predicted, count in counts.head(MOST_PAIRS).reset_index().itertuples(index=False, name=None):
        first = wrong[(wrong["label"] == label) & (wrong["predicted"] == predicted)].iloc[0]
        crop = where[first["image_id"], *(int(first[side]) for side in SIDES)]
        taken_for = np.flatnonzero(train.labels == index[predicted])
        pair = [test.images[crop][:, :, 0]]
        pair.append(train.images[taken_for[0]][:, :, 0] if len(taken_for) else np.zeros_like(pair[0]))
        images.append(np.hstack(pair))
        captions.append(f"{shown(label)} → {shown(predicted)} ({count})")
    yield page.crops(images, captions)


def _responses(model: Any, data: StagedDataset) -> Iterator[str]:
    """Of the first convolutions, to one crop of the test."""
    import keras

    crop = data.splits["test"].images[:1]
    yield page.crops([crop[0, :, :, 0]], [chr(int(data.splits["test"].code_points[0]))])
    layers = [layer for layer in model.layers if isinstance(layer, keras.layers.Conv2D)][:MOST_LAYERS]
    if not layers:
        return
    outputs = keras.Model(model.inputs[0], [layer.output for layer in layers])(crop, training=False)
    for layer, output in zip(layers, outputs if len(layers) > 1 else [outputs], strict=True):
        channels = np.moveaxis(np.asarray(output, np.float32)[0], -1, 0)[:MOST_CHANNELS]
        low, high = channels.min(axis=(1, 2), keepdims=True), channels.max(axis=(1, 2), keepdims=True)
        grey = (255 * (channels - low) / np.maximum(high - low, 1e-9)).astype(np.uint8)
        shape = f"{channels.shape[1]} x {channels.shape[2]}"
        yield page.paragraph(f"{layer.name}: {len(grey)} of {output.shape[-1]} filters, {shape}", "quiet")
        yield page.crops(list(grey), [""] * len(grey))
