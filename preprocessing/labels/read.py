"""Read labels of any form. The content of a file decides its form. All files must have the same form."""

import csv
import hashlib
import logging
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from enum import Enum

import numpy as np
from upath import UPath

from cluster.errors import InputError, OptionError, counted
from preprocessing.books import HEADERS as BOOKS_HEADERS
from preprocessing.labels.coco import Coco, is_coco
from preprocessing.labels.codh import BOX, PAGE, is_codh_header, read_codh
from preprocessing.labels.curation import CANVASES_HEADER, Curations, is_curation, read_canvases
from preprocessing.labels.files import LabelFile, head_text, label_files, open_text
from preprocessing.labels.json_files import parse_json, shown
from preprocessing.labels.kaggle import HEADER, read_kaggle
from preprocessing.labels.page_ids import is_image
from preprocessing.labels.table import Labels, PageBoxes, assemble
from preprocessing.labels.yolo import CLASS_NAMES_FILES, SizeOf, is_yolo_line, read_yolo
from preprocessing.pages import count_kinds, ignored_line, kind_of

log = logging.getLogger("kuzushiji")

# In a folder, a file with one of these suffixes but without a known form is an error: it may be damaged. Files with
# other suffixes are skipped.
STRICT_SUFFIXES = (".csv", ".json")
# Exceptions: files that Kaggle and Label Studio provide next to the labels, and files for other options.
NO_LABELS = ("unicode_translation.csv", "sample_submission.csv", "notes.json")
OTHER_HEADERS = (CANVASES_HEADER, *map(list, BOOKS_HEADERS))
_JSON = re.compile(r'\{\s*["}]|\[\s*[{\]]')  # how an object, or a list of objects, begins
READ_ME = ("readme", "license", "licence", "notice")
# Labels of other tools must be converted to COCO.
FORMS = (
    "Kaggle's or CODH's CSV, a spreadsheet as CSV with the columns Unicode, Image, X, Y, Width and Height, COCO, YOLO "
    "or a IIIF Curation"
)
# Code points that programs write for a character that the encoding of a file lacks, `?` and U+FFFD, and that people
# write for one that they can't read, 〓.
REPLACEMENTS = (0x3F, 0xFFFD, 0x3013)


class Form(Enum):
    """Form of a file, from its name and its first bytes."""

    KAGGLE = "Kaggle's CSV"
    CODH = "CODH's CSV"
    JSON = "JSON"
    YOLO = "YOLO"
    CLASS_NAMES = "names of classes"
    EMPTY = "an empty file"
    OTHER = "no labels"


LABEL_FORMS = (Form.KAGGLE, Form.CODH, Form.JSON, Form.YOLO)


def read_labels(
    places: UPath | Sequence[UPath],
    option: str = "--labels",
    bare: bool = False,
    size_of: SizeOf = lambda _: None,
    canvases: UPath | None = None,
) -> Labels:
    """Read and check label files.

    Args:
        places: a file, a folder, a zip archive, or several of these.
        option: the command-line option to name in error messages.
        bare: whether boxes may be without characters.
        size_of: returns the size of a page; called for YOLO only, whose boxes are fractions of the page.
        canvases: CSV with the columns `canvas,file`, for IIIF Curations.

    Raises:
        InputError: a file does not exist, has no known form or not that of the other files, or exceeds a limit; a page
            is repeated, or its id is unsafe; a row, line or entry is malformed; or there are no boxes.
        OptionError: `canvases` is given with labels of another form.
    """
    sizes: dict[str, tuple[int, int] | None] = {}

    def recorded_size(page_id: str) -> tuple[int, int] | None:
        sizes[page_id] = size_of(page_id)
        return sizes[page_id]

    with label_files([places] if isinstance(places, UPath) else places, option) as found:
        form, files, names = _sorted_out(found, option)
        if canvases and form != Form.JSON:
            raise OptionError(f"--canvases must be given with IIIF Curations. Received: {files[0].where}, {form.value}")
        canvas_ids, canvases_sha256 = _canvases(canvases)
        pages: Iterator[PageBoxes]
        if form == Form.KAGGLE:
            pages = read_kaggle(files, bare)
        elif form == Form.CODH:
            pages = read_codh(files, bare)
        elif form == Form.YOLO:
            pages = read_yolo(files, names, bare, recorded_size)
        else:
            pages = _read_json(files, bare, option, canvas_ids)
        labels = assemble(pages, lambda: _digest(form, files, names, sizes, canvases_sha256))
    if labels.warnings:
        page_id, what = labels.warnings[0]
        of_pages = counted(len(labels.warnings), "page")
        log.warning("%s with boxes in fractions of pixels, first %s: %s", of_pages, page_id, what)
    return _with_warnings_of_replaced(labels)


