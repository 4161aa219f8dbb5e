"""The class rule: characters that make up the first 90 % of all boxes keep their own class, the others are `rare`."""

from fractions import Fraction

import numpy as np
from numpy.typing import NDArray
from upath import UPath

from cluster.errors import InputError
from cluster.storage import is_file, read_bytes, size_of
from preprocessing.labels import code_point_name, parse_code_point

RARE = "rare"
MAX_CLASSES_BYTES = 10_000_000  # room for all of Unicode
LABELS_FILE = "label.labels.txt"  # the name that TFDS gives to the class names of a feature called `label`


def class_names(code_points: NDArray[np.int32], coverage: float) -> list[str]:
    """Names of the classes, by falling count, then ascending code point; `rare` is always the last.

    A character is kept while the share of all boxes up to and with it is at most `coverage` (the study's rule).
    """
    characters, counts = np.unique(code_points, return_counts=True)
    falling = np.lexsort((characters, -counts))
    # Fractions of the decimal that the user wrote: 0.9 itself is not a binary number.
    at_most = int(Fraction(str(coverage)) * len(code_points))
    kept = falling[np.cumsum(counts[falling]) <= at_most]
    return [code_point_name(int(c)) for c in characters[kept]] + [RARE]


def class_indices(names: list[str], code_points: NDArray[np.int32]) -> NDArray[np.int64]:
    """(N,) int64: the class of each character; what has no class of its own is `rare`."""
    index = {parse_code_point(name): i for i, name in enumerate(names[:-1])}
    characters, inverse = np.unique(code_points, return_inverse=True)
    rare = len(names) - 1
    return np.array([index.get(int(c), rare) for c in characters], np.int64)[inverse]


def parse_class_names(text: str, where: str) -> list[str]:
    """The classes of an earlier dataset from its `label.labels.txt`.

    Raises:
        InputError: not one code point a line with `rare` last, or one that stands there twice.
    """
    names = text.splitlines()
    if not names or names[-1] != RARE:
        raise InputError(f"{where} must end with the line {RARE!r}. Received: {''.join(names[-1:])[:40]!r}")
    try:
        for name in names[:-1]:
            parse_code_point(name)
    except ValueError as error:
        raise InputError(f"{where}: {error}") from None
    if len(set(names)) != len(names):
        raise InputError(f"{where} must hold each class once. Received: {len(names)} lines, {len(set(names))} classes")
    return names


def read_class_names(path: UPath, where: UPath | None = None) -> list[str]:
    """As `parse_class_names`, of a file; `where` it came from, if it is a copy.

    Raises:
        InputError: there is no such file, or it is no list of classes.
    """
    where = where or path
    if not is_file(path):
        raise InputError(f"a file of classes must be there. Received: {where}")
    if size_of(path) > MAX_CLASSES_BYTES:
        raise InputError(f"{where} must be at most {MAX_CLASSES_BYTES} bytes")
    try:
        text = read_bytes(path).decode()
    except UnicodeDecodeError as error:
        raise InputError(f"{where} must be UTF-8 text. Received: {error}") from None
    return parse_class_names(text, str(where))
