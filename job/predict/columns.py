"""Reading order of a page: columns from right to left, each from top to bottom."""

import numpy as np
from numpy.typing import NDArray

# A column's position is that of its last characters: columns lean, and a narrow character may be off the centre.
TAIL = 3


def columns(boxes: NDArray[np.int64]) -> list[list[int]]:
    """Group the boxes of a page into columns. Return the indices of the boxes, column by column.

    boxes: (n, 4) x, y, width, height.

    The boxes are processed from top to bottom. A box joins the column whose end overlaps it most horizontally, if the
    overlap is more than half of the narrower of the two; otherwise it starts a new column. Notes above a text become
    part of the text's columns, and so do two texts one above the other: boxes alone do not distinguish them.
    """
    left, width = boxes[:, 0], boxes[:, 2]
    right = left + width
    found: list[list[int]] = []
    ends = np.empty((0, 2), np.int64)  # left and right edge of each column's last characters
    for box in np.argsort(boxes[:, 1] * 2 + boxes[:, 3], kind="stable").tolist():
        overlap = np.minimum(ends[:, 1], right[box]) - np.maximum(ends[:, 0], left[box])
        share = overlap / np.maximum(1, np.minimum(ends[:, 1] - ends[:, 0], width[box]))
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
