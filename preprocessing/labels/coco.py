"""COCO's JSON: images, categories whose names are characters (`は` or `U+306F`), annotations with `bbox`.

    {"images": [{"id": 7, "file_name": "100241706_00004_2.jpg", "width": 2338, "height": 3806}, ...],
     "categories": [{"id": 1, "name": "は"}, ...],
     "annotations": [{"image_id": 7, "category_id": 1, "bbox": [1231, 3465, 133, 53]}, ...]}

A list of detections, `[{"image_id": 7, "category_id": 1, "bbox": [...], "score": 0.9}, ...]`, has neither `images` nor
`categories`. Its pages are named by a `file_name`, or by an `image_id` that is a string. If `image_id` is a number, a
file with the `images` must be given along with the list. Its `images` and `categories` are used, and its annotations
are ignored.
"""

import logging
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from cluster.errors import InputError
from preprocessing.labels.code_points import UNKNOWN, character_if_any, parse_character
from preprocessing.labels.json_files import Fault, member, page_size, pixels, shown
from preprocessing.labels.page_ids import id_of_file
from preprocessing.labels.table import NO_BOXES, Collected, PageBoxes

log = logging.getLogger("kuzushiji")


@dataclass
class Names:
    """Names of the pages and categories whose ids a file uses."""

    pages: dict[Any, str] = field(default_factory=dict)
    """Image id to page id."""
    sizes: dict[str, tuple[int, int]] = field(default_factory=dict)
    """Page id to width and height, for the pages whose size the file states."""
    categories: dict[Any, str] = field(default_factory=dict)
    """Category id to name."""
    code_points: dict[Any, int] = field(default_factory=dict)
    """Category id to code point, for the categories that were used so far."""

    def code_point(self, one: dict[str, Any], bare: bool, at: str) -> int:
        """Return the code point of an annotation. bare: as in `read_labels`."""
        category = one.get("category_id")
        if type(category) not in (int, str) or category not in self.categories:
            if bare:
                return UNKNOWN
            raise Fault(at, "'category_id' must be the id of a category", category)
        if category not in self.code_points:
            name = self.categories[category].strip(" \r\n\t") or self.categories[category]
            try:
                self.code_points[category] = character_if_any(name) if bare else parse_character(name)
            except ValueError as error:
                raise Fault(
                    at, f"the name of category {shown(category)} must be a character or U+306F", name
                ) from error
        return self.code_points[category]


class Coco:
    """Collects the contents of files in COCO's form."""

    def __init__(self, bare: bool) -> None:
        self.bare = bare
        self.annotated: list[PageBoxes] = []
        self.names: list[tuple[str, Names]] = []
        self.detections: list[tuple[str, list[Any]]] = []

    def add(self, content: Any, where: str) -> None:
        """Add the content of a file.

        Raises:
            InputError: the content is not in COCO's form.
        """
        if isinstance(content, list):
            self.detections.append((where, content))
            return
        try:
            names = _names_of(content)
            annotations = member(content, "annotations", list, "the file") if "annotations" in content else []
            found = Collected()
            for page_id in names.pages.values():
                found.add_page(page_id)
            for i, one in enumerate(annotations):
                at = f"annotations[{i}]"
                box = _box(one, at)
                image = one.get("image_id")
                if type(image) not in (int, str) or image not in names.pages:
                    raise Fault(at, "'image_id' must be the id of an image", image)
                found.add(names.pages[image], names.code_point(one, self.bare, at), box)
        except Fault as fault:
            raise InputError(f"{where}, {fault}. Fix the file. See docs/data.md#coco") from fault
        self.names.append((where, names))
        self.annotated += _pages(found, where, names)

    def pages(self) -> Iterator[PageBoxes]:
        """Yield the pages of all files.

        Raises:
            InputError: a list of detections can't be used.
        """
        if not self.detections:
            yield from self.annotated
            return
        if len(self.names) > 1:
            raise InputError(
                "a list of detections must be given with at most one file of images. Received: "
                f"{self.names[0][0]} and {self.names[1][0]}"
            )
        names = self.names[0][1] if self.names else Names()
        if unused := sum(len(page.table) for page in self.annotated):
            log.warning("%d annotations of %s are not used: the list has the boxes", unused, self.names[0][0])
        seen = set()
        for where, detections in self.detections:
            for page in _detected(detections, where, names, self.bare):
                seen.add(page.page_id)
                yield page
        yield from (page._replace(table=NO_BOXES, widened=0) for page in self.annotated if page.page_id not in seen)


def _names_of(content: Any) -> Names:
    names = Names()
    for i, image in enumerate(member(content, "images", list, "the file")):
        at = f"images[{i}]"
        key = _key(image, names.pages, at)
        name = member(image, "file_name", str, at)
        page_id = _page_id(name, at)
        names.pages[key] = page_id
        if size := page_size(image.get("width"), image.get("height"), at):
            names.sizes[page_id] = size
    listed = Counter(names.pages.values()).most_common(1)
    if listed and listed[0][1] > 1:
        raise Fault("images", "a file must be listed once", listed[0][0])
    for i, category in enumerate(member(content, "categories", list, "the file") if "categories" in content else []):
        at = f"categories[{i}]"
        names.categories[_key(category, names.categories, at)] = member(category, "name", str, at)
    return names


def _key(value: Any, earlier: dict[Any, str], at: str) -> int | str:
    key = value.get("id") if isinstance(value, dict) else None
    if not isinstance(key, int | str) or isinstance(key, bool) or key in earlier:
        raise Fault(at, "'id' must be a unique number or string", key)
    return key


def _box(one: Any, at: str) -> list[float]:
    if not isinstance(one, dict):
        raise Fault(at, "must be an object", one)
    return pixels(one.get("bbox"), f"{at}.bbox")


def _page_id(name: str, at: str) -> str:
    try:
        return id_of_file(name)
    except ValueError as error:
        raise Fault(at, f"its file must name a page: {error}", name) from error


def _detected(detections: list[Any], where: str, names: Names, bare: bool) -> Iterator[PageBoxes]:
    found, ids = Collected(), dict[str, str]()
    try:
        for i, one in enumerate(detections):
            at = f"[{i}]"
            box = _box(one, at)
            image = one.get("image_id")
            if type(image) in (int, str) and image in names.pages:
                page_id = names.pages[image]
            else:
                name = one.get("file_name", image)
                if not isinstance(name, str):
                    rule = (
                        "a detection must name its page: with a 'file_name', with an 'image_id' that is a string, or "
                        "by a COCO file whose 'images' have this 'image_id', given along with the list"
                    )
                    raise Fault(at, rule, name)
                if name not in ids:
                    ids[name] = _page_id(name, at)
                page_id = ids[name]
            found.add(page_id, names.code_point(one, bare, at), box)
    except Fault as fault:
        raise InputError(f"{where}, {fault}. Fix the file. See docs/data.md#coco") from fault
    yield from _pages(found, where, names)


def _pages(found: Collected, where: str, names: Names) -> Iterator[PageBoxes]:
    for page_id, table, widened in found.tables():
        yield PageBoxes(page_id, table, where, size=names.sizes.get(page_id), widened=widened)


def is_coco(content: Any) -> bool:
    """Return whether a JSON file is in COCO's form, or a list, which may be a list of detections."""
    return isinstance(content, list) or (
        isinstance(content, dict) and not {"images", "annotations"}.isdisjoint(content)
    )