def _with_warnings_of_replaced(labels: Labels) -> Labels:
    """Add warnings of boxes with a character that stands for another one, see `REPLACEMENTS`."""
    replaced = np.isin(labels.code_points, REPLACEMENTS)
    if not replaced.any():
        return labels
    counts = np.diff(np.concatenate([[0], np.cumsum(replaced)])[labels.starts])
    pages = [(page_id, count) for page_id, count in zip(labels.page_ids, counts.tolist(), strict=True) if count]
    log.warning(
        "%s with the character ?, U+FFFD or 〓, which stand for characters that an encoding such as CP932 lacks or "
        "that nobody could read, first on page %s: save the labels again as UTF-8, or remove these boxes",
        counted(int(replaced.sum()), "box", "boxes"),
        pages[0][0],
    )
    added = [
        (page_id, f"{counted(count, 'box', 'boxes')} with the character ?, U+FFFD or 〓") for page_id, count in pages
    ]
    return replace(labels, warnings=[*labels.warnings, *added])


def _by_content(files: Sequence[LabelFile]) -> list[LabelFile]:
    """Return files in an order that does not depend on where they are, also if two of them have the same name."""
    return sorted(files, key=lambda file: (file.name, file.sha256))


def _digest(
    form: Form,
    files: Sequence[LabelFile],
    names: Sequence[LabelFile],
    sizes: dict[str, tuple[int, int] | None],
    canvases_sha256: str,
) -> str:
    """Return a hex digest of all input of the labels. For a single Kaggle CSV, it is the SHA-256 of the file."""
    if form == Form.KAGGLE and len(files) == 1:
        return files[0].sha256
    ordered = _by_content(files) + _by_content(names)
    lines = [f"{file.name} {file.sha256}" for file in ordered] + [f"{page} {sizes[page]}" for page in sorted(sizes)]
    if canvases_sha256:
        lines.append(f"canvases {canvases_sha256}")
    return hashlib.sha256("\n".join(lines).encode(errors="surrogateescape")).hexdigest()


def _sorted_out(found: Sequence[LabelFile], option: str) -> tuple[Form, list[LabelFile], list[LabelFile]]:
    """Return the form of the label files, these files, and the files with the class names of YOLO.

    Raises:
        InputError: there are no labels, labels of several forms, or a file that may be a damaged label file.
    """
    of_form: dict[Form, list[LabelFile]] = {form: [] for form in Form}
    for file in found:
        of_form[_form_of(file)].append(file)
    if of_form[Form.YOLO]:  # a page without boxes, or one whose first line is malformed
        pages = [file for file in of_form[Form.EMPTY] + of_form[Form.OTHER] if _may_be_yolo(file)]
        of_form[Form.YOLO] = sorted(of_form[Form.YOLO] + pages, key=lambda file: (file.name, file.where))
        chosen = {id(file) for file in pages}
        for form in (Form.EMPTY, Form.OTHER):
            of_form[form] = [file for file in of_form[form] if id(file) not in chosen]
    for file in of_form[Form.OTHER] + of_form[Form.EMPTY]:
        if file.given or (kind_of(file.name) in STRICT_SUFFIXES and not _is_known_other(file)):
            # Raises if the encoding is unknown, which is then the cause.
            header = open_text(file.read(), file.where).readline().strip("\r\n")
            raise InputError(
                f"{file.where} must begin with the header image_id,labels, or be labels of another form: {FORMS}. "
                f"Received: {shown(header)}.{_fix_of_header(header)} See docs/data.md#label-files"
            )
    first, *others = [form for form in LABEL_FORMS if of_form[form]] or [Form.OTHER]
    if first == Form.OTHER:
        raise InputError(
            f"{option} must be {FORMS}. Received: {found[0].where}, which is none of these. "
            "See docs/data.md#label-files"
        )
    if others:
        one, other = (f"{of_form[form][0].where} ({form.value})" for form in (first, others[0]))
        raise InputError(f"{option} must be files of one form. Received: {one} and {other}")
    names = of_form[Form.CLASS_NAMES] if first == Form.YOLO else []
    used = {id(file) for file in (*of_form[first], *names)}
    if aside := [file.name for file in found if id(file) not in used]:
        kinds = ignored_line(count_kinds(map(kind_of, aside)))
        log.warning("%d files next to the labels are ignored: %s", len(aside), kinds)
    return first, of_form[first], names


