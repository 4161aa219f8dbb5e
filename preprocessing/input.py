"""The input of `prepare` and of `predict`: labels, and the files of their pages."""

import logging
from collections.abc import Sequence
from functools import cache
from typing import NamedTuple

from upath import UPath

from cluster.errors import OptionError
from cluster.places import is_inside
from preprocessing.labels.crops import read_crops
from preprocessing.labels.read import read_labels
from preprocessing.labels.table import Labels
from preprocessing.matching import Files
from preprocessing.pages import ignored_line, list_pages, size_reader

log = logging.getLogger("kuzushiji")


class Input(NamedTuple):
    """Labels, and the files of their pages."""

    labels: Labels
    files: Files
    ignored: dict[str, int]
    """Number of files that are not read, by kind, see `pages.Listing`."""


def check_outside(option: str, folder: UPath, others: Sequence[tuple[str, UPath]]) -> None:
    """Check that a folder to write is outside of others. The same command would find its files there when run again.

    Args:
        option: the option that names the folder.
        folder: the folder to write.
        others: options, and the folders or files that they name.

    Raises:
        OptionError: the folder is one of the others, or below it.
    """
    for name, other in others:
        if is_inside(folder, other):
            raise OptionError(f"{option} must be a folder outside of {name}. Received: {folder} and {other}")


def read_input(
    pages: UPath,
    label_places: UPath | Sequence[UPath] | None,
    option: str = "--labels",
    bare: bool = False,
    rescale: bool = False,
    canvases: UPath | None = None,
) -> Input:
    """Read the labels and list the pages. Log how many files are ignored.

    Args:
        pages: folder or archive of the pages.
        label_places: label files, see `read_labels`; None: `pages` has crops, see `read_crops`.
        option, bare, canvases: see `read_labels`.
        rescale: whether the labels must state the sizes of pages.

    Raises:
        OptionError: the labels state no sizes, or `canvases` is given with labels of another form.
        InputError: labels or pages can't be used.
    """
    if label_places is None:
        found = Input(*read_crops(pages))
    else:
        listed = cache(lambda: list_pages(pages))
        with size_reader(pages, listed) as size_of:
            labels = read_labels(label_places, option, bare, size_of, canvases)
        found = Input(labels, listed().files_of(labels.page_ids), listed().ignored)
    if rescale:
        check_sizes_are_stated(found.labels)
    if found.ignored:
        log.info("ignoring files in %s: %s", pages, ignored_line(found.ignored))
    return found


def check_sizes_are_stated(labels: Labels) -> None:
    """Check that the labels state page sizes, which `--rescale` needs, and log how many pages have none.

    Raises:
        OptionError: the labels state no size for which boxes were made.
    """
    if not labels.page_sizes:
        raise OptionError(
            "--rescale must be given with labels that say the size of their pages (COCO, IIIF Curation). "
            "Received: labels that do not. Add width and height to each entry of `images` in the COCO file, scale the "
            "boxes yourself, or leave --rescale out if the boxes fit the scans"
        )
    if unstated := len(labels.page_ids) - len(labels.page_sizes):
        log.warning("--rescale leaves the boxes of %d pages as they are: the labels do not say the size", unstated)
