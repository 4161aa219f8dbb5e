"""IIIF Curations, as KuroNet and CODH's viewer write them. A member is a box, with its character in `chars`.

    {"selections": [{"members": [
        {"@id": "https://example.org/canvas/100241706_00004_2#xywh=1231,3465,133,53",
         "metadata": [{"label": "Char", "value": [{"resource": {"chars": "は"}}]}]}, ...]}]}

The last part of a canvas's address is the page's id, unless a CSV with the columns `canvas,file` names the files.
"""

import re
from collections.abc import Iterator, Mapping
from typing import Any
from urllib.parse import unquote

from cluster.errors import InputError
from preprocessing.labels.code_points import UNKNOWN, character_if_any, parse_character
from preprocessing.labels.files import LabelFile, csv_rows
from preprocessing.labels.json_files import Fault, member, page_size, pixels
from preprocessing.labels.page_ids import id_of_file
from preprocessing.labels.table import Collected, PageBoxes

CANVASES_HEADER = ["canvas", "file"]
_XYWH = re.compile(r"xywh=(?:pixel:)?(-?[0-9]{1,9}(?:\.[0-9]{1,20})?(?:,-?[0-9]{1,9}(?:\.[0-9]{1,20})?){3})")


def is_curation(content: Any) -> bool:
    return isinstance(content, dict) and "selections" in content


class Curations:
    """Yields the pages of curations. Different canvases, also in different files, must be different pages."""

    def __init__(self, canvases: Mapping[str, str] | None, bare: bool) -> None:
        """canvases: address of a canvas to page id; None: its last part is the page id. bare: as in `read_labels`."""
        self.canvases, self.bare = canvases, bare
        self.page_of_canvas: dict[str, str] = {}
        self.canvas_of_page: dict[str, str] = {}

    def pages(self, content: Any, where: str) -> Iterator[PageBoxes]:
        """Yield the pages of a curation.

        Raises:
            InputError: the curation is malformed, or two canvases would be the same page.
        """
        found, sizes = Collected(), dict[str, tuple[int, int]]()
        try:
            for i, selection in enumerate(member(content, "selections", list, "the file")):
                for j, one in enumerate(member(selection, "members", list, f"selections[{i}]")):
                    at = f"selections[{i}].members[{j}]"
                    canvas, _, fragment = member(one, "@id", str, at).partition("#")
                    page_id = self._page_id(canvas, at)
                    match = _XYWH.fullmatch(fragment)
                    if not match:
                        raise Fault(at, "'@id' must be <canvas>#xywh=x,y,w,h in pixels", one["@id"])
                    box = pixels([float(number) for number in match[1].split(",")], at)
                    found.add(page_id, self._code_point(one, at), box)
                    size = page_size(one.get("width"), one.get("height"), at)
                    if size and sizes.setdefault(page_id, size) != size:
                        raise Fault(at, "all members of a canvas must state one size, as the first", size)
        except Fault as fault:
            raise InputError(f"{where}, {fault}. Fix the file. See docs/data.md#iiif-curations") from fault
        for page_id, table, widened in found.tables():
            yield PageBoxes(page_id, table, where, size=sizes.get(page_id), widened=widened)

    def _page_id(self, canvas: str, at: str) -> str:
        if canvas in self.page_of_canvas:
            return self.page_of_canvas[canvas]
        if self.canvases is None:
            try:
                page_id = id_of_file(unquote(canvas.rstrip("/").rpartition("/")[2]))
            except ValueError as error:
                raise Fault(
                    at, f"the canvas must end with a page's id ({error}), or --canvases must name it", canvas
                ) from error
        elif canvas in self.canvases:
            page_id = self.canvases[canvas]
        else:
            raise Fault(at, "each canvas must have a row in --canvases", canvas)
        other = self.canvas_of_page.setdefault(page_id, canvas)
        if other != canvas:
            rule = "canvases must end with different ids, or --canvases must name their files"
            raise Fault(at, f"{rule}; {page_id!r} also belongs to {other[:200]}", canvas)
        self.page_of_canvas[canvas] = page_id
        return page_id

    def _code_point(self, one: dict[str, Any], at: str) -> int:
        texts = {text.strip(" \r\n\t") for text in _chars(one.get("metadata"))} - {""}
        if len(texts) > 1:
            raise Fault(at, "must have one character in 'chars'", sorted(texts))
        if not texts and not self.bare:
            raise Fault(at, "must have its character in 'metadata[].value[].resource.chars'", one.get("metadata"))
        for text in texts:
            try:
                return character_if_any(text) if self.bare else parse_character(text)
            except ValueError as error:
                raise Fault(at, "'chars' must be a character or U+306F", text) from error
        return UNKNOWN


def _chars(metadata: Any) -> Iterator[str]:
    """Yield each `chars` of the annotations in a member's metadata."""
    for entry in metadata if isinstance(metadata, list) else []:
        value = entry.get("value") if isinstance(entry, dict) else None
        for annotation in value if isinstance(value, list) else [value]:
            resource = annotation.get("resource") if isinstance(annotation, dict) else None
            chars = resource.get("chars") if isinstance(resource, dict) else None
            if isinstance(chars, str):
                yield chars


def read_canvases(file: LabelFile) -> dict[str, str]:
    """Read a CSV with the columns `canvas,file`. Return address of a canvas to page id.

    Raises:
        InputError: the file does not have this form, or names a canvas twice.
    """
    canvases: dict[str, str] = {}
    with csv_rows(file.read(), file.where, "docs/data.md#iiif-curations") as reader:
        for number, row in enumerate(filter(None, reader)):
            if number == 0 and row != CANVASES_HEADER:
                raise ValueError(f"--canvases must begin with the header canvas,file. Received: {','.join(row)[:80]!r}")
            if len(row) != len(CANVASES_HEADER):
                raise ValueError(f"a row must have 2 columns. Received: {len(row)}")
            canvas = row[0].partition("#")[0]
            if canvas in canvases:
                raise ValueError(f"a canvas must have one row only. Received: {canvas[:200]!r} twice")
            if number:
                canvases[canvas] = id_of_file(row[1])
    return canvases
