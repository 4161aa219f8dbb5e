"""Predictions for pages, made while their boxes are cut: tables, texts, and the counts for their accuracy."""

import itertools
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Self

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from job.metrics import RARE_SHOWN, shown
from job.predict.columns import columns
from preprocessing.classes import class_indices
from preprocessing.cutting import Cut
from preprocessing.dataset import Loss
from preprocessing.groups import Group
from preprocessing.labels.code_points import UNKNOWN, name_if_known

BATCH = 512
MOST_WAITING = 16  # pages whose boxes are cut, but not yet all predicted
TOP = 5
ALTERNATIVES = 2  # characters that a picture shows next to a 〓


@dataclass(frozen=True)
class Readings:
    """The predictions for N boxes of one or several pages. n of them were read, the others are losses.

    Attributes:
        cuts: N, without their crops.
        code_points: (N,) from the file of boxes.
        read: (n,) indices in `cuts` of the boxes that were read.
        top: (n, min(5, K)) most probable of the K classes, in descending order.
        probabilities: (n, min(5, K)) of these classes.
        class_names: K.
        page_columns: page id to columns in reading order; a column is a list of indices in `read`.
        min_confidence: minimum probability for a character to be shown in texts and pictures.
    """

    cuts: list[Cut]
    code_points: NDArray[np.int32]
    read: NDArray[np.int64]
    top: NDArray[np.int64]
    probabilities: NDArray[np.float32]
    class_names: list[str]
    page_columns: dict[str, list[list[int]]]
    min_confidence: float = 0.0

    @classmethod
    def joined(cls, parts: Sequence[Self]) -> Self:
        """Return the predictions for the boxes of all parts, at least one."""
        cuts_before = [0, *itertools.accumulate(len(part.cuts) for part in parts)]
        read_before = [0, *itertools.accumulate(len(part.read) for part in parts)]
        return cls(
            cuts=[cut for part in parts for cut in part.cuts],
            code_points=np.concatenate([part.code_points for part in parts]),
            read=np.concatenate([before + part.read for before, part in zip(cuts_before, parts, strict=False)]),
            top=np.concatenate([part.top for part in parts]),
            probabilities=np.concatenate([part.probabilities for part in parts]),
            class_names=parts[0].class_names,
            page_columns={
                page_id: [[before + i for i in column] for column in columns_of_page]
                for before, part in zip(read_before, parts, strict=False)
                for page_id, columns_of_page in part.page_columns.items()
            },
            min_confidence=parts[0].min_confidence,
        )

    def predictions(self) -> pd.DataFrame:
        """Return a table with a row per read box, in reading order: position, known character, predicted classes."""
        order = [i for columns_of_page in self.page_columns.values() for column in columns_of_page for i in column]
        positions = [
            (page_id, column, position)
            for page_id, columns_of_page in self.page_columns.items()
            for column, indices in enumerate(columns_of_page, 1)
            for position, _ in enumerate(indices, 1)
        ]
        boxes = np.array([self.cuts[self.read[i]].box for i in order], np.int64).reshape(-1, 4)
        known = [name_if_known(code) for code in self.code_points[self.read[order]].tolist()]
        table = pd.DataFrame(positions, columns=["image_id", "column", "position"])
        table = table.astype({"image_id": "string", "column": np.int64, "position": np.int64})
        table = table.assign(
            **dict(zip(("x", "y", "width", "height"), boxes.T, strict=True)), unicode=pd.array(known, dtype="string")
        )
        for rank in range(self.top.shape[1]):
            labels = [self.class_names[i] for i in self.top[order, rank].tolist()]
            table[f"character_{rank + 1}"] = pd.array([shown(label) for label in labels], dtype="string")
            table[f"label_{rank + 1}"] = pd.array(labels, dtype="string")
            table[f"probability_{rank + 1}"] = self.probabilities[order, rank]
        return table

    def texts(self, page_ids: Sequence[str]) -> pd.DataFrame:
        """Return a table with a row per page: its number of read boxes, and its text, one line per column."""
        rows = []
        for page_id in page_ids:
            lines = ["".join(self._best(i) for i in column) for column in self.page_columns.get(page_id, [])]
            rows.append((page_id, sum(map(len, lines)), "\n".join(lines)))
        return pd.DataFrame(rows, columns=["image_id", "characters", "text"])

    @property
    def uncertain(self) -> NDArray[np.bool_]:
        """(n,) True if the best character is too improbable to be shown."""
        return self.probabilities[:, 0] < self.min_confidence

    @property
    def is_rare(self) -> NDArray[np.bool_]:
        """(n,) True if the best class is `rare`."""
        is_rare: NDArray[np.bool_] = self.top[:, 0] == len(self.class_names) - 1
        return is_rare

    def for_picture(self, page_id: str) -> tuple[Any, ...]:
        """Return the arguments of `annotated` for a page: boxes on the scan, readings, probabilities, wrong.

        A character that is hidden because it is improbable may be wrong, too.
        """
        order = [i for column in self.page_columns[page_id] for i in column]
        boxes = np.array([self.cuts[self.read[i]].placed for i in order], np.int64)
        correct, known, _ = self._compared()
        return boxes, [self._readings(i) for i in order], self.probabilities[order, 0], (known & ~correct)[order]

    def _best(self, i: int) -> str:
        return RARE_SHOWN if self.uncertain[i] else shown(self.class_names[self.top[i, 0]])

    def _readings(self, i: int) -> list[str]:
        """Return the best character; if it is `rare`, the next best characters too; if it is too improbable to be
        shown, 〓 and the best characters.
        """
        best, *others = (shown(self.class_names[label]) for label in self.top[i].tolist())
        if self.uncertain[i]:
            return [RARE_SHOWN, *[character for character in (best, *others) if character != RARE_SHOWN][:ALTERNATIVES]]
        return [best, *others[:ALTERNATIVES]] if best == RARE_SHOWN else [best]

    def _compared(self) -> tuple[NDArray[np.bool_], NDArray[np.bool_], NDArray[np.int32]]:
        """Compare with the known characters. Return (n,) arrays: correct, known, label.

        Where the character is not known, label and `correct` have no meaning.
        """
        code_points = self.code_points[self.read]
        labels = class_indices(self.class_names, code_points)
        return self.top[:, 0] == labels, code_points != UNKNOWN, labels

    def correct(self) -> dict[str, int]:
        """Return the counts from which `accuracy` is computed."""
        correct, known, labels = self._compared()
        not_rare = known & (labels != len(self.class_names) - 1)
        has_character = ~self.uncertain & ~self.is_rare
        masks = {
            "examples": known,
            "correct": known & correct,
            "not_rare": not_rare,
            "correct_not_rare": not_rare & correct,
            "in_top": known & (self.top == labels[:, None]).any(axis=1),
            "shown": known & has_character,
            "correct_shown": known & correct & has_character,
        }
        return {name: int(np.count_nonzero(mask)) for name, mask in masks.items()}

    def losses(self) -> list[Loss]:
        """Return the boxes that could not be read, with their reasons."""
        return [
            {"box": cut.box, "page": cut.page_id, "unicode": name_if_known(code), "what": cut.fault}
            for cut, code in zip(self.cuts, self.code_points.tolist(), strict=True)
            if cut.fault
        ]


