"""In which order the characters of a page are read: columns from right to left, each from top to bottom."""

import numpy as np
from numpy.typing import NDArray

# How many of a column's last characters tell where it runs: columns lean, and a narrow character stands anywhere in it.
TAIL = 3


def columns(boxes: NDArray[np.int64]) -> list[list[int]]:
    """Numbers of the boxes (n, 4: x, y, width, height) of a page, column by column.

    From the top down, a box joins the column whose end it shares most of its width with, if that is more than half of
    it, or of the end's. Notes above a text, and two texts one above the other, are taken for one column each: the
    boxes alone do not tell.
    """
    left, width = boxes[:, 0], boxes[:, 2]
    right = left + width
    found: list[list[int]] = []
    ends = np.empty((0, 2), np.int64)  # left and right of each column's last characters
    for box in np.argsort(boxes[:, 1] * 2 + boxes[:, 3], kind="stable").tolist():
        shared = np.minimum(ends[:, 1], right[box]) - np.maximum(ends[:, 0], left[box])
        share = shared / np.maximum(1, np.minimum(ends[:, 1] - ends[:, 0], width[box]))
        column = int(np.argmax(share)) if len(found) else 0
        if not found or share[column] <= 0.5:
            column = len(found)
            found.append([])
            ends = np.concatenate([ends, np.zeros((1, 2), np.int64)])
        found[column].append(box)
        tail = found[column][-TAIL:]
        ends[column] = left[tail].min(), right[tail].max()
    middles = [float(np.mean(left[column] + width[column] / 2)) for column in found]
    return [found[i] for i in np.argsort(-np.array(middles), kind="stable")]
