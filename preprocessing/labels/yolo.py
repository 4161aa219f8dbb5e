"""YOLO's text files: one per page, named after the page, with one line per box. Numbers are fractions of the page.

    3 0.548760 0.917236 0.056886 0.013926        class, x and y of the centre, width, height; a sixth number is ignored

`classes.txt` (one character per line) or `data.yaml` (`names:`) lists the classes.
"""

import os
import re
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cluster.errors import InputError, squeezed
from preprocessing.labels.code_points import UNKNOWN, character_if_any, parse_character
from preprocessing.labels.files import LabelFile, open_text
from preprocessing.labels.json_files import shown
from preprocessing.labels.page_ids import parse_id
from preprocessing.labels.table import PageBoxes, check_page

CLASS_NAMES_FILES = ("classes.txt", "obj.names", "data.yaml", "data.yml")
MAX_CLASSES_BYTES = 1 << 20
LABELS_FOLDER = "labels"
LEAST, MOST = -1e-3, 1 + 1e-3  # limits of a fraction, with a tolerance for rounding
FIELDS = (5, 6)
_CLASS = re.compile(r"[0-9]{1,6}")
_SHARE = re.compile(r"-?(?:[0-9]{1,9}\.?[0-9]{0,30}|\.[0-9]{1,30})(?:[eE][+-]?[0-9]{1,3})?")

SizeOf = Callable[[str], tuple[int, int] | None]
"""Returns width and height of a page in pixels, by its id; None if the page has no readable file."""


def is_yolo_line(line: str) -> bool:
    """Return whether a line may be part of a YOLO file: a class and at least four numbers."""
    first, *numbers = line.split() or [""]
    return bool(_CLASS.fullmatch(first)) and len(numbers) >= 4 and all(map(_SHARE.fullmatch, numbers))


def read_yolo(
    files: Sequence[LabelFile], names: Sequence[LabelFile], bare: bool, size_of: SizeOf
) -> Iterator[PageBoxes]:
    """Yield the pages of YOLO files, with boxes in pixels.

    names: files with class names. bare, size_of: as in `read_labels`.

    Raises:
        InputError: a line or page has a fault, or class names are missing or contradict one another.
    """
    code_points = _code_points(names, bare)
    if not code_points and not bare:
        raise InputError(
            "YOLO labels must have their class names next to them, in classes.txt or data.yaml. Received: "
            f"{files[0].where} without them. See docs/data.md#yolo"
        )
    for file, page_id in zip(files, _page_ids(files), strict=True):
        classes, shares = _parse(file, page_id)
        size = size_of(page_id)
        boxes = _scaled(shares, *(size or (1, 1)))
        if size is None:  # the boxes become losses; one without an area would get another reason
            boxes[:] = 0, 0, 1, 1
        codes = np.array([_code_point(number, code_points, bare, file.where) for number in classes], np.int32)
        yield PageBoxes(page_id, np.column_stack([codes, boxes]), file.where)


def _page_ids(files: Sequence[LabelFile]) -> list[str]:
    """Return each file's page id: its name, or its path without `labels` if several files have this name."""
    stems = [os.path.splitext(file.base_name)[0] for file in files]
    count = Counter(stems)
    ids = []
    for stem, file in zip(stems, files, strict=True):
        folders = [part for part in file.name.split("/")[:-1] if part != LABELS_FOLDER]
        try:
            ids.append(parse_id(stem if count[stem] == 1 else "/".join([*folders, stem])))
        except ValueError as error:
            raise InputError(f"{file.where} must have the name of its page: {error}") from error
    return ids


