"""Reading order of a page: columns from right to left, each from top to bottom."""

import numpy as np
from numpy.typing import NDArray

# A column's position is that of its last characters: columns lean, and a narrow character may be off the centre.
TAIL = 3


def columns(boxes: NDArray[np.int64]) -> list[list[int]]:
    """Group the boxes of a page into columns. Return the indices of the boxes, column by column.

    boxes: (n, 4) x, y, width, height.

    The boxes are processed from top to bottom. A box joins a column whose end it overlaps horizontally by more than
    half of the narrower of the two; of several, the one whose end is most like it in place and width, so that a narrow
    note beside a column does not take over the text below. Without such a column it starts a new one. Notes above a
    text become part of the text's columns, and so do two texts one above the other: boxes alone do not distinguish
    them. A box as wide as two columns merges them.
    """
    left, width = boxes[:, 0], boxes[:, 2]
    right = left + width
    found: list[list[int]] = []
    ends = np.empty((0, 2), np.int64)  # left and right edge of each column's last characters
    for box in np.argsort(boxes[:, 1] * 2 + boxes[:, 3], kind="stable").tolist():
        overlap = np.minimum(ends[:, 1], right[box]) - np.maximum(ends[:, 0], left[box])
        of_end = ends[:, 1] - ends[:, 0]
        fits = overlap > 0.5 * np.minimum(of_end, width[box])
        likeness = np.where(fits, overlap / np.sqrt(np.maximum(1, of_end * width[box])), 0)
        column = int(np.argmax(likeness)) if len(found) else 0
        if not found or not fits[column]:
            column = len(found)
            found.append([])
            ends = np.concatenate([ends, np.zeros((1, 2), np.int64)])
        found[column].append(box)
        tail = found[column][-TAIL:]
        ends[column] = left[tail].min(), right[tail].max()
    middles = [float(np.mean(left[column] + width[column] / 2)) for column in found]
    return [found[i] for i in np.argsort(-np.array(middles), kind="stable")]
