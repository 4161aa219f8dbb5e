"""The folder of predictions, a contract with its users: tables, sealed by a manifest.

predictions-00000-of-00016.parquet ...   one row per box, in reading order
pages-00000-of-00016.parquet ...         one row per page: its text
manifest.json                            losses, accuracy, versions; written last
"""

import re
from typing import Annotated, Literal

from pydantic import FailFast, Field
from upath import UPath

from cluster.errors import OptionError
from cluster.manifest import Count, Manifest, is_sealed
from cluster.storage import TEMPORARY_PREFIX, list_files, list_folders, remove_file, remove_temporaries
from preprocessing.dataset import ClippedBoxes, Losses
from preprocessing.ink import InkCount
from preprocessing.page_results import Ignored, PageWarnings

_TABLE = re.compile(r"(predictions|pages)-[0-9]{5,}-of-[0-9]{5,}\.(parquet|csv)")


class PredictionsManifest(Manifest):
    """The manifest of a folder of predictions."""

    kind: Literal["predictions"] = "predictions"
    counts: Annotated[dict[str, Count], FailFast()]
    """`boxes` and `pages` in the file of boxes; how many boxes were `read`; how many of these are `uncertain`: less
    probable than `min_confidence`.
    """
    min_confidence: float = Field(0.0, ge=0, le=1)
    """Least probability with which texts and pictures show a character; below it, 〓."""
    accuracy: Annotated[dict[str, int | float | None], FailFast()]
    """Over the boxes whose characters are in the file; empty if there are none."""
    losses: Losses
    """Boxes that could not be read."""
    clipped: ClippedBoxes
    """Boxes partly off their page; the part on the page was read."""
    ignored: Ignored = Field(default_factory=dict)
    """Kind of file among the pages that is not read to number of such files."""
    warnings: PageWarnings = Field(default_factory=list)
    """What was mended in the files of pages, or is not as in other scans: the first `LISTED_WARNINGS`."""
    more_warnings: Count = 0
    """Number of further warnings."""
    ink: InkCount = InkCount()
    model_manifest_sha256: str
    fingerprint: str
    """Hash of the bytes of the file of boxes and of the ids and sizes of the pages."""
    versions: Annotated[dict[str, str], FailFast()]


def table_name(kind: str, group: int, groups: int, form: str) -> str:
    """Return the file name of a group's table. kind: `predictions` or `pages`. form: `parquet` or `csv`."""
    return f"{kind}-{group:05d}-of-{groups:05d}.{form}"


def clear(out: UPath) -> None:
    """Remove the tables and temporary files of an earlier attempt that did not finish.

    Raises:
        OptionError: the folder is sealed, or holds other files; nothing is removed.
    """
    if is_sealed(out):
        raise OptionError(f"--out must be a new or empty folder. Received: {out}, a finished one")
    names = [name for name in list_files(out) if not name.startswith(TEMPORARY_PREFIX)]
    if others := [*list_folders(out), *(name for name in names if not _TABLE.fullmatch(name))]:
        raise OptionError(f"--out must be a new or empty folder. Received: {out}, with {sorted(others)[0]}")
    for name in names:
        remove_file(out / name)
    remove_temporaries(out)