def _parse(file: LabelFile, page_id: str) -> tuple[list[int], NDArray[np.float64]]:
    """Return n classes, and (n, 4) x and y of the centre, width, height as fractions of the page."""
    classes: list[int] = []
    shares: list[list[float]] = []
    for number, line in enumerate(open_text(file.read(), file.where), 1):
        if fields := line.split():
            values = [float(text) for text in fields[1:5]] if is_yolo_line(line) and len(fields) in FIELDS else []
            if not values or not all(LEAST <= value <= MOST for value in values):
                raise InputError(
                    f"{file.where}, line {number}: a box must be its class and four fractions of the page, from 0 to "
                    f"1. Received: {shown(line.strip())}. Fix that line. See docs/data.md#yolo"
                )
            classes.append(int(fields[0]))
            shares.append(values)
            check_page(page_id, len(classes))
    return classes, np.array(shares, np.float64).reshape(-1, 4)


def _scaled(shares: NDArray[np.float64], width: int, height: int) -> NDArray[np.int32]:
    """Return (n, 4) x, y, width, height, whose edges are the nearest whole pixels."""
    page = np.array([width, height])
    near = np.floor((shares[:, :2] - shares[:, 2:] / 2) * page + 0.5)
    far = np.floor((shares[:, :2] + shares[:, 2:] / 2) * page + 0.5)
    return np.concatenate([near, far - near], axis=1).astype(np.int32)


def _code_point(number: int, code_points: Sequence[int], bare: bool, where: str) -> int:
    if number < len(code_points):
        return code_points[number]
    if bare:
        return UNKNOWN
    raise InputError(f"{where}: a class must be one of the {len(code_points)} names. Received: {number}")


def _code_points(files: Sequence[LabelFile], bare: bool) -> list[int]:
    """Return the code point of each class; empty if there is no file with class names."""
    found: list[tuple[LabelFile, list[int]]] = []
    for file in files:
        codes = []
        for number, name in enumerate(_names_in(file)):
            try:
                codes.append(character_if_any(name) if bare else parse_character(name))
            except ValueError as error:
                raise InputError(f"{file.where}, class {number}: {error}. Rename it") from error
        found.append((file, codes))
    for file, codes in found:
        if codes != found[0][1]:
            raise InputError(
                f"the class names of YOLO labels must be the same everywhere. Received: {found[0][0].where} and "
                f"{file.where}. Give only files with the same class names"
            )
    return found[0][1] if found else []


def _names_in(file: LabelFile) -> list[str]:
    if file.size > MAX_CLASSES_BYTES:
        raise InputError(f"{file.where} must have at most {MAX_CLASSES_BYTES} bytes. Received: {file.size}")
    text = open_text(file.read(), file.where).read()
    if not file.base_name.lower().endswith((".yaml", ".yml")):
        return [line.strip(" \r\t") or line for line in text.rstrip("\r\n").split("\n")]
    content = _parse_yaml(text, file.where)
    names = content.get("names") if isinstance(content, dict) else None
    if isinstance(names, dict) and all(map(_CLASS.fullmatch, names)):
        numbered = {int(number): name for number, name in names.items()}
        if set(numbered) == set(range(len(names))):
            names = [numbered[number] for number in range(len(names))]
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise InputError(f"{file.where} must have `names`, a list of characters. Received: {shown(names)}")
    return names


def _parse_yaml(text: str, where: str) -> Any:
    """Return the lists, dicts and strings of a YAML file. Numbers and dates stay strings, and tags are ignored.

    Raises:
        InputError: the text is not YAML, or has an anchor or alias, with which a small file can expand to a huge value.
    """
    import yaml

    class Loader(yaml.BaseLoader):
        def compose_node(self, parent: yaml.Node | None, index: int) -> yaml.Node | None:
            if getattr(self.peek_event(), "anchor", None) is not None:  # type: ignore[no-untyped-call]
                raise ValueError("an anchor or alias")
            return super().compose_node(parent, index)

    try:
        return yaml.load(text, Loader)  # noqa: S506 - makes no objects but lists, dicts and texts
    except (yaml.YAMLError, ValueError, OverflowError, RecursionError) as error:
        raise InputError(f"{where} must be YAML. Received: {squeezed(error, 200)}") from error
