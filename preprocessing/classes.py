"""The classes of a dataset: one for each frequent character, and `rare` for all others."""

from collections.abc import Sequence
from fractions import Fraction

import numpy as np
from numpy.typing import NDArray
from upath import UPath

from cluster.errors import InputError
from cluster.storage import read_small
from preprocessing.labels.code_points import LARGEST, UNKNOWN, code_point_name, parse_code_point

RARE = "rare"
COUNTED_AT_ONCE = 1 << 20  # boxes
MAX_CLASSES_BYTES = 10_000_000  # room for all of Unicode
CLASSES_FILE = "label.labels.txt"  # TFDS expects the class names of a feature `label` in a file of this name


def class_names(code_points: NDArray[np.int32], coverage: float) -> list[str]:
    """Return the class names, by descending count, then ascending code point. `rare` is always the last name.

    As in the study, the most frequent characters get a class each as long as they make up at most `coverage` of all
    boxes together.

    Args:
        code_points: (N,) int32, the character of each box.
        coverage: fraction in 0..1.
    """
    characters, counts = _counts(code_points)
    by_frequency = np.lexsort((characters, -counts))
    # Exact arithmetic with the decimal number that the user wrote: a float cannot represent 0.9 exactly.
    max_boxes = int(Fraction(str(coverage)) * len(code_points))
    kept = by_frequency[np.cumsum(counts[by_frequency]) <= max_boxes]
    return [code_point_name(int(c)) for c in characters[kept]] + [RARE]


def class_indices(names: list[str], code_points: NDArray[np.int32]) -> NDArray[np.int32]:
    """Return the class index of each code point, (N,). Characters without a class of their own are `rare`."""
    of_code_point = np.full(LARGEST - UNKNOWN + 1, len(names) - 1, np.int32)
    for i, name in enumerate(names[:-1]):
        of_code_point[parse_code_point(name) - UNKNOWN] = i
    return of_code_point[code_points - UNKNOWN]


def _counts(code_points: NDArray[np.int32]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Return the characters, and how often each occurs. `np.unique` would take 20 bytes for each box."""
    counts = np.zeros(LARGEST - UNKNOWN + 1, np.int64)
    for begin in range(0, len(code_points), COUNTED_AT_ONCE):
        counts += np.bincount(code_points[begin : begin + COUNTED_AT_ONCE] - UNKNOWN, minlength=len(counts))
    characters = np.flatnonzero(counts)
    return characters + UNKNOWN, counts[characters]


def parse_class_names(text: str, where: str) -> list[str]:
    """Parse the text of a dataset's `label.labels.txt`. `where` names the file in error messages.

    Raises:
        InputError: a line is not a code point, a code point is repeated, or the last line is not `rare`.
    """
    names = text.splitlines()
    if not names or names[-1] != RARE:
        raise InputError(f"{where} must end with the line {RARE!r}. Received: {''.join(names[-1:])[:40]!r}")
    try:
        for name in names[:-1]:
            parse_code_point(name)
    except ValueError as error:
        raise InputError(f"{where}: {error}") from error
    if len(set(names)) != len(names):
        raise InputError(f"{where} must hold each class once. Received: {len(names)} lines, {len(set(names))} classes")
    return names


def labels_text(names: Sequence[str]) -> str:
    """Return the content of a file of class names."""
    return "".join(f"{name}\n" for name in names)


def read_class_names(path: UPath, where: UPath | None = None) -> list[str]:
    """Read and parse a `label.labels.txt`.

    Args:
        path: the file to read.
        where: the file to name in error messages, if `path` is a copy of it.

    Raises:
        InputError: the file does not exist, is too large, is not UTF-8 text, or is not a list of classes.
    """
    where = where or path
    content = read_small(path, MAX_CLASSES_BYTES)
    if content is None:
        raise InputError(f"a file of class names must exist. Received: {where}")
    if len(content) > MAX_CLASSES_BYTES:
        raise InputError(f"{where} must be at most {MAX_CLASSES_BYTES} bytes")
    try:
        text = content.decode()
    except UnicodeDecodeError as error:
        raise InputError(f"{where} must be UTF-8 text. Received: {error}") from error
    return parse_class_names(text, str(where))
