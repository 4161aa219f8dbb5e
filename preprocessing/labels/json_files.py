"""JSON files of labels: parsing within limits of size and depth, and checks of their values."""

import reprlib
from typing import Any

from pydantic_core import from_json

from cluster.errors import InputError
from preprocessing.labels.files import LabelFile
from preprocessing.labels.table import MAX_PIXELS

# CODH's 1,086,326 characters in COCO's form have up to 14 million values. A Python object takes up to 170 bytes, so no
# file takes more than 4 GB of memory.
MAX_VALUES = 16_000_000
SHOWN = 60  # characters of a value in an error message
# Stops at these limits, however large a value is. The built-in `repr` would format all of it, to be cut afterwards.
_SHORT = reprlib.Repr()
_SHORT.maxlevel, _SHORT.maxlist, _SHORT.maxdict, _SHORT.maxstring = 4, 8, 8, SHOWN


def parse_json(file: LabelFile) -> Any:
    """Return the content of a JSON file of labels.

    Raises:
        InputError: the file is not JSON in UTF-8 or UTF-16, has more than `MAX_VALUES` values, or is nested 200 levels
            deep.
    """
    data = file.read()
    # In JSON, each element and each member follows one of these: an upper bound on their number, without parsing.
    if (values := sum(data.count(mark) for mark in (b"{", b"[", b","))) > MAX_VALUES:
        raise InputError(
            f"{file.where} must hold at most {MAX_VALUES} values. Received: about {values}. Split it into several files"
        )
    try:
        if data[:2] in (b"\xff\xfe", b"\xfe\xff"):
            data = data.decode("utf-16").encode()
        return from_json(data.removeprefix(b"\xef\xbb\xbf"), allow_inf_nan=False)
    except ValueError as error:
        raise InputError(f"{file.where} must be JSON. Received: {str(error)[:200]}") from error


class Fault(Exception):  # noqa: N818 - becomes an InputError that names the file
    """An invalid value: its place in the file, the rule that it breaks, and the value."""

    def __init__(self, at: str, rule: str, received: Any) -> None:
        super().__init__(f"{at}: {rule}. Received: {shown(received)}")


def shown(value: Any) -> str:
    """Format a value for an error message: on one line, and short."""
    if isinstance(value, str):
        begin = value[: SHOWN + 1]
        text = repr(begin) if begin.isprintable() else ascii(begin)
    else:
        text = _SHORT.repr(value)
    return text if len(text) <= SHOWN else f"{text[:SHOWN]}..."


_KINDS: dict[Any, str] = {list: "a list", str: "a string", dict: "an object"}


def member(value: Any, key: str, kind: type, at: str) -> Any:
    """Return a member of an object. It must exist and have the type `kind`.

    Raises:
        Fault: the member is missing or has another type.
    """
    found = value.get(key) if isinstance(value, dict) else None
    if not isinstance(found, kind):
        raise Fault(at, f"must have {key!r}, {_KINDS[kind]}", found if isinstance(value, dict) else value)
    return found


def pixels(value: Any, at: str) -> list[float]:
    """Check that a value is x, y, width and height, and return it.

    Raises:
        Fault: it is not a list of four numbers from -`MAX_PIXELS` to `MAX_PIXELS`.
    """
    if not isinstance(value, list) or len(value) != 4 or not all(map(_is_pixels, value)):
        raise Fault(at, "a box must be [x, y, width, height] in pixels", value)
    return value


def _is_pixels(value: Any) -> bool:
    return type(value) in (int, float) and -MAX_PIXELS <= value <= MAX_PIXELS


def page_size(width: Any, height: Any, at: str) -> tuple[int, int] | None:
    """Return the width and height that a file states for a page; None if it states none, or 0 as some tools do.

    Raises:
        Fault: a stated side is not a whole number of pixels.
    """
    for side in (width, height):
        # Some tools write whole numbers as 2392.0.
        if side is not None and not (_is_pixels(side) and side >= 0 and side == int(side)):
            raise Fault(at, "'width' and 'height' must be whole numbers of pixels, 0 or left out", side)
    return (int(width), int(height)) if width and height else None
