"""Honest numbers from predictions: metrics of a split, a table of its classes, the list of what was taken for what."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from job.data.staging import Crops
from preprocessing.classes import RARE
from preprocessing.labels import code_point_name, parse_code_point

RARE_SHOWN = "〓"  # printers' sign for a character that is not in the case


def shown(class_name: str) -> str:
    """The character of a class, for people."""
    return RARE_SHOWN if class_name == RARE else chr(parse_code_point(class_name))


@dataclass(frozen=True)
class SplitMetrics:
    """How well a model predicts a split."""

    accuracy: float
    accuracy_without_rare: float | None
    """Over crops whose label is not `rare`; None if there are none."""
    top5: float
    """Fraction of crops whose label is among the 5 likeliest classes."""
    macro_f1: float
    """Mean F1 of the classes present in the split."""
    loss: float
    """Mean cross-entropy."""
    examples: int


def metrics(predictions: NDArray[np.float32], labels: NDArray[np.int64], class_names: Sequence[str]) -> SplitMetrics:
    """predictions: (N, 4), as `inference.predictions_of`. labels: (N,)."""
    correct = predictions[:, 0] == labels
    not_rare = labels != len(class_names) - 1
    present = per_class(predictions, labels, class_names).query("examples > 0")
    return SplitMetrics(
        accuracy=float(np.mean(correct)),
        accuracy_without_rare=float(np.mean(correct[not_rare])) if not_rare.any() else None,
        top5=float(np.mean(predictions[:, 2])),
        macro_f1=float(present["f1"].mean()),
        loss=float(np.mean(predictions[:, 3], dtype=np.float64)),
        examples=len(labels),
    )


def per_class(predictions: NDArray[np.float32], labels: NDArray[np.int64], class_names: Sequence[str]) -> pd.DataFrame:
    """One row a class: label, character, examples, predicted (how often it was), correct, precision, recall, f1."""
    classes = len(class_names)
    predicted = predictions[:, 0].astype(np.int64)
    examples = np.bincount(labels, minlength=classes)
    as_predicted = np.bincount(predicted, minlength=classes)
    correct = np.bincount(labels[predicted == labels], minlength=classes)
    with np.errstate(divide="ignore", invalid="ignore"):
        precision, recall = correct / as_predicted, correct / examples
        f1 = 2 * correct / (as_predicted + examples)
    return pd.DataFrame(
        {
            "label": class_names,
            "character": [shown(name) for name in class_names],
            "examples": examples,
            "predicted": as_predicted,
            "correct": correct,
            "precision": np.nan_to_num(precision),
            "recall": np.nan_to_num(recall),
            "f1": np.nan_to_num(f1),
        }
    )


def misclassified(predictions: NDArray[np.float32], crops: Crops, class_names: Sequence[str]) -> pd.DataFrame:
    """One row a crop that was taken for another class: page and box, its own code point, label, predicted,
    probability.
    """
    wrong = np.flatnonzero(predictions[:, 0] != crops.labels)
    names = np.array(class_names)
    boxes = crops.boxes[wrong]
    return pd.DataFrame(
        {
            "image_id": [crops.page_ids[i] for i in wrong],
            "x": boxes[:, 0],
            "y": boxes[:, 1],
            "width": boxes[:, 2],
            "height": boxes[:, 3],
            "unicode": [code_point_name(int(c)) for c in crops.code_points[wrong]],
            "label": names[crops.labels[wrong]],
            "predicted": names[predictions[wrong, 0].astype(np.int64)],
            "probability": predictions[wrong, 1],
        }
    )


def confusions(wrong: pd.DataFrame, table: pd.DataFrame) -> list[str]:
    """The study's list, most mistakes first: `王 (12): 玉 玉 玉 ヱ` is a character, its crops, what they were taken
    for.
    """
    examples = dict(zip(table["label"], table["examples"], strict=True))
    lines = []
    for label, group in wrong.groupby("label", sort=False):
        counts = group["predicted"].value_counts(sort=False)
        order = sorted(counts.index, key=lambda name: (-counts[name], name))
        taken_for = " ".join(shown(name) for name in order for _ in range(counts[name]))
        lines.append((len(group), str(label), f"{shown(str(label))} ({examples[label]}): {taken_for}"))
    return [line for _, _, line in sorted(lines, key=lambda entry: (-entry[0], entry[1]))]
