"""What was read on a group of pages: the tables that are written of it, and what its accuracy is computed from."""

import itertools
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
from preprocessing.labels import UNKNOWN, code_point_name

BATCH = 512
TOP = 5
ALTERNATIVES = 2  # that a picture has room for, beside a 〓


@dataclass(frozen=True)
class Readings:
    """A group that was read. N boxes, of which n were read and the others are lost.

    cuts: N, without their crops. code_points: (N,). found: (n,) the numbers of those that are not lost. top: (n, 5)
    classes, the best first. probabilities: (n, 5). names: of the classes. of_page: page id to the numbers, among the
    n, of its boxes, column by column.
    """

    cuts: list[Cut]
    code_points: NDArray[np.int32]
    found: NDArray[np.int64]
    top: NDArray[np.int64]
    probabilities: NDArray[np.float32]
    names: list[str]
    of_page: dict[str, list[list[int]]]

    @classmethod
    def of(cls, cuts: Iterator[Cut], inference: Any, names: list[str], code_points: NDArray[np.int32]) -> Self:
        """Predict in batches: a page may have more boxes than memory has room for crops."""
        seen, parts, waiting = [], [], []
        for cut in cuts:
            seen.append(replace(cut, crop=None))
            if cut.crop is not None:
                waiting.append(cut.crop)
            if len(waiting) == BATCH:
                parts.append(inference.top(np.stack(waiting)[..., None], TOP))
                waiting = []
        if waiting:
            parts.append(inference.top(np.stack(waiting)[..., None], TOP))
        width = min(TOP, len(names))
        top = np.concatenate([np.empty((0, width), np.int64), *(of_batch for of_batch, _ in parts)])
        probabilities = np.concatenate([np.empty((0, width), np.float32), *(of_batch for _, of_batch in parts)])
        found = np.flatnonzero([not cut.fault for cut in seen])
        of_page = {}
        for page_id, numbers in itertools.groupby(range(len(found)), key=lambda i: seen[found[i]].page_id):
            first, *others = numbers
            boxes = np.array([seen[found[i]].box for i in (first, *others)], np.int64)
            of_page[page_id] = [[first + i for i in column] for column in columns(boxes)]
        return cls(seen, code_points, found, top, probabilities, names, of_page)

    def predictions(self) -> pd.DataFrame:
        """A row a box, in the order of reading: where it is, what the file told of it, what it may be."""
        order = [i for of_page in self.of_page.values() for column in of_page for i in column]
        places = [
            (page_id, column, position)
            for page_id, of_page in self.of_page.items()
            for column, numbers in enumerate(of_page, 1)
            for position, _ in enumerate(numbers, 1)
        ]
        boxes = np.array([self.cuts[self.found[i]].box for i in order], np.int64).reshape(-1, 4)
        told = [_told(code) for code in self.code_points[self.found[order]].tolist()]
        table = pd.DataFrame(places, columns=["image_id", "column", "position"])
        table = table.astype({"image_id": "string", "column": np.int64, "position": np.int64})
        table = table.assign(
            **dict(zip(("x", "y", "width", "height"), boxes.T, strict=True)), unicode=pd.array(told, dtype="string")
        )
        for rank in range(self.top.shape[1]):
            labels = [self.names[i] for i in self.top[order, rank].tolist()]
            table[f"character_{rank + 1}"] = pd.array([shown(label) for label in labels], dtype="string")
            table[f"label_{rank + 1}"] = pd.array(labels, dtype="string")
            table[f"probability_{rank + 1}"] = self.probabilities[order, rank]
        return table

    def texts(self, page_ids: Sequence[str]) -> pd.DataFrame:
        """A row a page: its number of read boxes, and its text, a line a column."""
        rows = []
        for page_id in page_ids:
            lines = ["".join(self._best(i) for i in column) for column in self.of_page.get(page_id, [])]
            rows.append((page_id, sum(map(len, lines)), "\n".join(lines)))
        return pd.DataFrame(rows, columns=["image_id", "characters", "text"])

    def for_picture(self, page_id: str) -> tuple[Any, ...]:
        """Boxes, readings, probabilities and what is wrong, of a page."""
        order = [i for column in self.of_page[page_id] for i in column]
        boxes = np.array([self.cuts[self.found[i]].box for i in order], np.int64)
        right, known, _ = self._judged()
        return boxes, [self._readings(i) for i in order], self.probabilities[order, 0], (known & ~right)[order]

    def _best(self, i: int) -> str:
        return shown(self.names[self.top[i, 0]])

    def _readings(self, i: int) -> list[str]:
        """The best character; of a `rare` one, what it may be else."""
        best, *others = (shown(self.names[label]) for label in self.top[i].tolist())
        return [best, *others[:ALTERNATIVES]] if best == RARE_SHOWN else [best]

    def _judged(self) -> tuple[NDArray[np.bool_], NDArray[np.bool_], NDArray[np.int64]]:
        """(n,) each: is it right, is it known, its class."""
        told = self.code_points[self.found]
        labels = class_indices(self.names, told)
        return self.top[:, 0] == labels, told != UNKNOWN, labels

    def correct(self) -> dict[str, int]:
        """The counts from which `accuracy` is computed."""
        right, known, labels = self._judged()
        not_rare = known & (labels != len(self.names) - 1)
        counted = {
            "examples": known,
            "correct": known & right,
            "not_rare": not_rare,
            "correct_not_rare": not_rare & right,
            "in_top": known & (self.top == labels[:, None]).any(axis=1),
        }
        return {name: int(np.count_nonzero(which)) for name, which in counted.items()}

    def losses(self) -> list[Loss]:
        return [
            {"box": cut.box, "page": cut.page_id, "unicode": _told(code), "what": cut.fault}
            for cut, code in zip(self.cuts, self.code_points.tolist(), strict=True)
            if cut.fault
        ]


def accuracy(sums: Sequence[Mapping[str, int]]) -> dict[str, float | int | None]:
    """Over the boxes whose characters the file told, as `evaluation.metrics`; nothing where there are none."""
    total = {key: sum(one[key] for one in sums) for key in sums[0]}
    examples, not_rare = total["examples"], total["not_rare"]
    if not examples:
        return {}
    return {
        "accuracy": total["correct"] / examples,
        "accuracy_without_rare": total["correct_not_rare"] / not_rare if not_rare else None,
        "top5": total["in_top"] / examples,
        "examples": examples,
    }


def _told(code_point: int) -> str | None:
    return None if code_point == UNKNOWN else code_point_name(code_point)