def _form_of(file: LabelFile) -> Form:
    if file.base_name.lower() in NO_LABELS and not file.given:
        return Form.OTHER
    if file.base_name.lower() in CLASS_NAMES_FILES:
        return Form.CLASS_NAMES
    text = head_text(file.head())
    content = text.lstrip()
    if not content:
        return Form.EMPTY
    # Notes may begin with a bracket, too: `[x] done`, or a badge in a README.
    if content[0] in "{[" and (file.given or kind_of(file.name) == ".json" or _JSON.match(content)):
        return Form.JSON
    header = _header(text)
    if header == HEADER:
        return Form.KAGGLE
    if is_codh_header(header):
        return Form.CODH
    return Form.YOLO if is_yolo_line(content.splitlines()[0]) else Form.OTHER


def _header(text: str) -> list[str]:
    try:
        return next(csv.reader([re.split("[\r\n]", text, maxsplit=1)[0]]), [])
    except csv.Error:
        return []


def _fix_of_header(header: str) -> str:
    """Return how to fix the header of a spreadsheet, as a sentence; empty if it has none of the columns."""
    for separator in ",;\t":
        named = {name.strip(' "') for name in header.split(separator)}
        if missing := sorted({PAGE, *BOX} - named):
            if len(missing) < len((PAGE, *BOX)):
                return f" Missing: {', '.join(missing)}."
        elif separator != ",":
            return " Save the spreadsheet with commas between the columns."
    return ""


def _first_line(file: LabelFile) -> str:
    return head_text(file.head()).lstrip().partition("\n")[0].rstrip("\r")


def _may_be_yolo(file: LabelFile) -> bool:
    """Return whether an empty or unrecognized file next to YOLO files is one of them: no note, no list of images."""
    return kind_of(file.name) == ".txt" and not (
        file.base_name.lower().startswith(READ_ME) or is_image(_first_line(file))
    )


def _is_known_other(file: LabelFile) -> bool:
    return file.base_name.lower() in NO_LABELS or _header(head_text(file.head())) in OTHER_HEADERS


def _read_json(
    files: Sequence[LabelFile], bare: bool, option: str, canvas_ids: Mapping[str, str] | None
) -> Iterator[PageBoxes]:
    """Yield the pages of COCO files or of IIIF Curations, parsed one at a time."""
    coco, curations = Coco(bare), Curations(canvas_ids, bare)
    first: tuple[str, LabelFile] | None = None
    for file in files:
        content = parse_json(file)
        kind = "COCO" if is_coco(content) else "a IIIF Curation" if is_curation(content) else ""
        if not kind:
            raise InputError(
                f"{file.where} must have `images` and `annotations` (COCO), be a list of detections, or have "
                f"`selections` (a IIIF Curation). Received: {shown(content)}. docs/data.md says how to convert others"
            )
        first = first or (kind, file)
        if kind != first[0]:
            raise InputError(
                f"{option} must be files of one form. Received: {first[1].where} ({first[0]}) and {file.where} ({kind})"
            )
        if canvas_ids is not None and kind == "COCO":
            raise OptionError(f"--canvases must be given with IIIF Curations. Received: {file.where}, {kind}")
        if kind == "COCO":
            coco.add(content, file.where)
        else:
            yield from curations.pages(content, file.where)
        del content  # free the memory before the next file is parsed
    yield from coco.pages()


def _canvases(place: UPath | None) -> tuple[dict[str, str] | None, str]:
    """Return the page id of each canvas, and the SHA-256 of the file; None and "" without `--canvases`."""
    if place is None:
        return None, ""
    with label_files([place], "--canvases") as files:
        if len(files) > 1:
            raise InputError(
                f"--canvases must be one file. Received: {place} with {len(files)}. Give the file of all canvases"
            )
        return read_canvases(files[0]), files[0].sha256
