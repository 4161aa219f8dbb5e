"""Metrics from predictions: metrics of a split, a table of its classes, the misclassified crops, the confusions."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import compress

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from job.data.staging import Crops
from preprocessing.classes import RARE
from preprocessing.labels.code_points import code_point_name, parse_code_point

# Parameters of `ece`, `at_99` and `errors_by_share`, see `SplitMetrics`.
BINS = 15
RIGHT = 0.99
SHARES = 20
MAX_PREDICTIONS = 60  # of a class in a list of confusions

RARE_SHOWN = "〓"  # geta mark: the printers' sign for a missing character


def shown(class_name: str) -> str:
    """Return the character of a class, for display."""
    return RARE_SHOWN if class_name == RARE else chr(parse_code_point(class_name))


@dataclass(frozen=True)
class SplitMetrics:
    """Metrics of a model on a split."""

    accuracy: float
    accuracy_without_rare: float | None
    """Over crops whose label is not `rare`; None if there are none."""
    top5: float
    """Fraction of crops whose label is among the 5 most probable classes."""
    macro_f1: float
    """Mean F1 of the classes that have a crop in the split.

    scikit-learn's `f1_score(average="macro")` also counts classes that were only predicted, each with F1 0. Here they
    don't count: a crop that was mistaken for such a class already lowers the recall of its own class, and the number
    of such classes depends on chance, that is, on which classes are in the split.
    """
    loss: float
    """Mean cross-entropy (negative log-likelihood)."""
    ece: float
    """Expected calibration error: mean absolute difference between probability and accuracy, over 15 bins of equally
    many crops of similar probability (arxiv.org/abs/1909.10155).
    """
    at_99: float
    """Largest share of the crops, the most certain ones first, of which 99 % are classified correctly."""
    errors_by_share: tuple[float, ...]
    """Error rate of the most certain 5 %, 10 % ... 100 % of the crops: risk and coverage (arxiv.org/abs/1705.08500)."""
    examples: int


def metrics(predictions: NDArray[np.float32], labels: NDArray[np.int64], class_names: Sequence[str]) -> SplitMetrics:
    """Compute the metrics of a split.

    predictions: (N, 4) float32, as `inference.predictions_of` returns. labels: (N,) int64. class_names: `rare` is last.
    """
    correct = predictions[:, 0] == labels
    not_rare = labels != len(class_names) - 1
    present = per_class(predictions, labels, class_names).query("examples > 0")
    ece, at_99, errors_by_share = _certainty(predictions[:, 1], correct)
    return SplitMetrics(
        accuracy=float(np.mean(correct)),
        accuracy_without_rare=float(np.mean(correct[not_rare])) if not_rare.any() else None,
        top5=float(np.mean(predictions[:, 2])),
        macro_f1=float(present["f1"].mean()),
        loss=float(np.mean(predictions[:, 3], dtype=np.float64)),
        ece=ece,
        at_99=at_99,
        errors_by_share=errors_by_share,
        examples=len(labels),
    )


def _certainty(
    probabilities: NDArray[np.float32], correct: NDArray[np.bool_]
) -> tuple[float, float, tuple[float, ...]]:
    """Return `ece`, `at_99` and `errors_by_share`.

    probabilities: (N,) of the predicted classes, N at least 1. correct: (N,).
    """
    # Crops of equal probability (often 1) have no order, so each counts as the mean of its group.
    values, group, size = np.unique(probabilities, return_inverse=True, return_counts=True)
    order = np.argsort(-group, kind="stable")
    right = (np.bincount(group, correct) / size)[group][order]
    sure = values[group][order].astype(np.float64)
    bins = [rows for rows in np.array_split(np.arange(len(order)), BINS) if len(rows)]
    gaps = [abs(sure[rows].mean() - right[rows].mean()) * len(rows) for rows in bins]
    accuracy = np.cumsum(right) / np.arange(1, len(order) + 1)
    enough = np.flatnonzero(accuracy >= RIGHT - 1e-9)  # sums of means are rounded
    ends = -(-len(order) * np.arange(1, SHARES + 1) // SHARES)  # rounded up
    at_99 = float((enough[-1] + 1) / len(order)) if len(enough) else 0.0
    return float(sum(gaps) / len(order)), at_99, tuple(np.round(1 - accuracy[ends - 1], 9).tolist())


def per_class(predictions: NDArray[np.float32], labels: NDArray[np.int64], class_names: Sequence[str]) -> pd.DataFrame:
    """Return one row per class: label, character, examples, predicted, correct, precision, recall, f1.

    `predicted` is the number of crops that were predicted as the class. Undefined ratios are 0.
    """
    classes = len(class_names)
    predicted = predictions[:, 0].astype(np.int64)
    examples = np.bincount(labels, minlength=classes)
    predicted_counts = np.bincount(predicted, minlength=classes)
    correct = np.bincount(labels[predicted == labels], minlength=classes)
    with np.errstate(divide="ignore", invalid="ignore"):
        precision, recall = correct / predicted_counts, correct / examples
        f1 = 2 * correct / (predicted_counts + examples)
    return pd.DataFrame(
        {
            "label": class_names,
            "character": [shown(name) for name in class_names],
            "examples": examples,
            "predicted": predicted_counts,
            "correct": correct,
            "precision": np.nan_to_num(precision),
            "recall": np.nan_to_num(recall),
            "f1": np.nan_to_num(f1),
        }
    )


def misclassified(predictions: NDArray[np.float32], crops: Crops, class_names: Sequence[str]) -> pd.DataFrame:
    """Return one row per misclassified crop: image_id, box, unicode, label, predicted, probability.

    `unicode` is the code point of the box, also if the label is `rare`. `probability` is that of the predicted class.
    """
    is_wrong = predictions[:, 0] != crops.labels
    wrong = np.flatnonzero(is_wrong)
    names = np.array(class_names)
    boxes = crops.boxes[wrong]
    return pd.DataFrame(
        {
            "image_id": list(compress(crops.page_ids(), is_wrong)),
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


def confusions(misclassified: pd.DataFrame, per_class: pd.DataFrame) -> list[str]:
    """Return the study's list of confusions, one line per class, most errors first.

    `王 (12): 玉 玉 玉 ヱ`: a character, its number of crops, and the prediction of each misclassified crop, up to 60.
    """
    examples = dict(zip(per_class["label"], per_class["examples"], strict=True))
    lines = []
    for label, group in misclassified.groupby("label", sort=False):
        counts = group["predicted"].value_counts(sort=False)
        order = sorted(counts.index, key=lambda name: (-counts[name], name))
        wrong = [shown(name) for name in order for _ in range(counts[name])]
        more = f" ... and {len(wrong) - MAX_PREDICTIONS:,} more" if len(wrong) > MAX_PREDICTIONS else ""
        predicted = f"{' '.join(wrong[:MAX_PREDICTIONS])}{more}"
        lines.append((len(group), str(label), f"{shown(str(label))} ({examples[label]}): {predicted}"))
    return [line for _, _, line in sorted(lines, key=lambda entry: (-entry[0], entry[1]))]