def accuracy(counts: Sequence[Mapping[str, int]]) -> dict[str, float | int | None]:
    """Compute the accuracy over boxes with known characters; empty if there are none.

    counts: of each group, at least one, as `Readings.correct` returns them.

    The keys of the result mean the same as in `SplitMetrics`; `accuracy_of_shown` is the accuracy over the boxes for
    which texts show a character and not 〓.
    """
    total = {key: sum(group[key] for group in counts) for key in counts[0]}
    examples, not_rare = total["examples"], total["not_rare"]
    if not examples:
        return {}
    return {
        "accuracy": total["correct"] / examples,
        "accuracy_without_rare": total["correct_not_rare"] / not_rare if not_rare else None,
        "top5": total["in_top"] / examples,
        "accuracy_of_shown": total["correct_shown"] / total["shown"] if total["shown"] else None,
        "examples": examples,
    }


def read_pages(
    group: Group, cuts: Iterator[Cut], inference: Any, class_names: list[str], min_confidence: float
) -> Iterator[tuple[str, Readings]]:
    """Yield the id and the readings of each page that has boxes, in the order of the group, while boxes are cut.

    The crops of all boxes may not fit into memory, so crops are predicted in batches, which may hold crops of several
    pages. A page waits until the batch with its last crop is predicted, and at most `MOST_WAITING` pages wait.

    cuts: of the boxes of the group. inference: `job.model.inference.Inference`.
    """
    predictions = _Predictions(inference, min(TOP, len(class_names)))
    waiting: deque[tuple[str, list[Cut], NDArray[np.int32]]] = deque()
    start = 0
    with_boxes = [page for page in group.pages if page.boxes]
    for page in with_boxes:
        of_page = []
        for cut in itertools.islice(cuts, page.boxes):
            of_page.append(replace(cut, crop=None))
            if cut.crop is not None:
                predictions.add(cut.crop)
        waiting.append((page.id, of_page, group.code_points[start : start + page.boxes]))
        start += page.boxes
        if len(waiting) == MOST_WAITING or page is with_boxes[-1]:
            predictions.predict()
        while waiting:
            page_id, of_page, code_points = waiting[0]
            read = np.flatnonzero([not cut.fault for cut in of_page])
            if (predicted := predictions.take(len(read))) is None:
                break
            waiting.popleft()
            boxes = np.array([of_page[i].box for i in read], np.int64)
            page_columns = {page_id: columns(boxes)} if len(read) else {}
            yield page_id, Readings(of_page, code_points, read, *predicted, class_names, page_columns, min_confidence)
    more = next(cuts, None)  # also lets `cut_boxes` end
    assert more is None, "one cut per box"


class _Predictions:
    """Crops that wait until their batch is predicted, and predictions that wait for the last crop of their page."""

    def __init__(self, inference: Any, width: int) -> None:
        """width: number of classes to predict for each crop."""
        self.inference = inference
        self.crops: list[NDArray[np.uint8]] = []
        self.top = np.empty((0, width), np.int64)
        self.probabilities = np.empty((0, width), np.float32)

    def add(self, crop: NDArray[np.uint8]) -> None:
        self.crops.append(crop)
        if len(self.crops) == BATCH:
            self.predict()

    def predict(self) -> None:
        """Predict the waiting crops."""
        if self.crops:
            top, probabilities = self.inference.top(np.stack(self.crops)[..., None], TOP)
            self.top = np.concatenate([self.top, top])
            self.probabilities = np.concatenate([self.probabilities, probabilities])
            self.crops = []

    def take(self, count: int) -> tuple[NDArray[np.int64], NDArray[np.float32]] | None:
        """Return classes and probabilities of the next `count` crops; None if they are not all predicted yet."""
        if len(self.top) < count:
            return None
        taken = self.top[:count], self.probabilities[:count]
        self.top, self.probabilities = self.top[count:], self.probabilities[count:]
        return taken
